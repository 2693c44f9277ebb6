"""What the routing room compiles with: numba, and blocks of work on all cores.

Kernels release the interpreter lock, so blocks of samples run on threads. Every block adds whole
numbers into arrays of its own; results do not depend on how many there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from moesaic.core.errors import UserError

try:
    from numba import njit
except ModuleNotFoundError as error:
    raise UserError(
        "routing metrics and cache simulations need the package 'numba', which is not installed. "
        "Run: pip install 'moesaic[routing]'"
    ) from error

__all__ = ["compiled", "spread", "threads"]

T = TypeVar("T")


def compiled(function: Any) -> Any:
    """Compile a kernel on its first call; the machine code is kept beside the source file.

    It is made anew when that file changes, and no other: a kernel calls kernels, and uses constants
    and sizes of arrays, of its own file only.
    """
    return njit(cache=True, nogil=True)(function)


def threads() -> int:
    """Threads that kernels use: the cores of this process, or OMP_NUM_THREADS where it is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores or 1, int(asked))) if asked.isdigit() else cores or 1


def spread(work: Callable[[int, int], T], count: int, *, multiple: int = 1) -> list[T]:
    """Call `work(start, stop)` on blocks that cover 0..count, on threads; results in order.

    Blocks start at a multiple of `multiple`.
    """
    blocks = -(-count // multiple)
    used = min(threads(), blocks)
    if used <= 1:
        return [work(0, count)]
    edges = [min(count, multiple * (blocks * i // used)) for i in range(used + 1)]
    with ThreadPoolExecutor(used) as pool:
        return list(pool.map(work, edges[:-1], edges[1:]))
