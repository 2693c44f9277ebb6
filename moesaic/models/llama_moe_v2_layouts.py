"""How files of LLaMA-MoE-v2 name its experts' tensors, and how they become our parameters.

Three layouts of the routed experts are read (`moe_type`), and written as modulelist, which the
released files have; E experts, I width, D hidden size:

- modulelist: `experts.{e}.w1`, `.w3` (gate, up) [I, D] and `.w2` [D, I], with `.weight`; biases of
  `add_rescale_bias` are `experts.{e}.w2.bias` [D].
- megablocks: `experts.mlp.w1`, `.v1` and `.w2`, all [E*I, D].
- scattermoe: `experts.experts.weight` [E, 2I, D], up rows first, and
  `experts.output_experts.weight` [E, D, I].

Dense MLPs are `block_sparse_moe.w1` (gate), `.w3` (up) and `.w2`; the original's converter leaves
them LLaMA's names (`mlp.gate_proj`, ...), which its own model does not find, and which are read
here too. Attention experts are `self_attn.{q,k,v,o}_proj.{e}`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter


class _Read(ConversionOps):
    """Read a parameter from whichever layout a file has, which the names that are there tell.

    `part`: gate_up [E, 2I, D] (gate rows first), down [E, D, I], or a matrix of a dense MLP.
    """

    def __init__(self, part: Literal["gate_up", "down", "dense"]) -> None:
        self.part = part

    @torch.no_grad()
    def convert(  # type: ignore[override]  # as transformers' own operations do
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        config: Any,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Take {source: [tensor, ...]}; return {target: the parameter}."""
        given = {key.replace("\\", ""): input_dict.pop(key) for key in list(input_dict)}
        named = {
            key.removesuffix(".weight").rpartition("experts.")[2]: v for key, v in given.items()
        }
        if self.part == "dense":
            (whole,) = given.values()
            return {target_patterns[0]: whole[0]}
        if self.part == "gate_up":
            merged = _gate_up(named, config.num_local_experts)
        else:
            merged = _down(named, config.num_local_experts)
        return {target_patterns[0]: merged}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Write(self.part)


def _gate_up(named: dict[str, Any], experts: int) -> torch.Tensor:
    if "experts" in named:
        up, gate = named["experts"][0].chunk(2, dim=1)
        return torch.cat([gate, up], dim=1)
    if "mlp.w1" in named:
        halves = (named[name][0].unflatten(0, (experts, -1)) for name in ("mlp.w1", "mlp.v1"))
        return torch.cat(list(halves), dim=1)
    gates, ups = named["*.w1"], named["*.w3"]
    if len(gates) != len(ups):
        raise ValueError(f"{len(gates)} experts have a w1 and {len(ups)} a w3.")
    width, hidden = gates[0].shape
    merged = gates[0].new_empty(len(gates), 2 * width, hidden)
    for expert in range(len(gates)):
        merged[expert, :width], merged[expert, width:] = gates[expert], ups[expert]
        gates[expert] = ups[expert] = None  # freed one by one: never two copies
    return merged


def _down(named: dict[str, Any], experts: int) -> torch.Tensor:
    if "output_experts" in named:
        down: torch.Tensor = named["output_experts"][0]
        return down
    if "mlp.w2" in named:
        return named["mlp.w2"][0].unflatten(0, (experts, -1)).transpose(1, 2).contiguous()
    return torch.stack(named["*.w2"])


class _Write(ConversionOps):
    """Write a parameter under the names of the modulelist layout, whole keys."""

    def __init__(self, part: Literal["gate_up", "down", "dense"]) -> None:
        self.part = part

    @torch.no_grad()
    def convert(  # type: ignore[override]  # as transformers' own operations do
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Take {source: [the parameter]}; return {whole key: tensor}."""
        (tensors,) = input_dict.values()
        merged = tensors[0] if isinstance(tensors, list) else tensors
        if self.part == "dense":
            return {full_layer_name: merged}
        block = full_layer_name[: full_layer_name.index("experts.")] + "experts."
        if self.part == "down":
            return {f"{block}{e}.w2.weight": w.contiguous() for e, w in enumerate(merged)}
        released = {}
        for expert, gate_up in enumerate(merged):
            for name, half in zip(("w1", "w3"), gate_up.chunk(2), strict=True):
                released[f"{block}{expert}.{name}.weight"] = half.contiguous()
        return released

    @property
    def reverse_op(self) -> ConversionOps:
        return _Read(self.part)


def conversion() -> list[Any]:
    """Conversions between the files' tensor names and ours."""
    mlp, attention = "block_sparse_moe", "self_attn"
    dense = zip(("w1", "w2", "w3"), ("gate_proj", "down_proj", "up_proj"), strict=True)
    return [
        WeightConverter(
            [
                f"{mlp}.experts.*.w1.weight",
                f"{mlp}.experts.*.w3.weight",
                f"{mlp}.experts.mlp.w1",
                f"{mlp}.experts.mlp.v1",
                f"{mlp}.experts.experts.weight",
            ],
            f"{mlp}.experts.gate_up_proj",
            operations=[_Read("gate_up")],
        ),
        WeightConverter(
            [
                f"{mlp}.experts.*.w2.weight",
                f"{mlp}.experts.mlp.w2",
                f"{mlp}.experts.output_experts.weight",
            ],
            f"{mlp}.experts.down_proj",
            operations=[_Read("down")],
        ),
        WeightConverter(
            f"{mlp}.experts.*.w2.bias",
            f"{mlp}.output_bias.weight",
            operations=[MergeModulelist(dim=0)],
        ),
        *(
            WeightConverter(
                f"{attention}.{name}_proj.*.weight",
                f"{attention}.experts.{name}_proj",
                operations=[MergeModulelist(dim=0)],
            )
            for name in "qkvo"
        ),
        WeightConverter(
            f"{attention}.o_proj.*.bias",
            f"{attention}.output_bias.weight",
            operations=[MergeModulelist(dim=0)],
        ),
        *(
            WeightConverter(
                [f"{mlp}.{ours}.weight", f"mlp.{llama}.weight"],
                f"{mlp}.{ours}.weight",
                operations=[_Read("dense")],
            )
            for ours, llama in dense
        ),
    ]
