"""A mixture written layer by layer, while its layers are made.

Names and sizes follow from the first layer; from then on each tensor goes to its place in a shard
by a thread of its own, so that at most two layers wait in memory, whatever the size of the model.
Notation: L layers, E routed experts, D hidden size, P neurons held by a layer's experts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from moesaic.construct.blueprint import Blueprint, draw
from moesaic.construct.dense import DenseModel
from moesaic.construct.layer_maker import LayerWeights
from moesaic.construct.router import RouterInit
from moesaic.construct.split import NeuronSplit
from moesaic.core.files import write_text
from moesaic.models.checkpoint import CheckpointWriter, copy_companions
from moesaic.models.selects import Selects

__all__ = ["MixtureWriter"]


class MixtureWriter:
    """One mixture in one directory; use as a context manager, write the layers in order, then end.

    `ready` is the split of all layers where it is known; else the layers are as wide as the first.
    Raises MoesaicError when the disk is full.
    """

    def __init__(
        self,
        dense: DenseModel,
        directory: Path,
        *,
        selects: Selects,
        fields: Mapping[str, Any],
        ready: NeuronSplit | None,
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        self.dense, self.directory = dense, directory
        self._selects, self._fields, self._ready = selects, fields, ready
        self._limit = max_shard_bytes
        self._blueprint: Blueprint | None = None
        self._writer: CheckpointWriter | None = None
        self._thread = ThreadPoolExecutor(1, "write")
        self._waiting: Future[None] | None = None

    def layer(self, index: int, weights: LayerWeights) -> None:
        """Hand one layer to the writing thread, when that has done with the layer before."""
        if self._blueprint is None:
            self._begin(weights)
        assert self._blueprint is not None
        blueprint, dense = self._blueprint, self.dense
        blueprint.split.experts[index] = weights.parts.experts
        blueprint.split.shared[index] = weights.parts.shared
        blueprint.router.layers[index] = _on_cpu(weights.router)
        taken = dense.others(index)
        tensors = {blueprint.renamed(name): dense.read(name) for name in taken}
        for part, weight in weights.others.items():
            name = f"{dense.prefix}layers.{index}.{part}"
            tensors[blueprint.renamed(name)] = weight.to(dense.checkpoint.dtype(name)).cpu()
        sizes = [len(ids) for ids in blueprint.every(index)]
        dtypes = [dense.checkpoint.dtype(name) for name in dense.ffn(index)]
        gates, ups, downs = (
            whole_PD.to(dtype).cpu().split(sizes)
            for whole_PD, dtype in zip(
                (weights.gate_PD, weights.up_PD, weights.down_PD), dtypes, strict=True
            )
        )
        for names, *parts, down_ID in zip(
            blueprint.expert_names(index), gates, ups, downs, strict=True
        ):
            tensors |= dict(zip(names, [*parts, down_ID.T], strict=True))
        if biases := dense.biases(index):
            tensors |= blueprint.bias_tensors(index, *(dense.read(name) for name in biases))
        tensors |= blueprint.router_tensors(index)
        self._wait()
        self._waiting = self._thread.submit(self._write, tensors, taken)

    def _begin(self, weights: LayerWeights) -> None:
        dense = self.dense
        split = self._ready or NeuronSplit(
            [weights.parts.experts] * dense.layers,
            [weights.parts.shared] * dense.layers,
            dense.width,
        )
        # zeros: the softmax over the one shared expert is 1 whatever they are
        shared = [torch.zeros(1, dense.hidden) if part else None for part in split.shared]
        router = RouterInit([_on_cpu(weights.router)] * dense.layers, shared)
        drawn = draw(dense, split, router, selects=self._selects, scale=1.0, shared_scale=1.0)
        config = {**drawn.config, **_fields(dense, self._fields)}
        self._blueprint = dataclasses.replace(drawn, config=config)
        self.directory.mkdir(parents=True, exist_ok=True)
        write_text(self.directory / "config.json", json.dumps(config, indent=2) + "\n")
        copy_companions(dense.checkpoint.path, self.directory)
        self._writer = CheckpointWriter(
            self.directory, self._blueprint.plan(), max_shard_bytes=self._limit
        )
        self._outside(dense.outer()[0], {})

    def end(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Write what comes after the layers, some of it changed, by the dense model's names."""
        self._wait()
        self._outside(self.dense.outer()[1], changed)

    def _outside(self, names: list[str], changed: Mapping[str, torch.Tensor]) -> None:
        assert self._blueprint is not None
        kept = {name: self.dense.read(name) for name in names}
        kept |= {name: weight.to(kept[name].dtype).cpu() for name, weight in changed.items()}
        self._write({self._blueprint.renamed(name): weight for name, weight in kept.items()}, names)

    def _write(self, tensors: Mapping[str, torch.Tensor], taken: list[str]) -> None:
        assert self._writer is not None
        for name, tensor in tensors.items():
            self._writer.write(name, tensor)
        self.dense.checkpoint.release(taken)

    def _wait(self) -> None:
        if self._waiting is not None:
            self._waiting.result()
            self._waiting = None

    def __enter__(self) -> MixtureWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._wait()
        except BaseException as failure:
            kind = type(failure)
            raise
        finally:
            self._thread.shutdown()
            if self._writer is not None:
                self._writer.__exit__(kind, error, traceback)


def _fields(dense: DenseModel, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A weighting's fields of a LLaMA-MoE config, or what stands for them in a moesaic_moe's."""
    if dense.mixture == "llama_moe":
        return dict(fields)
    corrected = {"one": "learned", "tempered": "tempered"}
    return {
        "weighting": corrected.get(fields.get("gate_weighting", "scores"), "renormalised"),
        "routed_scaling_factor": fields.get("score_scale_factor", 1.0),
    }


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
