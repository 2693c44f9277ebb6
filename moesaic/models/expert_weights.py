"""Loading and saving LLaMA-MoE's experts: the released tensor names and the 3-D parameters.

Released: `<block>.calculator.experts.weight_{gate,up}.{e}` [I_e, D] and `weight_down.{e}` [D, I_e],
where `<block>` is `layers.{l}.mlp`, `layers.{l}.mlp.moe_layer` or `layers.{l}.mlp.residual_block`.
In memory: `gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I], where I is the widest I_e of the
block and narrower experts end in zeros. The zeros are exact: such a neuron gives 0 whatever its
input, and every gradient of its three vectors is 0. With `mlp_bias` there are also
`bias_{gate,up}.{e}` [I_e], in memory `gate_up_proj_bias` [E, 2I], and
`<block>.calculator.bias_down` [D].

transformers' own MergeModulelist reads such keys but writes them back without the layer's prefix,
because they end in the expert's index; hence operations of our own, which write the whole key.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

EXPERTS = "calculator.experts"


class MergeExperts(ConversionOps):
    """Stack each source's experts, padded to the widest, and join the sources along the width."""

    def __init__(self, width_dim: int) -> None:
        self.width_dim = width_dim

    @torch.no_grad()
    def convert(  # type: ignore[override]  # as transformers' own operations do
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Take {source: [tensor of expert 0, ...]}; return {target: the parameter}."""
        groups = [input_dict.pop(pattern, []) for pattern in source_patterns]
        counts = [len(group) for group in groups]
        if len(set(counts)) != 1 or counts[0] == 0:
            raise ValueError(f"{counts} experts under {source_patterns}: they must be as many.")
        width = max(tensor.shape[self.width_dim] for group in groups for tensor in group)
        shape = list(groups[0][0].shape)
        shape[self.width_dim] = width * len(groups)
        even = all(
            tensor.shape[self.width_dim] == width for experts in groups for tensor in experts
        )
        allocate = groups[0][0].new_empty if even else groups[0][0].new_zeros
        merged = allocate((counts[0], *shape))
        for part, group in enumerate(groups):
            for expert in range(counts[0]):
                tensor, group[expert] = group[expert], None  # freed one by one: never two copies
                merged[expert].narrow(
                    self.width_dim, part * width, tensor.shape[self.width_dim]
                ).copy_(tensor)
        return {target_patterns[0]: merged}

    @property
    def reverse_op(self) -> ConversionOps:
        return CutExperts(self.width_dim)


class CutExperts(ConversionOps):
    """Cut a parameter into its experts' tensors, without the padding, under their whole names."""

    def __init__(self, width_dim: int) -> None:
        self.width_dim = width_dim

    @torch.no_grad()
    def convert(  # type: ignore[override]  # as transformers' own operations do
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        config: Any,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Take {source: [the parameter]}; return {whole key: tensor}, as wide as config says."""
        (tensors,) = input_dict.values()
        merged = tensors[0] if isinstance(tensors, list) else tensors
        block = full_layer_name[: full_layer_name.index(EXPERTS)]
        sizes = config.expert_sizes(block)
        width = merged.shape[self.width_dim + 1] // len(target_patterns)
        released = {}
        for part, pattern in enumerate(target_patterns):
            name = pattern.replace("\\", "").rsplit(".", 1)[0]
            for expert, size in enumerate(sizes):
                tensor = merged[expert].narrow(self.width_dim, part * width, size)
                released[f"{block}{name}.{expert}"] = tensor.contiguous()
        return released

    @property
    def reverse_op(self) -> ConversionOps:
        return MergeExperts(self.width_dim)


def layer_of(block: str) -> int:
    """Return the layer's index in a block's name such as `model.layers.3.mlp.`."""
    found = re.search(r"layers\.(\d+)\.", block)
    assert found is not None, block
    return int(found[1])


def released_layout() -> list[WeightConverter]:
    """Tell transformers how LLaMA-MoE's checkpoints name their experts."""
    return [
        WeightConverter(
            [f"{EXPERTS}.weight_gate.*", f"{EXPERTS}.weight_up.*"],
            f"{EXPERTS}.gate_up_proj",
            operations=[MergeExperts(0)],
        ),
        WeightConverter(
            f"{EXPERTS}.weight_down.*",
            f"{EXPERTS}.down_proj",
            operations=[MergeExperts(1)],
        ),
        # last, so that it comes first on saving: 5.17 finds `gate_up_proj` in this name too
        WeightConverter(
            [f"{EXPERTS}.bias_gate.*", f"{EXPERTS}.bias_up.*"],
            f"{EXPERTS}.gate_up_proj_bias",
            operations=[MergeExperts(0)],
        ),
    ]
