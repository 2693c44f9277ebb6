"""Distribution alignment: give every mixture layer the output mean and variance of its dense layer.

Source: LLaMA-MoE-v2 (arXiv 2411.15708), get_hidden_distribution and align_converted_model. Layer by
layer, attention experts first, then MLP experts: per channel, m = sqrt(var_dense / var_mixture)
multiplies the rows of every expert's output matrix, and a bias b is added to each expert. Experts
are weighted by w_k * s that sum to the scale factor s, so what arrives is m * y + s * b, and b =
(mean_dense - m * mean_mixture) / s. Later layers see earlier ones aligned. Dense model and mixture
run side by side, one layer of each in memory.

Notation: B rows, C tokens a row, T real tokens, D hidden size, E experts, L layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.construct.activations import LayerStream, text_sample
from moesaic.construct.attention import open_v2
from moesaic.construct.dense import DenseModel, open_dense
from moesaic.construct.legacy_v2 import read_distribution
from moesaic.core.console import track
from moesaic.core.errors import UserError
from moesaic.core.files import check_step, output_directory, write_text
from moesaic.core.lineage import write_lineage
from moesaic.models.checkpoint import Checkpoint, CheckpointWriter, copy_companions
from moesaic.models.writer import Planned

__all__ = ["Correction", "Moments", "align", "corrections", "moments"]

_ROWS = 8
_SCALED = re.compile(
    r".*layers\.(\d+)\.(?:(block_sparse_moe\.experts\.\d+\.w2|mlp_residual\.w2)"
    r"|(self_attn\.o_proj\.\d+))\.weight$"
)


@dataclass(frozen=True)
class Moments:
    """Mean and variance of a layer's output, per channel: [D] each, over `number` tokens."""

    number: int
    mean_D: torch.Tensor
    variance_D: torch.Tensor


@dataclass(frozen=True)
class Correction:
    """What aligns one block: its output matrices' rows times `scale_D`, each expert plus `bias_D`.

    What arrives is y * scale_D + factor * bias_D, `factor` being the block's scale factor.
    """

    scale_D: torch.Tensor
    bias_D: torch.Tensor


def moments(values_TD: torch.Tensor) -> Moments:
    """Mean and variance (N - 1 in the denominator) of values [T, D], taken in float64."""
    wide_TD = values_TD.double()
    return Moments(len(wide_TD), wide_TD.mean(0), wide_TD.var(0))


def correct(wanted: Moments, given: Moments, *, factor: float, original: bool) -> Correction:
    """The correction that gives `given` the moments of `wanted`; a constant channel is moved only.

    With `original` the bias is not divided by `factor`, as in the original, which is right for a
    factor of 1 only.
    """
    ratio_D = (wanted.variance_D / given.variance_D.clamp(min=1e-30)).sqrt()
    scale_D = torch.where(given.variance_D > 0, ratio_D, torch.ones_like(ratio_D))
    bias_D = wanted.mean_D - given.mean_D * scale_D
    return Correction(scale_D.float(), (bias_D / (1 if original else factor)).float())


@torch.inference_mode()
def corrections(
    dense: DenseModel,
    checkpoint: Checkpoint,
    config: Any,
    ids_BC: torch.Tensor,
    real_BC: torch.Tensor | None = None,
    *,
    original: bool = False,
    known: Sequence[dict[str, Moments]] | None = None,
) -> Iterator[tuple[dict[str, Moments], dict[str, Correction]]]:
    """Yield, for every layer, the dense moments and the mixture's corrections: "attn" and "mlp".

    `config` is the mixture's LlamaMoEV2Config. `real_BC` is False at padding, which must be on the
    right. Blocks without experts have no correction. `known` are the dense moments of all layers,
    where they were measured before.
    """
    stream = LayerStream(dense, context=ids_BC.shape[1])
    real_BC = torch.ones_like(ids_BC, dtype=torch.bool) if real_BC is None else real_BC.bool()
    tables = stream._rotary(torch.empty(1, 1, dense.hidden), stream._positions)
    mixed_BCD = stream.embed(ids_BC)
    dense_BCD = mixed_BCD.clone()
    for layer in range(dense.layers):
        if known is None:
            wanted = _dense_moments(stream, layer, dense_BCD, real_BC)
        else:
            wanted = known[layer]
        mixture: Any = _load_layer(checkpoint, config, layer)
        found: dict[str, Correction] = {}
        parts = [
            mixture.self_attn(
                hidden_states=mixture.input_layernorm(rows),
                position_embeddings=tables,
                **({} if config.use_attn_moe else {"attention_mask": None}),
            )[0]
            for rows in mixed_BCD.split(_ROWS)
        ]
        out_BCD = torch.cat(parts)
        if config.use_attn_moe:
            factor = float(config.scale_factor_attn or 1)
            found["attn"] = correct(
                wanted["attn"], moments(out_BCD[real_BC]), factor=factor, original=original
            )
            out_BCD = out_BCD * found["attn"].scale_D + factor * found["attn"].bias_D
        mixed_BCD += out_BCD
        parts = []
        for rows in mixed_BCD.split(_ROWS):
            normed = mixture.post_attention_layernorm(rows)
            out = mixture.block_sparse_moe(normed)
            out = out[0] if mixture.is_moe else out
            parts.append(
                out if mixture.mlp_residual is None else out + mixture.mlp_residual(normed)
            )
        out_BCD = torch.cat(parts)
        if mixture.is_moe:
            factor = float(config.scale_factor or 1)
            found["mlp"] = correct(
                wanted["mlp"], moments(out_BCD[real_BC]), factor=factor, original=original
            )
            out_BCD = out_BCD * found["mlp"].scale_D + factor * found["mlp"].bias_D
        mixed_BCD += out_BCD
        yield wanted, found


