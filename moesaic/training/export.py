"""The result of a run, at the top of OUT: a Hugging Face directory with tokenizer and lineage."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from moesaic.core.config import to_yaml
from moesaic.core.console import note
from moesaic.core.errors import MoesaicError
from moesaic.core.files import make_readable
from moesaic.core.lineage import FILE_NAME as LINEAGE
from moesaic.core.lineage import read_lineage, write_lineage
from moesaic.models.save import save
from moesaic.training import state
from moesaic.training.balance import correction_biases

if TYPE_CHECKING:
    from moesaic.training.config import TrainConfig
    from moesaic.training.loop import Run

_PARTIAL = ".model.partial"
_CONFIG = "config.json"  # written last: without it the directory is no model


def write_model(run: Run) -> None:
    """Write the trained model into the run's directory; its ``config.json`` appears last."""
    partial = run.path / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    guarded(run.path, lambda: _write(run, partial))
    note(f"model written to {run.path}")


def is_model(path: Path) -> bool:
    """Say whether the directory holds a finished model."""
    return (path / _CONFIG).is_file()


def is_written(path: Path, config: TrainConfig) -> bool:
    """Say whether the directory holds the finished model of this very config."""
    lineage = read_lineage(path) or {}
    is_ours = lineage.get("step") == "train" and lineage.get("config") == _resolved(config)
    return is_ours and is_model(path)


def remove_model(path: Path) -> None:
    """Delete a finished model's files, so that no old weights sit beside a new run's log."""
    for pattern in (
        _CONFIG,
        LINEAGE,
        "generation_config.json",
        "model*.safetensors*",
        "tokenizer*",
    ):
        for file in path.glob(pattern):
            file.unlink()


def guarded(path: Path, write: Callable[[], Any]) -> None:
    """Call `write`; a full disk becomes a MoesaicError that says what survives."""
    try:
        write()
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
        if not full:
            raise
        saved = list(state.states(path))
        kept = f"the state of update {saved[-1]} is whole" if saved else "no state was saved yet"
        raise MoesaicError(
            f"no space left on the device under {path}; {kept}. Free some space and run the same "
            "command again."
        ) from error


def _write(run: Run, partial: Path) -> None:
    try:
        partial.mkdir()
        dtype = _dtype(run)
        # In place: the run is over and its fp32 state is saved, so no second copy is held.
        model: Any = run.model
        biases = [bias.clone() for bias in correction_biases(model)]
        model.to(dtype)  # makes new buffers
        for bias, exact in zip(correction_biases(model), biases, strict=True):
            bias.data = exact
        save(model, partial)
        if run.tokenizer is not None:
            run.tokenizer.save_pretrained(partial)
        write_lineage(
            partial,
            step="train",
            parent=run.config.model,
            config=_resolved(run.config),
            seed=run.config.seed,
            updates=run.step,
            tokens=run.step * run.config.tokens_per_step,
            seconds=round(run.seconds, 3),
            held_out_loss=run.held_out,
            weights=run.weights,
            epochs=run.data.epochs(run.drawn),
            parameters=run.parameters,
            active_parameters=run.active,
        )
        (partial / "train.yaml").write_text(to_yaml(run.config), encoding="utf-8")
        make_readable(partial)
        (run.path / _CONFIG).unlink(missing_ok=True)
        files = sorted(partial.iterdir(), key=lambda file: file.name == _CONFIG)
        for file in files:
            os.replace(file, run.path / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _dtype(run: Run) -> torch.dtype:
    name = run.config.save_dtype or run.source_dtype
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _resolved(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")
