"""The streaming half of a conversion: map a layer, rearrange it, compare it, write it.

Four things go on at once: one thread reads the next layer, this one rearranges the present one,
others compare and write it. Two slots of memory alternate, so a conversion holds two layers, as
read and as rearranged, whatever the size of the model.
Notation: E experts (shared ones last), D hidden size, F dense neurons, I neurons of one expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.construct.blueprint import Blueprint
from moesaic.construct.dense import check_finite
from moesaic.core.console import track
from moesaic.measure.exactness import (
    FeedForward,
    begin_layer_difference,
    fixed_tokens,
    is_exact,
)
from moesaic.models.checkpoint import CheckpointWriter
from moesaic.models.direct import Arena

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


class _Slot:
    """Room for one layer: the dense tensors as read, and the experts as they will be written."""

    def __init__(self, neurons: int, hidden: int, dtypes: Sequence[torch.dtype]) -> None:
        self.hidden = hidden
        self.dense = Arena()
        self._flat = [torch.empty(neurons * hidden, dtype=dtype) for dtype in dtypes]
        self.users: list[Callable[[], object]] = []
        """What still looks at this memory; each is called to wait for it."""

    def experts(self, widths: Sequence[int]) -> list[FeedForward]:
        """Empty gate [I, D], up [I, D] and down [D, I] of experts of these widths."""
        made: list[FeedForward] = []
        start = 0
        for width in widths:
            gate, up, down = (
                flat[start * self.hidden : (start + width) * self.hidden] for flat in self._flat
            )
            made.append(FeedForward(gate.view(width, -1), up.view(width, -1), down.view(-1, width)))
            start += width
        return made

    def wait(self) -> None:
        """Wait until the memory is free; raises what its users met."""
        for user in self.users:
            user()
        self.users = []


def write_experts(
    blueprint: Blueprint, directory: Path, *, compare: bool, max_shard_bytes: int
) -> Comparison | None:
    """Write every tensor of the mixture into shards in `directory`.

    With `compare`, each layer's experts, summed, are compared with the dense layer on 256 fixed
    random tokens; the worst layer is returned. Raises UserError for NaN, MoesaicError for a full
    disk.
    """
    dense = blueprint.dense
    count = dense.layers
    before, after = dense.outer()
    widths = [[len(ids) for ids in blueprint.every(layer)] for layer in range(count)]
    dtypes = [dense.checkpoint.dtype(name) for name in dense.ffn(0)]
    slots = [_Slot(max(map(sum, widths)), dense.hidden, dtypes) for _ in range(min(2, count))]
    x_TD = fixed_tokens(dense.hidden)
    found: list[tuple[float, float]] = []
    with (
        one_thread_each() as workers,
        CheckpointWriter(directory, blueprint.plan(), max_shard_bytes=max_shard_bytes) as writer,
        ThreadPoolExecutor(1, "write") as writing,
        ThreadPoolExecutor(1, "read") as reading,
        ThreadPoolExecutor(workers, "compare", torch.set_num_threads, (1,)) as comparing,
    ):

        def read(layer: int) -> Future[dict[str, torch.Tensor]]:
            slot = slots[layer % len(slots)]
            slot.wait()
            names = [*dense.ffn(layer), *(dense.biases(layer) or ()), *dense.others(layer)]
            return reading.submit(dense.checkpoint.fetch, names, slot.dense)

        coming = read(0)
        for name in before:
            writer.write(blueprint.renamed(name), dense.read(name))
        for layer in track(range(count), "converting layers"):
            tensors = coming.result()
            slot = slots[layer % len(slots)]
            for name, tensor in tensors.items():
                check_finite(dense.checkpoint, name, tensor)
            source = FeedForward(*(tensors.pop(name) for name in dense.ffn(layer)))
            experts = slot.experts(widths[layer])
            rearrange(source, blueprint.every(layer), experts)
            small = blueprint.router_tensors(layer)
            if names_of := dense.biases(layer):
                biases = [tensors.pop(name) for name in names_of]
                source = source._replace(gate_bias_F=biases[0], up_bias_F=biases[1])
                arranged = blueprint.bias_tensors(layer, *biases)
                experts = _with_biases(experts, arranged)
                small = arranged | small
            made = {blueprint.renamed(name): tensor for name, tensor in tensors.items()}
            for names, parts in zip(blueprint.expert_names(layer), experts, strict=True):
                made |= dict(zip(names, parts[:3], strict=True))
            made |= small
            slot.users.append(writing.submit(_write, writer, made).result)
            if compare:
                compared = begin_layer_difference(
                    source,
                    experts,
                    activation=dense.activation,
                    x_TD=x_TD,
                    pool=comparing,
                    workers=workers,
                )
                slot.users.append(partial(_keep, found, compared))
            if layer + 1 < count:
                coming = read(layer + 1)  # waits for the layer before, which had that slot
        for slot in slots:
            slot.wait()
        for name in after:
            writer.write(blueprint.renamed(name), dense.read(name))
    return Comparison("layers", *max(found)) if found else None


@contextlib.contextmanager
def one_thread_each() -> Iterator[int]:
    """Let every operation run on one thread, for work that is parallel itself; yield the number.

    Operations that split themselves up wait for one another in a busy loop, which on a machine with
    other work costs several times the work itself.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def rearrange(
    source: FeedForward, experts: Sequence[NDArray[np.int64]], out: Sequence[FeedForward]
) -> None:
    """Fill the tensors of every expert with its rows of gate and up and its columns of down."""
    gate_FD, up_FD, down_DF = (_bits(tensor) for tensor in source[:3])
    ids = [torch.from_numpy(expert) for expert in experts]
    for expert, made in zip(ids, out, strict=True):
        torch.index_select(gate_FD, 0, expert, out=_bits(made.gate_FD))
        torch.index_select(up_FD, 0, expert, out=_bits(made.up_FD))
    # All experts from one block of rows before the next block: the block stays in the cache.
    for start in range(0, len(down_DF), _ROWS):
        block = down_DF[start : start + _ROWS]
        for expert, made in zip(ids, out, strict=True):
            torch.index_select(block, 1, expert, out=_bits(made.down_DF)[start : start + _ROWS])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # Moving bits is the same for every type, and torch moves integers faster than bf16.
    return tensor.view(_SAME_WIDTH[tensor.dtype.itemsize])


def _with_biases(
    experts: list[FeedForward], arranged: dict[str, torch.Tensor]
) -> list[FeedForward]:
    # In `arranged` experts follow one another as in `experts`, for the gate and for the up biases.
    gates = [bias for name, bias in arranged.items() if ".bias_gate." in name]
    ups = [bias for name, bias in arranged.items() if ".bias_up." in name]
    return [
        expert._replace(gate_bias_F=gate, up_bias_F=up)
        for expert, gate, up in zip(experts, gates, ups, strict=True)
    ]


def _write(writer: CheckpointWriter, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        writer.write(name, tensor)


def _keep(found: list[tuple[float, float]], compared: Callable[[], tuple[float, float]]) -> None:
    found.append(compared())
