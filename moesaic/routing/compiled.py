"""What the routing room compiles with: numba, and blocks of work on all cores.

Kernels release the interpreter lock, so blocks of samples run on threads. Every block adds whole
numbers into arrays of its own; results do not depend on how many there are.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
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

__all__ = ["compiled", "spread", "spread_all", "threads"]

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
    return spread_all([work], count, multiple=multiple)[0]


def spread_all(
    works: Sequence[Callable[[int, int], T]], count: int, *, multiple: int = 1
) -> list[list[T]]:
    """Do what `spread` does for several works at once: where blocks are few, cores are not idle."""
    blocks = -(-count // multiple)
    used = max(1, min(threads(), blocks))
    edges = [min(count, multiple * (blocks * i // used)) for i in range(used + 1)]
    tasks = [(work, *edge) for work in works for edge in itertools.pairwise(edges)]
    workers = min(threads(), len(tasks))
    if workers <= 1:
        found = [work(start, stop) for work, start, stop in tasks]
    else:
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(lambda task: task[0](*task[1:]), tasks))
    return [found[i : i + used] for i in range(0, len(found), used)]
