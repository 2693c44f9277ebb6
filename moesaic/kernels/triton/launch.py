"""Launch a Triton kernel again without Triton's own look at every argument.

Triton's launch binds and describes each of 40 arguments in Python and looks the description up: 40
to 90 microseconds a launch, which a small experts layer cannot hide (12 launches forward and
backward). Here the same description is made in a few, and the compiled kernel found by it is
started at once. The first launch of a description, and every launch on a version of Triton whose
inner call is not known to us, goes the ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from operator import itemgetter
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
        params = function.params if self._direct else []
        self._names: list[str] = list(function.arg_names) if self._direct else []
        self._constants = _pick(i for i, param in enumerate(params) if param.is_constexpr)
        self._others = _pick(i for i, param in enumerate(params) if not param.is_constexpr)

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
        if not self._direct:
            options = _options(num_warps, num_stages, launch_pdl)
            self._function[grid](*arguments, **named, **options)
            return
        if named:
            arguments = (*arguments, *[named[name] for name in self._names[len(arguments) :]])
        device = torch.cuda.current_device()
        key = (
            device, num_warps, num_stages, launch_pdl, self._constants(arguments),
            *[  # written out here: a call an argument would double the time of a launch
                (a.dtype, a.data_ptr() % _ALIGNED == 0)
                if isinstance(a, torch.Tensor)
                else _kind(a)
                if type(a) is int
                else a and (a.base.dtype, *a.block_shape)  # None, or a descriptor
                for a in self._others(arguments)
            ],
        )  # fmt: skip
        compiled = self._compiled.get(key)
        if compiled is None:
            options = _options(num_warps, num_stages, launch_pdl)
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
            options = _options(num_warps, num_stages, launch_pdl)
            self._function[grid](*arguments, **options)


def _pick(places: Iterable[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Take the arguments at `places`."""
    found = list(places)
    if len(found) > 1:
        return itemgetter(*found)
    return lambda arguments: tuple(arguments[place] for place in found)


def _options(num_warps: int, num_stages: int, launch_pdl: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
    if launch_pdl:  # not an option of every backend
        options["launch_pdl"] = True
    return options


@lru_cache(4096)
def _kind(number: int) -> tuple[bool, ...]:
    """What Triton compiles a kernel for; of tensors, it is dtype and alignment."""
    return number == 1, number % _ALIGNED == 0, -(2**31) <= number < 2**31
