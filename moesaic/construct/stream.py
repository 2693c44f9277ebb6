"""The streaming half of a conversion: map a layer, rearrange it, compare it, write it.

Three things go on at once: the disk reads the next layer, this thread rearranges and compares the
present one, a second thread writes the one before. Two sets of buffers alternate, so a conversion
holds two rearranged layers in anonymous memory, whatever the size of the model.
Notation: E experts (shared ones last), D hidden size, F dense neurons, I neurons of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.construct.blueprint import Blueprint
from moesaic.core.console import track
from moesaic.measure.exactness import FeedForward, fixed_tokens, is_exact, layer_difference
from moesaic.models.checkpoint import CheckpointWriter

_SAME_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Rows of down_proj whose columns are picked together: 64 rows of 11008 bf16 stay in a 2 MB cache.
_ROWS = 64


@dataclass(frozen=True)
class Comparison:
    """How far a mixture with all experts on and scores off is from its dense model."""

    kind: Literal["logits", "layers"]
    difference: float
    """Largest absolute difference."""
    largest: float
    """Largest absolute value of the dense outputs."""

    @property
    def exact(self) -> bool:
        """Whether the difference is rounding."""
        return is_exact(self.difference, self.largest)


class _Buffers:
    """Room for one rearranged layer; each expert's tensors are slices of three flat buffers."""

    def __init__(self, neurons: int, hidden: int, dtypes: Sequence[torch.dtype]) -> None:
        self.hidden = hidden
        self._flat = [torch.empty(neurons * hidden, dtype=dtype) for dtype in dtypes]
        self.written: Future[None] | None = None

    def experts(self, widths: Sequence[int]) -> list[FeedForward]:
        """Empty gate [I, D], up [I, D] and down [D, I] of experts of these widths."""
        made: list[FeedForward] = []
        start = 0
        for width in widths:
            gate, up, down = (
                flat[start * self.hidden : (start + width) * self.hidden] for flat in self._flat
            )
            made.append((gate.view(width, -1), up.view(width, -1), down.view(-1, width)))
            start += width
        return made


class _Layer(NamedTuple):
    others: dict[str, torch.Tensor]
    names: list[tuple[str, str, str]]
    experts: list[FeedForward]
    router: dict[str, torch.Tensor]


def write_experts(
    blueprint: Blueprint, directory: Path, *, compare: bool, max_shard_bytes: int
) -> Comparison | None:
    """Write every tensor of the mixture into shards in `directory`.

    With `compare`, each layer's experts, summed, are compared with the dense layer on 256 fixed
    random tokens; the worst layer is returned. Raises UserError for NaN, MoesaicError for a full
    disk.
    """
    dense = blueprint.dense
    layers = range(dense.layers)
    before, after = dense.outer()
    worst: Comparison | None = None
    widths = [[len(i) for i in _every(blueprint, layer)] for layer in layers]
    dtypes = [dense.checkpoint.dtype(name) for name in dense.ffn(0)]
    buffers = [
        _Buffers(max(map(sum, widths)), dense.hidden, dtypes) for _ in range(min(2, len(layers)))
    ]
    x_TD = fixed_tokens(dense.hidden)
    with (
        CheckpointWriter(directory, blueprint.plan(), max_shard_bytes=max_shard_bytes) as writer,
        ThreadPoolExecutor(1, "write") as writing,
        ThreadPoolExecutor(1, "read ahead") as reading,
    ):
        reading.submit(dense.checkpoint.prefetch, _names(blueprint, 0))
        for name in before:
            writer.write(blueprint.renamed(name), dense.read(name))
        for layer in track(layers, "converting layers"):
            if layer + 1 < len(layers):
                reading.submit(dense.checkpoint.prefetch, _names(blueprint, layer + 1))
            buffer = buffers[layer % len(buffers)]
            if buffer.written is not None:
                buffer.written.result()  # raises what the writing thread met
            source = tuple(dense.read(name) for name in dense.ffn(layer))
            experts = buffer.experts(widths[layer])
            rearrange(source, _every(blueprint, layer), experts)  # type: ignore[arg-type]
            names = list(blueprint.expert_names(layer))
            others = {blueprint.renamed(n): dense.read(n) for n in dense.others(layer)}
            made = _Layer(others, names, experts, blueprint.router_tensors(layer))
            buffer.written = writing.submit(_write, writer, made)
            if compare:
                found = layer_difference(
                    source,  # type: ignore[arg-type]
                    experts,
                    activation=dense.activation,
                    x_TD=x_TD,
                )
                if worst is None or found[0] > worst.difference:
                    worst = Comparison("layers", *found)
            dense.checkpoint.release(dense.ffn(layer))
        for name in after:
            writer.write(blueprint.renamed(name), dense.read(name))
        for buffer in buffers:
            if buffer.written is not None:
                buffer.written.result()
    return worst


def rearrange(
    source: FeedForward, experts: Sequence[NDArray[np.int64]], out: Sequence[FeedForward]
) -> None:
    """Fill the tensors of every expert with its rows of gate and up and its columns of down."""
    gate_FD, up_FD, down_DF = (_bits(tensor) for tensor in source)
    ids = [torch.from_numpy(expert) for expert in experts]
    for expert, (gate_ID, up_ID, _) in zip(ids, out, strict=True):
        torch.index_select(gate_FD, 0, expert, out=_bits(gate_ID))
        torch.index_select(up_FD, 0, expert, out=_bits(up_ID))
    # All experts from one block of rows before the next block: the block stays in the cache.
    for start in range(0, len(down_DF), _ROWS):
        block = down_DF[start : start + _ROWS]
        for expert, (_, _, down_DI) in zip(ids, out, strict=True):
            torch.index_select(block, 1, expert, out=_bits(down_DI)[start : start + _ROWS])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # Moving bits is the same for every type, and torch moves integers faster than bf16.
    return tensor.view(_SAME_WIDTH[tensor.dtype.itemsize])


def _write(writer: CheckpointWriter, layer: _Layer) -> None:
    for name, tensor in {**layer.others, **layer.router}.items():
        writer.write(name, tensor)
    for names, tensors in zip(layer.names, layer.experts, strict=True):
        for name, tensor in zip(names, tensors, strict=True):
            writer.write(name, tensor)


def _names(blueprint: Blueprint, layer: int) -> list[str]:
    return [*blueprint.dense.ffn(layer), *blueprint.dense.others(layer)]


def _every(blueprint: Blueprint, layer: int) -> list[NDArray[np.int64]]:
    return blueprint.split.experts[layer] + blueprint.split.shared[layer]
