"""Run a dense model over text one layer at a time, so that one layer is in memory, never a model.

Notation: B rows of text, C tokens a row, T = B*C tokens, D hidden size, F neurons of a layer.
Everything is float32, on the CPU unless another device is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.construct.dense import DenseModel
from moesaic.core.errors import UserError
from moesaic.models.tokenizer import load_tokenizer

ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class LayerInputs:
    """What the feed-forward part of one layer sees."""

    layer: int
    residual_TD: torch.Tensor
    """The residual stream that the feed-forward output is added to."""
    normed_TD: torch.Tensor
    """The same after the norm: the input of gate_proj and up_proj."""
    module: torch.nn.Module
    """The transformers decoder layer, with `mlp.gate_proj`, `mlp.up_proj`, `mlp.down_proj`."""

    def neurons(self) -> torch.Tensor:
        """The input of down_proj, act(gate_proj x) * up_proj x: [T, F]."""
        mlp: Any = self.module.mlp
        product: torch.Tensor = mlp.act_fn(mlp.gate_proj(self.normed_TD)).mul_(
            mlp.up_proj(self.normed_TD)
        )
        return product


class LayerStream:
    """The layers of a dense model, loaded one by one and applied to hidden states [B, C, D]."""

    def __new__(
        cls, dense: DenseModel, *, context: int, device: torch.device | str = "cpu"
    ) -> LayerStream:
        """A stream of the family's own layers where these are not LLaMA's."""
        del context, device
        if cls is LayerStream and dense.mixture != "llama_moe":
            from moesaic.construct.family_stream import FamilyStream

            return object.__new__(FamilyStream)
        return object.__new__(cls)

    def __init__(
        self, dense: DenseModel, *, context: int, device: torch.device | str = "cpu"
    ) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        fields = {
            k: v for k, v in dense.config.items() if k not in ("model_type", "sliding_window")
        }
        self.config = LlamaConfig(**{**fields, "attn_implementation": "sdpa"})
        self.config.dtype = torch.float32
        self.dense, self.device = dense, torch.device(device)
        self._positions = torch.arange(context, device=device).unsqueeze(0)
        self._rotary = LlamaRotaryEmbedding(self.config).to(device)

    def embed(self, ids_BC: torch.Tensor) -> torch.Tensor:
        """Hidden states before the first layer: [B, C, D]."""
        name = self.dense.outer()[0][0]
        table = self.dense.read(name)
        highest = int(ids_BC.max())
        if highest >= len(table):
            raise UserError(
                f"The tokenizer gives id {highest}, but the model has {len(table)} embeddings. "
                "Tokenizer and weights do not belong together."
            )
        hidden_BCD = table.to(self.device)[ids_BC.to(self.device)].float()
        self.dense.checkpoint.release([name])
        return hidden_BCD

    def load(self, layer: int) -> torch.nn.Module:
        """Return one decoder layer in float32, frozen."""
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        with torch.device("meta"):
            module = LlamaDecoderLayer(self.config, layer)
        start = f"{self.dense.prefix}layers.{layer}."
        biases = self.dense.biases(layer) or ()
        names = [*self.dense.others(layer), *self.dense.ffn(layer), *biases]
        weights = {
            name.removeprefix(start): self.dense.read(name).to(self.device).float()
            for name in names
        }
        module.load_state_dict(weights, assign=True, strict=True)
        self.dense.checkpoint.release(names)
        return module.eval().requires_grad_(False)

    def block(self, module: Any, rows_BCD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Norm, attention, norm: residual stream and feed-forward input [B, C, D], with gradients.

        Rows may be shorter than `context`.
        """
        positions = self._positions[:, : rows_BCD.shape[1]]
        out_BCD, _ = module.self_attn(
            hidden_states=module.input_layernorm(rows_BCD),
            position_embeddings=self._rotary(rows_BCD, positions),
            attention_mask=None,
            position_ids=positions,
        )
        residual_BCD = rows_BCD + out_BCD
        return residual_BCD, self.reads(module, residual_BCD)

    def reads(self, module: Any, residual_BCD: torch.Tensor) -> torch.Tensor:
        """What the feed-forward part of a layer reads of the residual stream, of the same shape."""
        normed_BCD: torch.Tensor = module.post_attention_layernorm(residual_BCD)
        return normed_BCD

    @torch.inference_mode()
    def attend(self, module: Any, hidden_BCD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Norm, attention, norm: the residual stream and the feed-forward input, both [T, D]."""
        residual_BCD, normed_BCD = torch.empty_like(hidden_BCD), torch.empty_like(hidden_BCD)
        for start in range(0, len(hidden_BCD), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            residual_BCD[rows], normed_BCD[rows] = self.block(module, hidden_BCD[rows])
        return residual_BCD.flatten(0, 1), normed_BCD.flatten(0, 1)

    @torch.inference_mode()
    def layers(self, ids_BC: torch.Tensor) -> Iterator[LayerInputs]:
        """Yield what the feed-forward part of every layer of the dense model sees, in order."""
        hidden_BCD = self.embed(ids_BC)
        for layer in range(self.dense.layers):
            module: Any = self.load(layer)
            residual_TD, normed_TD = self.attend(module, hidden_BCD)
            yield LayerInputs(layer, residual_TD, normed_TD, module)
            # In parts: the neurons of all tokens at once are F/D times what is held already.
            step = ROWS_AT_ONCE * ids_BC.shape[1]
            out_TD = torch.cat([module.mlp(part) for part in normed_TD.split(step)])
            hidden_BCD = self.finish(module, residual_TD, out_TD).view_as(hidden_BCD)

    def norm_after(self, layer: int) -> torch.nn.Module:
        """The norm that reads the stream after a layer: the next layer's, or the one at the end."""
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        norm = LlamaRMSNorm(self.dense.hidden, eps=self.config.rms_norm_eps)
        return self._norm_weight(norm, layer)

    def _norm_weight(self, norm: torch.nn.Module, layer: int) -> torch.nn.Module:
        last = layer + 1 == self.dense.layers
        part = "norm" if last else f"layers.{layer + 1}.input_layernorm"
        weight = self.dense.read(f"{self.dense.prefix}{part}.weight").to(self.device).float()
        norm.load_state_dict({"weight": weight}, assign=True)
        return norm.requires_grad_(False)

    def graphs(self) -> bool:
        """Whether `block` does the same whatever the values, so that a CUDA graph can hold it."""
        return self._rotary.rope_type in ("default", "linear", "llama3", "yarn")

    def output_norms(self, module: Any) -> bool:
        """Whether norms lie between what attention and feed-forward part give and the stream."""
        return hasattr(module, "post_feedforward_layernorm")

    def finish(self, module: Any, residual_TD: torch.Tensor, out_TD: torch.Tensor) -> torch.Tensor:
        """The residual stream after the feed-forward part gave `out_TD`."""
        if self.output_norms(module):
            out_TD = module.post_feedforward_layernorm(out_TD)
        return residual_TD + out_TD


def text_sample(model: Path, data: Any, *, tokens: int, context: int) -> torch.Tensor:
    """Token ids [B, C] of real text in the model's own tokens, domains in turn, rows full.

    Raises UserError when the model has no tokenizer or the data are shorter than one row.
    """
    from moesaic.data import calibration_batches

    tokenizer = load_tokenizer(model)
    return torch.cat(list(calibration_batches(data, tokenizer, tokens=tokens, context=context)))
