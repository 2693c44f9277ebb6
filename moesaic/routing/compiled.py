"""What the routing room compiles with: numba, two bit instructions, and blocks of work on all cores.

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
    from numba import njit, types
    from numba.extending import intrinsic
except ModuleNotFoundError as error:
    raise UserError(
        "routing metrics and cache simulations need the package 'numba', which is not installed. "
        "Run: pip install 'moesaic[routing]'"
    ) from error

__all__ = ["compiled", "ones", "spread", "threads", "trailing_zeros"]

T = TypeVar("T")


def compiled(function: Any) -> Any:
    """Compile a kernel on its first call; the machine code is kept beside the source file."""
    return njit(cache=True, nogil=True)(function)


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def ones(typing_context: Any, word: Any) -> Any:
    """Count the set bits of a uint64."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), build


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def trailing_zeros(typing_context: Any, word: Any) -> Any:
    """Number of the lowest set bit of a uint64 that is not 0."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], context.get_constant(types.boolean, True))

    return types.uint64(types.uint64), build


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
