"""Read what the original LLaMA-MoE-v2 code wrote with torch.save: gates, scores, neuron indices,
distributions of outputs.

Notation: L layers, E experts, C clusters, D hidden size, F neurons. The files are pickles; the
reader of `legacy` opens them, which knows plain values only and runs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.construct.legacy import read_plain
from moesaic.construct.split import NeuronSplit
from moesaic.core.errors import UserError

__all__ = [
    "SUFFIXES",
    "is_original",
    "open_split",
    "read_distribution",
    "read_gates",
    "read_indices",
    "read_scores",
]

SUFFIXES = (".pt", ".pth", ".bin")


_MOMENTS = ("number", "mean", "variance")


def is_original(path: Path) -> bool:
    """Whether a file's name says that torch.save wrote it."""
    return Path(path).suffix in SUFFIXES


def read_gates(path: Path) -> list[NDArray[np.float32]]:
    """Read gate_weights.pt: {layer: [E, D]}. Returns one float32 [E, D] per layer.

    Raises UserError when it is anything else, or a weight is not finite.
    """
    gates = []
    for layer, value in enumerate(_layers(path)):
        if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind != "f":
            raise _wrong(path, f"layer {layer} is no matrix", "gate_weights.pt: {layer: [E, D]}")
        gates.append(value.astype(np.float32))
        if not np.isfinite(gates[-1]).all():
            raise UserError(
                f"{path} holds NaN or infinite values in layer {layer}. Make the gates again."
            )
    return gates


def read_scores(path: Path) -> NDArray[np.float32]:
    """Read importance_scores.pt: {layer: {cluster: [F]}}. Returns float32 [L, C, F].

    Raises UserError when it is anything else or ragged.
    """
    wanted = "importance_scores.pt: {layer: {cluster: [F]}}"
    rows = []
    for layer, value in enumerate(_layers(path)):
        if not isinstance(value, dict) or sorted(value) != list(range(len(value))) or not value:
            raise _wrong(path, f"layer {layer} has no clusters numbered from 0", wanted)
        rows.append([np.asarray(value[cluster]) for cluster in range(len(value))])
    if len({row.shape for layer in rows for row in layer}) != 1 or len({*map(len, rows)}) != 1:
        raise _wrong(path, "its scores differ in length or number", wanted)
    return np.array(rows, np.float32)


def read_indices(path: Path, *, width: int) -> NeuronSplit:
    """Read neuron_indices.pt: {layer: lists} or {layer: {"residual": list, expert: list}}.

    `width` is F. What is called residual becomes one shared expert. Raises UserError when the file
    is anything else, or its neurons are none of 0..F-1.
    """
    wanted = 'neuron_indices.pt: {layer: lists of neurons} or {layer: {"residual": ..., 0: ...}}'
    experts: list[list[NDArray[np.int64]]] = []
    shared: list[list[NDArray[np.int64]]] = []
    for layer, value in enumerate(_layers(path)):
        always: list[Any] = []
        if isinstance(value, dict):
            if "residual" in value:
                always = [value["residual"]]
            routed = {key: ids for key, ids in value.items() if key != "residual"}
            if sorted(routed, key=str) != sorted(range(len(routed)), key=str):
                raise _wrong(path, f"the experts of layer {layer} are not 0, 1, ...", wanted)
            value = [routed[expert] for expert in range(len(routed))]
        if not isinstance(value, list) or not value:
            raise _wrong(path, f"layer {layer} holds no experts", wanted)
        groups = [np.asarray(ids) for ids in [*value, *always]]
        if any(ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu") for ids in groups):
            raise _wrong(path, f"layer {layer} holds something else than whole numbers", wanted)
        experts.append([ids.astype(np.int64) for ids in groups[: len(value)]])
        shared.append([ids.astype(np.int64) for ids in groups[len(value) :]])
    return NeuronSplit(experts, shared, width, {"method": "imported", "imported_from": str(path)})


def read_distribution(path: Path) -> list[dict[str, dict[str, NDArray[np.float64]]]]:
    """Read distribution.pt: {layer: {"attn", "mlp": {"number", "mean" [D], "variance" [D]}}}.

    Raises UserError when it is anything else, or a value is not finite or a variance negative.
    """
    wanted = "distribution.pt: {layer: {attn, mlp: {number, mean [D], variance [D]}}}"
    layers = []
    for layer, value in enumerate(_layers(path)):
        found: dict[str, dict[str, NDArray[np.float64]]] = {}
        for part in ("attn", "mlp"):
            held = value.get(part) if isinstance(value, dict) else None
            if not isinstance(held, dict) or not {"number", "mean", "variance"} <= held.keys():
                raise _wrong(path, f"layer {layer} has no number, mean, variance of {part}", wanted)
            try:
                found[part] = {name: np.asarray(held[name], np.float64) for name in _MOMENTS}
            except (TypeError, ValueError):
                raise _wrong(path, f"{part} of layer {layer} holds no numbers", wanted) from None
            number, mean_D, variance_D = found[part].values()
            if number.ndim or mean_D.ndim != 1 or mean_D.shape != variance_D.shape:
                raise _wrong(path, f"{part} of layer {layer} is of another shape", wanted)
            if not np.isfinite([*mean_D, *variance_D]).all() or (variance_D < 0).any():
                raise _wrong(path, f"{part} of layer {layer} is not finite or negative", wanted)
        layers.append(found)
    return layers


def open_split(path: Path, *, width: int) -> NeuronSplit:
    """Read a split that was made before: ours, or the original's neuron_indices.pt; `width` is F.

    Raises UserError as `NeuronSplit.load` and `read_indices` do.
    """
    return read_indices(path, width=width) if is_original(path) else NeuronSplit.load(path)


def _layers(path: Path) -> list[Any]:
    value = read_plain(Path(path))
    if (
        not isinstance(value, dict)
        or not value
        or sorted(value, key=str) != sorted(range(len(value)), key=str)
    ):
        raise _wrong(Path(path), f"it holds a {type(value).__name__}", "a dict over layers 0, 1, …")
    return [value[layer] for layer in range(len(value))]


def _wrong(path: Path, found: str, wanted: str) -> UserError:
    return UserError(f"{path} does not fit: {found}. Give the original's {wanted}.")
