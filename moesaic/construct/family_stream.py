"""Run any dense family over text one layer at a time, by the family's own code.

transformers' base model is built without its layers' weights and run once with layers that do
nothing but keep what they were given: masks, rotary tables and positions of every layer come from
there. A layer with a feed-forward part of zeros then gives the residual stream, whatever norms the
family puts where.
Notation: B rows of text, C tokens a row, T = B*C tokens, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moesaic.construct.activations import ROWS_AT_ONCE, LayerStream
from moesaic.construct.dense import DenseModel
from moesaic.construct.dense_families import family_model


class GatedMLP(nn.Module):
    """down(act(gate x) * up x): every family's feed-forward layer under the same names."""

    def __init__(self, weights: Mapping[str, torch.Tensor], act_fn: Any) -> None:
        super().__init__()
        for name, weight in weights.items():
            part = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            part.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, part)
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of any leading shape."""
        parts: Any = self
        y: torch.Tensor = parts.down_proj(parts.act_fn(parts.gate_proj(x)) * parts.up_proj(x))
        return y


class FamilyStream(LayerStream):
    """The layers of a dense model of any family of `dense_families`, loaded one by one."""

    def __init__(
        self, dense: DenseModel, *, context: int, device: torch.device | str = "cpu"
    ) -> None:
        self.dense, self.device = dense, torch.device(device)
        self._context = context
        whole = family_model(dense.config).model
        self.config = whole.config
        self.config.dtype = torch.float32
        # soft-capping of scores is eager's alone; there the family asks for it itself
        capped = getattr(self.config, "attn_logit_softcapping", None) is not None
        self.config._attn_implementation = "eager" if capped else "sdpa"
        self._layers, self._norm = whole.layers, whole.norm  # on the meta device
        empty = copy.deepcopy(self.config)
        empty.num_hidden_layers = 0
        if getattr(empty, "layer_types", None) is not None:
            empty.layer_types = []
        with torch.inference_mode(False):  # some rotary tables are made again for longer rows
            base = type(whole)(empty)
            base.rotary_emb = type(base.rotary_emb)(self.config)
        base.config = self.config
        if hasattr(whole, "has_sliding_layers"):  # Qwen and SmolLM count kinds of layers once
            base.has_sliding_layers = whole.has_sliding_layers
        base.norm = nn.Identity()
        base.layers = nn.ModuleList([_Witness(layer) for layer in self._layers])
        self._base: Any = base.eval().to(device)
        self._seen: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        self._embedding: nn.Module | None = None

    def embed(self, ids_BC: torch.Tensor) -> torch.Tensor:
        """Hidden states before the first layer, scaled as the family does: [B, C, D]."""
        super().embed(ids_BC.flatten()[ids_BC.argmax()].view(1, 1))  # refuses ids beyond the table
        if self._embedding is None:
            self._embedding = self._base.embed_tokens
            table = self.dense.read(self.dense.outer()[0][0]).to(self.device).float()
            self._embedding.weight = nn.Parameter(table, requires_grad=False)
        # What the first layer is given: some versions scale in the model, some in the embedding.
        with torch.inference_mode(False), torch.no_grad():
            parts = []
            for rows in ids_BC.split(ROWS_AT_ONCE):
                self._base(input_ids=rows.to(self.device), use_cache=False)
                parts.append(self._base.layers[0].hidden)
        return torch.cat(parts).float()

    def load(self, layer: int) -> nn.Module:
        """Return one decoder layer, frozen, in float32; feed-forward part as gate, up and down."""
        module: Any = copy.deepcopy(self._layers[layer])
        module.mlp = None
        start = f"{self.dense.prefix}layers.{layer}."
        names = self.dense.others(layer)
        weights = {name.removeprefix(start): self._read(name) for name in names}
        module.load_state_dict(weights, assign=True, strict=True)
        parts = zip(("gate_proj", "up_proj", "down_proj"), self.dense.ffn(layer), strict=True)
        ffn = {part: self._read(name) for part, name in parts}
        module.mlp = GatedMLP(ffn, self.dense.activation)
        self.dense.checkpoint.release([*names, *self.dense.ffn(layer)])
        return module.eval().requires_grad_(False)

    def _read(self, name: str) -> torch.Tensor:
        return self.dense.read(name).to(self.device).float()

    def block(self, module: Any, rows_BCD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual stream and feed-forward input [B, C, D], with gradients."""
        mlp, probe = module.mlp, _Probe()
        module.mlp = probe
        try:
            out = module(rows_BCD, **self._given(module.self_attn.layer_idx, rows_BCD))
        finally:
            module.mlp = mlp
        residual_BCD: torch.Tensor = out[0] if isinstance(out, tuple) else out
        assert probe.x is not None
        return residual_BCD, probe.x

    def reads(self, module: Any, residual_BCD: torch.Tensor) -> torch.Tensor:
        """With norms behind both parts, Gemma has one more in front; OLMo2 reads the stream."""
        if not self.output_norms(module):
            return super().reads(module, residual_BCD)
        norm = getattr(module, "pre_feedforward_layernorm", None)
        normed_BCD: torch.Tensor = residual_BCD if norm is None else norm(residual_BCD)
        return normed_BCD

    def norm_after(self, layer: int) -> nn.Module:
        """The norm that reads the stream after a layer; nothing where the family has none there."""
        if layer + 1 == self.dense.layers:
            return self._norm_weight(copy.deepcopy(self._norm), layer)
        norm = getattr(self._layers[layer + 1], "input_layernorm", None)
        return nn.Identity() if norm is None else self._norm_weight(copy.deepcopy(norm), layer)

    def graphs(self) -> bool:
        """No: a family's own code may look at values."""
        return False

    def _given(self, layer: int, rows_BCD: torch.Tensor) -> dict[str, Any]:
        """What the family's model hands to a layer for rows of this shape."""
        key = tuple(rows_BCD.shape[:2])
        if key not in self._seen:
            # for gradients too: nothing kept may be of inference mode
            with torch.inference_mode(False), torch.no_grad():
                self._base(inputs_embeds=rows_BCD.detach(), use_cache=False)
            self._seen = {key: [witness.given for witness in self._base.layers]}
        return self._seen[key][layer]


class _Witness(nn.Module):
    """Stands for a layer: keeps the keyword arguments it is called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.given: dict[str, Any] = {}
        self.hidden: torch.Tensor | None = None
        for name in ("attention_type", "layer_idx"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        self.given, self.hidden = given, hidden_states
        return hidden_states


class _Probe(nn.Module):
    """Stands for the feed-forward part: keeps its input, gives zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.x: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x
        return torch.zeros_like(x)
