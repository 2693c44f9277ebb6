"""How fast this machine is: a measurement of a few seconds, or a GPU's data sheet.

Rates are floating point operations (a multiplication and an addition are two) or bytes a second.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moesaic.core.errors import unknown

__all__ = ["GPUS", "Machine", "data_sheet", "measure"]


@dataclass(frozen=True)
class Machine:
    """The rates that decide how long things take."""

    name: str
    source: str
    """Where the figures come from: measured, or a data sheet and an assumption."""
    float32: float
    """Matrix products in float32."""
    model: float
    """Matrix products in the type that models run in: bf16 on a GPU, float32 on a CPU."""
    double: float
    """Cholesky factors in float64, counted as n³/3 operations."""
    memory_rate: float
    """Bytes read and written in memory."""
    disk_rate: float
    """Bytes written to disk, synchronised."""
    memory: int
    """Bytes of memory: the host's, or the GPU's."""
    gpu: bool = False
    """Whether a GPU computes, which then holds what is computed with."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


_SHARE = 0.7
"""Share of a data sheet's peak that products and copies are assumed to reach (an H200: 0.76)."""
_DOUBLE_SHARE = 0.3
"""The same of float64 by Cholesky factors (an H200: 0.32)."""

GPUS: dict[str, tuple[float, float, float, float, int]] = {
    # float32, bf16, float64 in TFLOP/s; TB/s; GB: vendors' data sheets, dense, SXM versions
    "h200": (67, 989, 67, 4.8, 141),
    "h100": (67, 989, 67, 3.35, 80),
    "a100": (19.5, 312, 19.5, 2.04, 80),
    "rtx-4090": (82.6, 165, 1.29, 1.01, 24),
}
"""GPUs that can be planned for without having one."""


def data_sheet(gpu: str, *, disk_rate: float) -> Machine:
    """A GPU at some of its data sheet's rates. Raises UserError for an unknown one."""
    if gpu not in GPUS:
        raise unknown("GPU", gpu, GPUS)
    single, half, double, bandwidth, memory = GPUS[gpu]
    return Machine(
        name=gpu,
        source=f"not measured: {_SHARE:.0%} of the data sheet's rates ({_DOUBLE_SHARE:.0%} for "
        "float64 factors); disk as measured here",
        float32=_SHARE * single * 1e12,
        model=_SHARE * half * 1e12,
        double=_DOUBLE_SHARE * double * 1e12,
        memory_rate=_SHARE * bandwidth * 1e12,
        disk_rate=disk_rate,
        memory=memory * 10**9,
        gpu=True,
    )


def measure(folder: Path | None = None) -> Machine:
    """Measure the first GPU, else the CPU, and the disk of `folder` (the temporary one)."""
    import torch

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")

    def product(dtype: torch.dtype, size: int) -> float:
        a_NN = torch.randn(size, size, device=device).to(dtype)
        return 2 * size**3 / _best(lambda: a_NN @ a_NN, gpu)

    def double(size: int) -> float:
        a_NN = torch.randn(size, size, device=device, dtype=torch.float64)
        a_NN = a_NN @ a_NN.T + size * torch.eye(size, device=device, dtype=torch.float64)
        return size**3 / 3 / _best(lambda: torch.linalg.cholesky_ex(a_NN), gpu)

    def memory() -> float:
        a_N = torch.ones(1 << 26, device=device)
        b_N = torch.empty_like(a_N)
        return 2 * a_N.nbytes / _best(lambda: b_N.copy_(a_N), gpu)

    single = product(torch.float32, 8192 if gpu else 2048)
    return Machine(
        name=torch.cuda.get_device_name() if gpu else _cpu(torch.get_num_threads()),
        source="measured",
        float32=single,
        model=product(torch.bfloat16, 8192) if gpu else single,
        double=double(8192 if gpu else 1024),
        memory_rate=memory(),
        disk_rate=_disk(folder),
        memory=torch.cuda.get_device_properties(0).total_memory if gpu else _ram(),
        gpu=gpu,
    )


def _best(work: Callable[[], object], gpu: bool, runs: int = 4) -> float:
    """Seconds of the fastest of a few runs, after one that warms up."""
    import torch

    times = []
    for _ in range(runs):
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _disk(folder: Path | None) -> float:
    data = os.urandom(1 << 20) * 64
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return len(data) / (time.perf_counter() - start)


def _ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu(threads: int) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
