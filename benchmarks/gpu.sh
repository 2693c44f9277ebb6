#!/usr/bin/env bash
# Every figure and test that needs a GPU, the most wanted first; results under the folder given.
#   bash benchmarks/gpu.sh OUT [PART...]
# parts: bench tests zipf decode step router recording offload (construction has its own program,
# `python -m benchmarks.construction`). On an H200 all take about 15 minutes, most of it compiling.
set -uo pipefail
export PYTHONUNBUFFERED=1
out=$1
shift
parts=${*:-bench tests zipf decode step router recording offload}
mkdir -p "$out"
part() { echo "== $1 $(date +%T)"; }
for name in $parts; do
  part "$name"
  case $name in
    tests)  # four at once: most of it is compiling
      test() {
        timeout 200 python3 -m pytest "${@:2}" -m gpu -q --tb=short -p no:cacheprovider \
          >"$out/tests-$1.txt" 2>&1
      }
      test hopper tests/kernels/test_triton_hopper.py &
      test kernels tests/kernels --ignore tests/kernels/test_triton_hopper.py \
        --ignore tests/kernels/test_triton_router.py &
      test router tests/kernels/test_triton_router.py &
      test models tests/models tests/routing tests/training tests/construct &
      wait
      for log in "$out"/tests-*.txt; do
        echo "$log"
        tail -n 8 "$log"
      done
      ;;
    bench)
      timeout 150 python3 -m moesaic kernels bench --preset all --repeats 5 --only moesaic \
        --only "gemm only" --only grouped_mm -o "$out/bench" >"$out/bench.txt" 2>&1
      tail -60 "$out/bench.txt"
      ;;
    zipf)
      timeout 90 python3 -m moesaic kernels bench --preset all --repeats 5 --routing zipf \
        --only moesaic -o "$out/zipf" >"$out/zipf.txt" 2>&1
      tail -40 "$out/zipf.txt"
      ;;
    decode)
      timeout 90 python3 -m moesaic kernels bench --preset all --tokens 1 --tokens 8 --tokens 64 \
        --repeats 5 --only moesaic --only batched_mm --only grouped_mm -o "$out/decode" \
        >"$out/decode.txt" 2>&1
      tail -3 "$out/decode.txt"
      ;;
    step)
      for preset in mixtral-1b qwen2-moe-1b deepseek-v3-1b; do
        timeout 240 python3 benchmarks/train_speed.py $preset --sequences 4 --block 4096 \
          --precision bf16 --updates 6 --experts moesaic --experts grouped_mm \
          2>&1 | tee "$out/step-$preset.txt" | tail -9
      done
      ;;
    router)
      timeout 90 python3 -m moesaic kernels bench-router -o "$out/router" 2>&1 | tail -40
      ;;
    recording)
      timeout 90 python3 -m benchmarks.recording --out "$out/recording" 2>&1 | tail -80
      ;;
    offload)
      for section in offload watch exact; do
        timeout 75 python3 -m benchmarks.offload --out "$out/$section" --part $section 2>&1 | tail -140
      done
      ;;
  esac
done
part done
