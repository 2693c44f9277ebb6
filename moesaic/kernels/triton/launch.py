"""Launch a Triton kernel again without Triton's own look at every argument.

Triton's launch binds and describes each of 40 arguments in Python and looks the description up: 40
to 90 microseconds a launch, which a small experts layer cannot hide (12 launches forward and
backward). Here the same description is made in a few, and the compiled kernel found by it is
started at once. The first launch of a description, and every launch on a version of Triton whose
inner call is not known to us, goes the ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.runtime import JITFunction

_KNOWN = ("3.6.",)  # versions with the call below, checked on a GPU
_ALIGNED = 16


class Launcher:
    """A kernel with its compiled forms: `launcher(grid, *arguments, num_warps=..., NAME=...)`.

    Positional arguments are the kernel's first ones; the rest are given by name.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._direct = isinstance(function, JITFunction) and triton.__version__.startswith(_KNOWN)
        constants = [p.is_constexpr for p in function.params] if self._direct else []
        self._names: list[str] = list(function.arg_names) if self._direct else []
        self._describe: list[Callable[[Any], Any]] = [
            _itself if constant else _description for constant in constants
        ]

    def __call__(
        self,
        grid: tuple[int, ...],
        *arguments: Any,
        num_warps: int = 4,
        num_stages: int = 3,
        launch_pdl: bool = False,
        **named: Any,
    ) -> None:
        """Start the kernel on the current stream of the current device."""
        options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
        if launch_pdl:  # not an option of every backend
            options["launch_pdl"] = True
        if not self._direct:
            self._function[grid](*arguments, **named, **options)
            return
        if named:
            arguments = (*arguments, *[named[name] for name in self._names[len(arguments) :]])
        device = torch.cuda.current_device()
        key = (
            device, num_warps, num_stages, launch_pdl,
            *[describe(a) for describe, a in zip(self._describe, arguments, strict=True)],
        )  # fmt: skip
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._function[grid](*arguments, **options)
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        x, y, z = (*grid, 1, 1)[:3]
        try:
            compiled.run(
                x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None,
                *arguments,
            )  # fmt: skip
        except (AttributeError, TypeError):  # a build of Triton with another inner call
            self._direct = False
            self._function[grid](*arguments, **options)


def _itself(argument: Any) -> Any:
    return argument


def _description(argument: Any) -> Any:
    """What Triton compiles a kernel for: dtype and alignment, or what kind of integer."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % _ALIGNED == 0
    if type(argument) is int:
        return argument == 1, argument % _ALIGNED == 0, -(2**31) <= argument < 2**31
    if argument is None:
        return None
    return argument.base.dtype, *argument.block_shape  # a descriptor
