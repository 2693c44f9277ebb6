"""Which launch is fastest for a product: measured once for a shape, remembered on disk.

The key is the GPU, Triton's version, the product, the dtype, D, I, E and the rows an expert has on
average, rounded to a power of two. A measurement runs the real product on the real input of the
first call; later calls and later processes read it from
`$XDG_CACHE_HOME/moesaic/launches-<gpu>-<triton>-<candidates>.json`: a choice among other candidates
is none. Nothing is measured while a CUDA graph is captured or
with MOESAIC_TUNE=0: then a remembered launch is used, or the first candidate.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from moesaic.core.files import write_text
from moesaic.kernels import options
from moesaic.kernels.triton.products import Launch

_CONTIGUOUS = tuple(Launch(256, 3, group_m) for group_m in (8, 1, 32))
_OUTER = (
    *(Launch(256, 3, group_m) for group_m in (8, 2, 1)),
    *(Launch(256, 4, group_m, buffers=2) for group_m in (8, 1)),
)
CANDIDATES: dict[str, tuple[Launch, ...]] = {
    "up": (*(Launch(256, 4, group_m) for group_m in (8, 2, 32)), Launch(256, 4, 8, copy=True)),
    "down": _CONTIGUOUS,
    "activation_gradient": (
        *(Launch(256, 3, group_m) for group_m in (8, 2, 32)),
        *(Launch(256, 3, group_m, loader=True) for group_m in (8, 2)),
        Launch(256, 3, 8, copy=True),
    ),
    "x_gradient": _CONTIGUOUS,
    "up_gradient": _OUTER,
    "down_gradient": _OUTER,
}
_REPEATS = 3
_BETTER = 0.99  # of the first candidate's time: less is noise
_known: dict[torch.device, dict[str, Launch]] = {}


def fastest(
    product: str,
    run: Callable[[Launch], Any],
    *,
    shape: tuple[int, ...],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    """Return the fastest launch of `product` for this shape (D, I, E).

    `run(launch)` computes the product on the real input, as often as a measurement needs it.
    """
    key = _key(product, shape, rows, dtype)
    launches = _launches(device)
    launch = launches.get(key)
    if launch is None:
        if os.environ.get("MOESAIC_TUNE") == "0" or torch.cuda.is_current_stream_capturing():
            launch = CANDIDATES[product][0]
        else:
            launch = launches[key] = _measure(CANDIDATES[product], run)
            _remember(device)
    return launch if options.current().persistent else replace(launch, persistent=False)


@cache
def _key(product: str, shape: tuple[int, ...], rows: int, dtype: torch.dtype) -> str:
    bucket = triton.next_power_of_2(max(1, rows // shape[-1]))
    sizes = "x".join(str(size) for size in shape)
    return f"{product} {str(dtype).removeprefix('torch.')} {sizes} rows<={bucket}"


def _measure(candidates: Sequence[Launch], run: Callable[[Launch], Any]) -> Launch:
    times = []
    for launch in candidates:
        run(launch)  # compiles
    for launch in candidates:
        spans = []
        for _ in range(_REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(launch)
            end.record()
            end.synchronize()
            spans.append(start.elapsed_time(end))
        times.append(sorted(spans)[_REPEATS // 2])
    best = min(range(len(times)), key=times.__getitem__)
    return candidates[best if times[best] < _BETTER * times[0] else 0]


@cache
def _file(device: torch.device) -> Path:
    gpu = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-").lower()
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    candidates = f"{zlib.crc32(repr(sorted(CANDIDATES.items())).encode()):08x}"
    name = f"launches-{gpu}-triton-{triton.__version__}-{candidates}.json"
    return Path(cache_home) / "moesaic" / name


def _launches(device: torch.device) -> dict[str, Launch]:
    if device not in _known:
        _known[device] = _read(_file(device))
    return _known[device]


def _read(path: Path) -> dict[str, Launch]:
    """Read what is remembered; a damaged file counts as none.

    So does a launch that is no candidate: the kernels may not run it.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        known = {key: Launch(**row) for key, row in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {
        key: launch
        for key, launch in known.items()
        if launch in CANDIDATES.get(key.partition(" ")[0], ())
    }


def _remember(device: torch.device) -> None:
    path = _file(device)
    rows = _read(path) | _launches(device)  # another process may have written meanwhile
    with contextlib.suppress(OSError):  # a read-only home: measured again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(
            path, json.dumps({key: asdict(launch) for key, launch in rows.items()}, indent=1)
        )
