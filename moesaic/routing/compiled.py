"""What the routing room compiles with: numba, and blocks of work on all cores.

Kernels release the interpreter lock, so blocks of samples run on threads. Every block adds whole
numbers into arrays of its own; results do not depend on how many there are.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar, cast

from moesaic.core.errors import UserError

try:
    from numba import njit
except ModuleNotFoundError as error:
    raise UserError(
        "routing metrics and cache simulations need the package 'numba', which is not installed. "
        "Run: pip install 'moesaic[routing]'"
    ) from error

__all__ = ["ahead", "all_of", "compiled", "spread", "threads"]

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


def spread(
    work: Callable[[int, int], T], count: int, *, multiple: int = 1, each: int = 1
) -> list[T]:
    """Call `work(start, stop)` on blocks that cover 0..count, on threads; results in order.

    Blocks start at a multiple of `multiple`; there are `each` for a thread.
    """
    blocks = -(-count // multiple)
    used = max(1, min(each * threads(), blocks))
    edges = [min(count, multiple * (blocks * i // used)) for i in range(used + 1)]
    return all_of([partial(work, *edge) for edge in itertools.pairwise(edges)])


def all_of(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Do tasks that do not need one another, on threads; results in order."""
    workers = min(threads(), len(tasks))
    if workers <= 1:
        return [task() for task in tasks]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda task: task(), tasks))


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield items; the next one is made, on a thread, while one is used. Where there is one core,
    they are made in turn.
    """
    if threads() == 1:
        yield from items
        return
    none = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, none)
        while (item := coming.result()) is not none:
            coming = pool.submit(next, items, none)
            yield cast(T, item)
