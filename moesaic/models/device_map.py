"""`device_map.json` beside a model: which device each part of it goes to.

A JSON object from module names ("model.layers.0", "lm_head") to a GPU's number, "cpu" or "disk", as
in accelerate's guide to big models. Everything is checked before a weight is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesaic.core.errors import UserError, nearest
from moesaic.models.checkpoint import read_json

NAME = "device_map.json"
_INSTEAD = "Correct it, delete it, or give device_map='auto' or 'cpu'."


def read_device_map(directory: Path) -> dict[str, int | str] | None:
    """Return the map beside a model, or None where there is none.

    Raises UserError for a file that is no JSON object, or names a device that is not there.
    """
    file = directory / NAME
    if not file.is_file():
        return None
    given = read_json(file, cure=_INSTEAD)
    return {name: _device(name, device, file) for name, device in given.items()}


def check_device_map(device_map: dict[str, int | str], model: nn.Module, *, file: Path) -> None:
    """Check that a map names parts of `model` (on the meta device), and all of them.

    Raises UserError that says which name is unknown, with the nearest one, or which part has no
    device.
    """
    modules = {path for path, _ in model.named_modules()}
    weights = [path for path, _ in model.named_parameters()]
    known = modules | set(weights)
    strangers = [name for name in device_map if name not in known]
    if strangers:
        depth = strangers[0].count(".")
        alike = [name for name in known if name.count(".") == depth]
        raise UserError(
            f"{file}: {type(model).__name__} has no part {strangers[0]}"
            f"{_others(strangers)}.{nearest(strangers[0], alike)} {_INSTEAD}"
        )
    homeless = dict.fromkeys(
        _part(path, device_map) for path in weights if not _covered(path, device_map)
    )
    if homeless:
        first = next(iter(homeless))
        raise UserError(f"{file} gives no device to {first}{_others(list(homeless))}. {_INSTEAD}")


def _device(name: str, device: Any, file: Path) -> int | str:
    count = torch.cuda.device_count()
    if isinstance(device, str) and device.removeprefix("cuda:").isdigit():
        device = int(device.removeprefix("cuda:"))
    if isinstance(device, bool) or not (isinstance(device, int) or device in ("cpu", "disk")):
        raise UserError(
            f"{file} sends {name} to {device!r}. A device is a GPU's number, 'cpu' or 'disk'."
        )
    if isinstance(device, int) and not 0 <= device < count:
        gpus = {0: "no GPU", 1: "1 GPU"}.get(count, f"{count} GPUs")
        raise UserError(f"{file} sends {name} to GPU {device}; this machine has {gpus}. {_INSTEAD}")
    chosen: int | str = device
    return chosen


def _covered(path: str, device_map: dict[str, int | str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:end]) in device_map for end in range(len(parts) + 1))


def _part(path: str, device_map: dict[str, int | str]) -> str:
    """The largest part that holds `path` and nothing that the map names."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        part = ".".join(parts[:end])
        if not any(name.startswith(part + ".") for name in device_map):
            return part
    return path


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
