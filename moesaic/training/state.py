"""Saving everything a run needs to go on bit for bit, in safetensors and JSON.

A state is the folder ``OUT/checkpoints/step-00000100``:

    model.safetensors       parameters and buffers under their own names, in the type they train in
    optimizer.safetensors   ``<parameter>::exp_avg`` and so on, with the fp32 master copies if any
    rng.safetensors         torch's generators, CPU and CUDA
    state.json              step, data cursor, python's and numpy's generators, open log line

It appears by a rename, so it is whole or absent; a killed save leaves the state before it
untouched.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from moesaic.core.errors import UserError
from moesaic.core.files import output_directory
from moesaic.training.optimizer import Optimizer

FOLDER = "checkpoints"


def states(out: Path) -> dict[int, Path]:
    """Map step to folder for every saved state of a run, in order of steps."""
    found = {
        int(folder.name.removeprefix("step-")): folder
        for folder in (out / FOLDER).glob("step-*")
        if folder.name.removeprefix("step-").isdigit() and (folder / "state.json").is_file()
    }
    return dict(sorted(found.items()))


def save_state(
    out: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    facts: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Write the state of `step`, then delete all but the newest `keep_last` (at least this one)."""
    folder = out / FOLDER / f"step-{step:08d}"
    with output_directory(folder, overwrite=True) as partial:
        _save(named_tensors(model), partial / "model.safetensors")
        _save(optimizer.tensors(), partial / "optimizer.safetensors")
        _save(_torch_rng(), partial / "rng.safetensors")
        record = {"step": step, "rng": _python_rng(), **facts}
        (partial / "state.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    for old in list(states(out).values())[: -max(1, keep_last)]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def read_facts(folder: Path) -> dict[str, Any]:
    """Read ``state.json``. Raises UserError when it is damaged."""
    path = folder / "state.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        raise _damaged(path) from None


def restore_state(
    folder: Path, *, model: nn.Module, optimizer: Optimizer, facts: Mapping[str, Any]
) -> None:
    """Put a saved state back into the model, the optimizer and every random generator.

    Raises UserError when a file is damaged or belongs to a model of another shape.
    """
    target = named_tensors(model)
    saved = _load(folder / "model.safetensors")
    wrong = sorted(set(target) ^ set(saved)) or [
        name for name, value in target.items() if value.shape != saved[name].shape
    ]
    if wrong:
        raise UserError(
            f"{folder} holds a state of another model ('{wrong[0]}' differs). "
            "Give the same --model, another -o, or --no-resume to start again."
        )
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(saved[name])
    optimizer.load_tensors(_load(folder / "optimizer.safetensors"))
    _restore_rng(facts["rng"], _load(folder / "rng.safetensors"))


@contextlib.contextmanager
def own_generators(seed: int) -> Iterator[None]:
    """Seed torch, numpy and python inside the block; give the caller's generators back."""
    host, generators = _python_rng(), _torch_rng()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
    finally:
        _restore_rng(host, generators)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters (tied ones once) and persistent buffers by name."""
    persistent = set(model.state_dict(keep_vars=True))
    found: dict[str, torch.Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    found |= {name: b for name, b in model.named_buffers() if name in persistent}
    return found


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    # A copy of each tensor: two that share memory cannot be written, and fused updates keep views.
    save_file(
        {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}, path
    )


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        raise _damaged(path) from None


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is missing or damaged. Remove {path.parent} to go on from the state before it, "
        "or use --no-resume to start again."
    )


def _torch_rng() -> dict[str, torch.Tensor]:
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return found


def _python_rng() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }


def _restore_rng(host: Mapping[str, Any], generators: Mapping[str, torch.Tensor]) -> None:
    version, internal, gauss = host["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = host["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(generators["cpu"])
    for name, state in generators.items():
        device = torch.device(name)
        # device_count is 0 without CUDA; a state may come from a machine with more GPUs.
        if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)
