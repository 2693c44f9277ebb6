"""Attention to experts: a dense LLaMA's, or an MLP mixture's, query groups behind a router.

Source: LLaMA-MoE-v2 (arXiv 2411.15708), convert_to_mixtral_attn_moe. An expert is one key/value
head with the query heads that read it; with more experts than such heads, the query heads are dealt
on and the key/value head is repeated. Tensors are taken over one by one.

Notation: E attention experts, D hidden size, H query heads, G key/value heads, d head size. Expert
e has rows [e*H*d/E, (e+1)*H*d/E) of q_proj, the same columns of o_proj, and rows of key/value head
e // (E/G).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from moesaic.construct.blueprint_v2 import check_v2_source, v2_config
from moesaic.construct.dense import all_finite, open_dense
from moesaic.construct.routers.kaiming import kaiming
from moesaic.core.console import note, track
from moesaic.core.errors import MoesaicError, UserError, check_seed
from moesaic.core.files import check_step, output_directory, write_text
from moesaic.core.lineage import write_lineage
from moesaic.models.checkpoint import Checkpoint, CheckpointWriter, copy_companions
from moesaic.models.writer import Planned

__all__ = ["attention", "open_v2"]

_PROJECTION = re.compile(r"(.*self_attn\.)([qkvo])_proj\.weight$")
_DENSE_MLP = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def attention(
    model: Path | str,
    *,
    out: Path | str,
    top_k: int,
    experts: int | None = None,
    scale: float | None = None,
    seed: int = 0,
    verify: bool = True,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Turn the attention of a dense LLaMA or of a LLaMA-MoE-v2 into experts.

    Args:
        model: a dense LLaMA or Mistral (its MLPs stay dense), or a LLaMA-MoE-v2 of ours or of the
            original's, whose MLPs stay as they are.
        out: the directory that appears when everything is written and compared.
        top_k: attention experts of a token.
        experts: attention experts; a multiple of the key/value heads that divides the query heads.
            The key/value heads by default.
        scale: factor on the experts' weighted sum; `experts / top_k` by default.
        seed: of the routers, drawn as new linear layers are (the original's).
        verify: compare with `model`: all attention experts on, and equal, must give its logits.
        overwrite: replace `out` when it is there.
        max_shard_bytes: size at which a new weight file starts.

    Raises UserError for another kind of model, attention that is experts already, and numbers that
    do not fit; MoesaicError when the result is not the model it was made from.
    """
    check_seed(seed)
    model = Path(model)
    out = check_step(out, overwrite=overwrite, inputs=[model])
    checkpoint, config = _source(model)
    given = checkpoint.config
    heads = given["num_attention_heads"]
    groups = given.get("num_key_value_heads") or heads
    experts = groups if experts is None else experts
    _check(experts, top_k, scale, heads, groups)
    config |= {
        "use_attn_moe": True,
        "attn_experts": experts,
        "top_k_attn": top_k,
        "scale_factor_attn": experts / top_k if scale is None else scale,
    }
    plan = [item for name in checkpoint.keys() for item in _planned(checkpoint, name, experts)]  # noqa: SIM118 - no dict
    facts: dict[str, Any] = {"attention_experts": experts, "top_k_attn": top_k}
    with output_directory(out, overwrite=overwrite) as partial:
        generator = torch.Generator().manual_seed(seed)
        with CheckpointWriter(partial, plan, max_shard_bytes=max_shard_bytes) as writer:
            names = sorted(checkpoint.keys(), key=_in_order)
            for name in track(names, "converting attention"):
                tensor = checkpoint.read(name)
                if not all_finite(tensor):
                    raise UserError(
                        f"{model}: {name} holds NaN or infinite values. Repair the checkpoint."
                    )
                parts = _parts(name, tensor, experts, groups, heads, generator)
                for part_name, part in parts:
                    writer.write(part_name, part)
                checkpoint.release([name])
        write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
        copy_companions(model, partial)
        if verify:
            facts |= _compare(model, partial)
        else:
            note("not compared with the model; moesaic.json says exact: false")
            facts |= {"exact": False, "difference": None}
        settings = {
            "experts": experts,
            "top_k": top_k,
            "scale": config["scale_factor_attn"],
            "verify": verify,
        }
        write_lineage(
            partial, step="attention", parent=str(model), config=settings, seed=seed, **facts
        )
    return out