def _dense_moments(
    stream: LayerStream, layer: int, dense_BCD: torch.Tensor, real_BC: torch.Tensor
) -> dict[str, Moments]:
    """Moments of what a dense layer's two halves add; the stream is moved past it in place."""
    module: Any = stream.load(layer)
    before_BCD = dense_BCD.clone()
    for rows in dense_BCD.split(_ROWS):
        rows.copy_(stream.block(module, rows)[0])
    attention = moments((dense_BCD - before_BCD)[real_BC])
    before_BCD = dense_BCD.clone()
    for rows in dense_BCD.split(_ROWS):
        rows += module.mlp(module.post_attention_layernorm(rows))
    return {"attn": attention, "mlp": moments((dense_BCD - before_BCD)[real_BC])}


def align(
    model: Path | str,
    *,
    reference: Path | str,
    out: Path | str,
    data: Any,
    tokens: int = 65_536,
    context: int = 512,
    original: bool = False,
    distribution: Path | str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Align a LLaMA-MoE-v2 with the dense model it was made of, on text.

    `distribution` is the original's distribution.pt: the dense moments, which are otherwise
    measured on the text. Beside a residual MLP the sum of both is aligned, and its rows are scaled
    too. `original` leaves the bias undivided by the scale factor, as the original program does. The
    directory also holds distribution.safetensors: the dense moments and the corrections.

    Raises UserError when either model is of another kind, they do not belong together, or the text
    is shorter than a row.
    """
    from moesaic.models.families.llama_moe_v2 import LlamaMoEV2Config

    model, reference = Path(model), Path(reference)
    out = check_step(out, overwrite=overwrite, inputs=[model, reference, data, distribution])
    checkpoint, fields = open_v2(model)
    if fields is None:
        raise UserError(
            f"{model} is of type {checkpoint.config.get('model_type')!r}. Give a LLaMA-MoE-v2: "
            "`moesaic convert --preset llama-moe-v2`."
        )
    config = LlamaMoEV2Config(**{k: v for k, v in fields.items() if k != "model_type"})
    if config.add_rescale_bias:
        raise UserError(f"{model} is aligned already. Give the model before that.")
    dense = open_dense(reference)
    sizes = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
    for name in sizes:
        if getattr(config, name) != dense.config[name]:
            raise UserError(
                f"{reference} has {name}={dense.config[name]}, {model} {getattr(config, name)}. "
                "Give the dense model that the mixture was made of."
            )
    known = None if distribution is None else _known(Path(distribution), dense)
    ids_BC = text_sample(reference, data, tokens=tokens, context=context)
    if config.sliding_window is not None and ids_BC.shape[1] > config.sliding_window:
        raise UserError(
            f"context={context} is longer than the sliding window of {config.sliding_window}. "
            "Lower context."
        )
    measured = list(
        track(
            corrections(dense, checkpoint, config, ids_BC, original=original, known=known),
            "aligning layers",
            total=dense.layers,
        )
    )
    found = [correction for _, correction in measured]
    with output_directory(out, overwrite=overwrite) as partial:
        _write(checkpoint, config, found, partial, max_shard_bytes)
        changed = {**fields, "add_rescale_bias": True}
        write_text(partial / "config.json", json.dumps(changed, indent=2) + "\n")
        copy_companions(model, partial)
        _keep(measured, partial)
        write_lineage(
            partial,
            step="align",
            parent=str(model),
            config={
                "reference": str(reference),
                "data": str(data),
                "tokens": ids_BC.numel(),
                "context": context,
                "original": original,
                "distribution": None if distribution is None else str(distribution),
            },
            seed=None,
        )
    return out


def _known(path: Path, dense: DenseModel) -> list[dict[str, Moments]]:
    """The dense moments of a file. Raises UserError for those of another model."""
    layers = read_distribution(path)
    widths = {part["mean"].shape[0] for layer in layers for part in layer.values()}
    if len(layers) != dense.layers or widths != {dense.hidden}:
        raise UserError(
            f"{path} holds {len(layers)} layers of {', '.join(map(str, sorted(widths)))} channels, "
            f"{dense.checkpoint.path} has {dense.layers} of {dense.hidden}. Give the distribution "
            "of this model."
        )
    return [
        {
            part: Moments(
                int(held["number"]),
                torch.from_numpy(held["mean"]),
                torch.from_numpy(held["variance"]),
            )
            for part, held in layer.items()
        }
        for layer in layers
    ]


def _load_layer(checkpoint: Checkpoint, config: Any, layer: int) -> torch.nn.Module:
    """One decoder layer of a LLaMA-MoE-v2 in float32, from the files' names."""
    from moesaic.models.families.llama_moe_v2 import LlamaMoEV2DecoderLayer

    config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"
    with torch.device("meta"):
        module = LlamaMoEV2DecoderLayer(config, layer)
    mark = f"layers.{layer}."
    start = next(name for name in checkpoint.keys() if mark in name).partition(mark)[0] + mark  # noqa: SIM118 - no dict

    def read(name: str) -> torch.Tensor:
        return checkpoint.read(start + name).float()

    weights: dict[str, torch.Tensor] = {}
    for name in module.state_dict():
        if name == "block_sparse_moe.experts.gate_up_proj":
            halves = [
                torch.cat([read(f"block_sparse_moe.experts.{e}.{w}.weight") for w in ("w1", "w3")])
                for e in range(config.num_local_experts)
            ]
            weights[name] = torch.stack(halves)
        elif name == "block_sparse_moe.experts.down_proj":
            downs = range(config.num_local_experts)
            weights[name] = torch.stack(
                [read(f"block_sparse_moe.experts.{e}.w2.weight") for e in downs]
            )
        elif name.startswith("self_attn.experts."):
            kind = name.rpartition(".")[2]
            weights[name] = torch.stack(
                [read(f"self_attn.{kind}.{e}.weight") for e in range(config.attn_experts)]
            )
        else:
            weights[name] = read(name)
    module.load_state_dict(weights, assign=True, strict=True)
    return module.eval()


def _write(
    checkpoint: Checkpoint,
    config: Any,
    found: list[dict[str, Correction]],
    directory: Path,
    max_shard_bytes: int,
) -> None:
    names = checkpoint.keys()
    plan: list[Planned] = []
    for name in names:
        plan.append((name, checkpoint.dtype(name), checkpoint.shape(name)))
        if _biased(name):
            bias = f"{name.removesuffix('weight')}bias"
            plan.append((bias, checkpoint.dtype(name), checkpoint.shape(name)[:1]))
    with CheckpointWriter(directory, plan, max_shard_bytes=max_shard_bytes) as writer:
        for name in track(names, "writing"):
            tensor = checkpoint.read(name)
            match = _SCALED.match(name)
            if match is not None:
                correction = found[int(match[1])]["mlp" if match[2] else "attn"]
                tensor = (tensor.float() * correction.scale_D[:, None]).to(tensor.dtype)
                if _biased(name):
                    bias = f"{name.removesuffix('weight')}bias"
                    writer.write(bias, correction.bias_D.to(tensor.dtype))
            writer.write(name, tensor)
            checkpoint.release([name])


def _biased(name: str) -> bool:
    return _SCALED.match(name) is not None and "mlp_residual" not in name


def _keep(
    measured: list[tuple[dict[str, Moments], dict[str, Correction]]], directory: Path
) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for layer, (wanted, found) in enumerate(measured):
        for part, values in wanted.items():
            tensors[f"layers.{layer}.{part}.mean"] = values.mean_D.float()
            tensors[f"layers.{layer}.{part}.variance"] = values.variance_D.float()
        for part, correction in found.items():
            tensors[f"layers.{layer}.{part}.scale_magnitude"] = correction.scale_D
            tensors[f"layers.{layer}.{part}.scale_bias"] = correction.bias_D
    number = next(iter(measured[0][0].values())).number
    save_file(tensors, directory / "distribution.safetensors", metadata={"tokens": str(number)})
