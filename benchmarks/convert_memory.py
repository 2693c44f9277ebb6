"""Memory and speed of `moesaic convert` on a LLaMA-2-7B-shaped checkpoint, against cp and sync.

    python benchmarks/convert_memory.py FOLDER --rounds 3

Builds a checkpoint of random bf16 weights in the given folder (13.5 GB; 41 GB are needed at the
peak, everything is deleted at the end), then alternates, each from a cold cache: `cp -r` of the
same files followed by `sync`, and `moesaic convert --split random` followed by `sync`. RssAnon of
the converting process is sampled from /proc every 10 ms. Writes one JSON object to standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any


def build(path: Path, layers: int) -> None:
    """Write the dense checkpoint: the shape of LLaMA-2-7B, N(0, 0.02²), two shards."""
    import torch

    from moesaic.models.checkpoint import CheckpointWriter

    hidden, width, vocabulary = 4096, 11008, 32000
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        for name in "qkvo":
            shapes[f"{start}self_attn.{name}_proj.weight"] = (hidden, hidden)
        shapes[f"{start}mlp.gate_proj.weight"] = (width, hidden)
        shapes[f"{start}mlp.up_proj.weight"] = (width, hidden)
        shapes[f"{start}mlp.down_proj.weight"] = (hidden, width)
        shapes[f"{start}input_layernorm.weight"] = (hidden,)
        shapes[f"{start}post_attention_layernorm.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    path.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))
    plan = [(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    generator = torch.Generator().manual_seed(0)
    with CheckpointWriter(path, plan, max_shard_bytes=9_980_000_000) as writer:
        for name, shape in shapes.items():
            values = torch.empty(shape).normal_(0.0, 0.02, generator=generator)
            writer.write(name, values.bfloat16())


def cool(folder: Path) -> str:
    """Empty the page cache of these files; return how it was done."""
    subprocess.run(["sync"], check=True)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return "drop_caches"
    except OSError:
        for file in folder.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        return "posix_fadvise"


def timed(command: list[str]) -> tuple[float, float, dict[str, float], str]:
    """Run a command, then sync: wall and CPU seconds, peak memory in GB, standard output."""
    peak = {"RssAnon": 0, "VmRSS": 0}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def sample() -> None:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                lines = status.read_text().splitlines()
            except OSError:
                return
            for line in lines:
                name, _, value = line.partition(":")
                if name in peak:
                    peak[name] = max(peak[name], int(value.split()[0]))
            time.sleep(0.01)

    watcher = threading.Thread(target=sample)
    watcher.start()
    output = process.communicate()[0]
    watcher.join()
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    subprocess.run(["sync"], check=True)
    seconds = time.monotonic() - started
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return seconds, cpu, {name: kib * 1024 / 1e9 for name, kib in peak.items()}, output


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--verify", default="auto")
    arguments = parser.parse_args()
    folder = arguments.folder
    dense, copy, moe = folder / "dense", folder / "copy", folder / "moe"
    needed = 3 * (arguments.layers * 0.405e9 + 0.53e9)
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < needed:
        sys.exit(f"{folder} needs {needed / 1e9:.0f} GB free")
    result: dict[str, Any] = {"rounds": [], "cores": os.cpu_count()}
    try:
        build(dense, arguments.layers)
        result["bytes"] = sum(file.stat().st_size for file in dense.iterdir())
        for _ in range(arguments.rounds):
            row: dict[str, Any] = {"load_before": os.getloadavg()[0]}
            shutil.rmtree(copy, ignore_errors=True)
            result["cold_by"] = cool(dense)
            row["cp"], row["cp_cpu"], _, _ = timed(["cp", "-r", str(dense), str(copy)])
            shutil.rmtree(copy)
            shutil.rmtree(moe, ignore_errors=True)
            cool(dense)
            command = [
                *(sys.executable, "-m", "moesaic", "convert", str(dense), "-o", str(moe)),
                *("--split", "random", "--experts", "16", "--top-k", "4"),
                *("--verify", arguments.verify, "--json"),
            ]
            row["convert"], row["convert_cpu"], peak, output = timed(command)
            report = json.loads(output)
            row |= {f"peak_{name}_GB": value for name, value in peak.items()}
            row |= {key: report[key] for key in ("exact", "difference", "difference_of")}
            row["ratio"] = row["convert"] / row["cp"]
            print(json.dumps(row), file=sys.stderr, flush=True)
            result["rounds"].append(row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