def open_v2(model: Path) -> tuple[Checkpoint, dict[str, Any] | None]:
    """A checkpoint, and its config as ours where it is a LLaMA-MoE-v2 (ours or the original's)."""
    from moesaic.models.families.llama_moe_v2 import LlamaMoEV2Config, read, recognises

    checkpoint = Checkpoint(model)
    given = checkpoint.config
    ours = given.get("model_type") == "llama_moe_v2"
    if not ours and not recognises(given):
        return checkpoint, None
    fields = {k: v for k, v in (given if ours else read(given)).items() if k != "model_type"}
    named = str((given.get("architectures") or ["ForCausalLM"])[0])
    _, inside, head = named.rpartition("For")
    return checkpoint, {
        **LlamaMoEV2Config(**fields).to_diff_dict(),
        "architectures": [f"LlamaMoEV2For{head}" if inside else "LlamaMoEV2Model"],
        "model_type": "llama_moe_v2",
    }


def _source(model: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint, and the config of the LLaMA-MoE-v2 that it is or becomes."""
    checkpoint, config = open_v2(model)
    if config is not None:
        if config.get("use_attn_moe"):
            raise UserError(
                f"{model} has attention experts already ({config.get('attn_experts')}). Give the "
                "model they were made from."
            )
        if config.get("add_rescale_bias"):
            raise UserError(
                f"{model} was aligned, and attention experts need alignment too. Make them from "
                "the model before `moesaic align`."
            )
        return checkpoint, config
    dense = open_dense(model)
    check_v2_source(dense)
    return checkpoint, v2_config(dense) | {
        "intermediate_size": dense.width,
        "intermediate_size_dense": dense.width,
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        # From both ends to the middle: no layer is left for MLP experts.
        "num_moe_contract_layers": (dense.layers + 1) // 2,
        "scale_factor": 1.0,
    }


def _check(experts: int, top_k: int, scale: float | None, heads: int, groups: int) -> None:
    if experts < 1 or experts % groups or heads % experts:
        fitting = [n for n in range(groups, heads + 1, groups) if heads % n == 0]
        raise UserError(
            f"experts={experts} does not fit {heads} query heads and {groups} key/value heads. "
            f"Give one of: {', '.join(map(str, fitting))}."
        )
    if not 1 <= top_k <= experts:
        raise UserError(f"top_k={top_k} but attention has {experts} experts. Give 1 to {experts}.")
    if scale is not None and not 0 < scale < float("inf"):
        raise UserError(f"scale={scale} was given. Use a positive number.")


def _in_order(name: str) -> tuple[int, str]:
    layer = re.search(r"layers\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1, name)


def _planned(checkpoint: Checkpoint, name: str, experts: int) -> Iterator[Planned]:
    dtype, shape = checkpoint.dtype(name), checkpoint.shape(name)
    found = _PROJECTION.match(name)
    if found is None:
        renamed = _renamed(name)
        if renamed is not None:
            yield renamed, dtype, shape
        return
    start, kind = found.groups()
    if kind == "q":
        yield f"{start}gate.weight", dtype, (experts, shape[1])
    config: Mapping[str, Any] = checkpoint.config
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    for expert in range(experts):
        match kind:
            case "q":
                part = (shape[0] // experts, shape[1])
            case "o":
                part = (shape[0], shape[1] // experts)
            case _:
                part = (shape[0] // groups, shape[1])
        yield f"{start}{kind}_proj.{expert}.weight", dtype, part


def _parts(
    name: str,
    tensor: torch.Tensor,
    experts: int,
    groups: int,
    heads: int,
    generator: torch.Generator,
) -> Iterator[tuple[str, torch.Tensor]]:
    found = _PROJECTION.match(name)
    if found is None:
        renamed = _renamed(name)
        if renamed is not None:
            yield renamed, tensor
        return
    start, kind = found.groups()
    if kind == "q":
        gate_ED = kaiming(experts, tensor.shape[1], generator=generator)
        yield f"{start}gate.weight", gate_ED.to(tensor.dtype)
    if kind in "kv":
        shared = tensor.chunk(groups)
        parts = [shared[expert // (experts // groups)] for expert in range(experts)]
    else:
        parts = list(tensor.chunk(experts, dim=1 if kind == "o" else 0))
    for expert, part in enumerate(parts):
        yield f"{start}{kind}_proj.{expert}.weight", part


def _renamed(name: str) -> str | None:
    """The name in the result of a tensor that stays: LLaMA's MLPs are called w1, w3 and w2."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    start, inside, rest = name.rpartition(".mlp.")
    kind = rest.removesuffix(".weight")
    return f"{start}.block_sparse_moe.{_DENSE_MLP[kind]}.weight" if inside else name


def _compare(model: Path, partial: Path) -> dict[str, Any]:
    from moesaic.measure.exactness import attention_difference, is_exact

    difference, largest = attention_difference(model, partial)
    if not is_exact(difference, largest):
        raise MoesaicError(
            f"All attention experts on differ from {model} by {difference:.3g} (largest value "
            f"{largest:.3g}). Nothing was written; please report this."
        )
    return {"exact": True, "difference": difference, "largest_value": largest}
