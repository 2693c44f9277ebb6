"""Foretell what a model, a construction or a training run takes, before anything is made.

A file says by its keys which of the three it is: `model_type` a new model, `experts` a
construction, `data` and `tokens` or `steps` a training run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from moesaic.construct.dense_families import FAMILIES, DenseFamily, known_family
from moesaic.construct.free.view import CalibratedRouter, CalibratedSplit
from moesaic.construct.method import check_division
from moesaic.construct.recipe import Recipe, made_before, refinement
from moesaic.construct.routers import ROUTERS
from moesaic.construct.scratch import InitConfig, empty_model, model_config
from moesaic.construct.splits import SPLITS
from moesaic.construct.splits.energy import K_MEANS_ROUNDS, Energy
from moesaic.core.config import load, override, parse, read_yaml
from moesaic.core.errors import UserError, nearest
from moesaic.models.anatomy import build
from moesaic.models.catalog import aliases, find
from moesaic.plan.construction import Construction, Look
from moesaic.plan.machine import Machine
from moesaic.plan.sizes import Sizes, sizes
from moesaic.recipes import Kind, locate, recipes
from moesaic.training.config import TrainConfig

__all__ = ["Plan", "plan"]

_K_MEANS = 10
"""Rounds of a k-means of the weights."""
_TYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
_KINDS: tuple[Kind, ...] = ("train", "init", "construct")


@dataclass(frozen=True)
class Plan:
    """What is foretold."""

    what: str
    kind: Literal["model", "construct", "train"]
    architecture: str
    parameters: int
    active: int
    parts: dict[str, int]
    """Parameters by part."""
    memory: dict[str, dict[str, int]]
    """Bytes by use and part."""
    peak: dict[str, int]
    """Bytes by use, at the worst moment."""
    seconds: dict[str, dict[str, float]]
    """Seconds by use and stage."""
    machine: Machine
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def plan(
    what: Path | str,
    *,
    machine: Machine,
    model: Path | str | None = None,
    batch: int = 1,
    context: int = 4096,
    overrides: Sequence[str] = (),
) -> Plan:
    """Foretell memory and time of a YAML file, a shipped recipe or preset, or a model.

    `model` takes the place of the file's. `batch` and `context` are those of running a model.
    Raises UserError for a name that is nothing of this, and for a file that describes nothing.
    """
    kind, source = _identify(what)
    if kind == "train":
        return _train(what, load(TrainConfig, source, overrides=overrides), machine, model)
    if kind == "construct":
        given = override(read_yaml(source), overrides)
        recipe = parse(Recipe, given, source=str(source))
        return _construct(what, recipe, machine, model)
    if kind == "init":
        preset = load(InitConfig, source, overrides=overrides)
        return _model(what, _shape(preset), _TYPES[preset.dtype], machine, batch, context)
    if overrides:
        raise UserError(f"--set changes keys of a file, but {what} is a model. Leave it out.")
    return _model(what, *_any_model(what), machine, batch, context)


def _identify(what: Path | str) -> tuple[Kind | None, Path]:
    """The kind and file of a recipe or YAML file; None for a model."""
    path = Path(what)
    if path.suffix not in (".yaml", ".yml"):
        if any(str(what) in recipes(kind) for kind in _KINDS):
            return locate(str(what))
        if not path.exists() and "/" not in str(what) and str(what) not in aliases():
            names = [name for kind in _KINDS for name in recipes(kind)] + list(aliases())
            raise UserError(
                f"{what} is no file, recipe, preset, model directory or alias."
                f"{nearest(str(what), names)} `moesaic recipe list` shows what there is."
            )
        return None, path
    keys = read_yaml(path)
    marks: Mapping[Kind, str] = {"init": "model_type", "construct": "experts", "train": "data"}
    for kind, mark in marks.items():
        if mark in keys and not (kind == "construct" and "batch" in keys):
            return kind, path
    raise UserError(
        f"{path} has none of the keys model_type (a new model), experts (a construction) or data "
        "(a training run). Give a file of one of these kinds."
    )


def _shape(preset: InitConfig) -> Any:
    return empty_model(model_config(preset))


def _model(
    what: Path | str, shape: Any, itemsize: int, machine: Machine, batch: int, context: int
) -> Plan:
    found = sizes(shape)
    running = found.running(batch=batch, context=context, itemsize=itemsize)
    training = found.training(batch=1, context=context, precision="mixed", recompute=True)
    # A token alone reads every active weight once; many tokens at a time are products.
    decode = max(found.active * itemsize / machine.memory_rate, 2 * found.active / machine.model)
    use, step = f"run, {batch} x {context} tokens", f"train, 1 x {context} tokens at a time"
    return Plan(
        what=str(what),
        kind="model",
        memory={use: running, step: training},
        peak={use: sum(running.values()), step: sum(training.values())},
        seconds={
            "run": {
                "a text's next token": decode,
                f"a prompt of {context} tokens": 2 * found.active * context / machine.model,
            },
            "train": {"a million tokens": 8e6 * found.active / machine.model},
        },
        machine=machine,
        notes=["training: float32 weights and AdamW, activations recomputed"],
        **_counts(found),
    )


def _train(
    what: Path | str, config: TrainConfig, machine: Machine, model: Path | str | None
) -> Plan:
    model = model or config.model
    if model is None:
        raise UserError(f"{what} names no model. Give one with --model.")
    found = sizes(_any_model(model)[0])
    precision: Any = config.precision
    if precision == "auto":
        precision = "fp32" if machine.model == machine.float32 else "mixed"
    recompute = config.gradient_checkpointing
    length, micro = config.data.block_size, config.batch.size
    memory = found.training(batch=micro, context=length, precision=precision, recompute=recompute)
    per_step = config.batch.sequences * length
    steps = config.steps or (config.tokens or 0) // per_step
    rate = machine.model if precision != "fp32" else machine.float32
    operations = (8 if recompute else 6) * found.active * steps * per_step
    seconds = {"forward and backward": operations / rate}
    if config.distill is not None:
        teacher = sizes(_any_model(config.distill.model)[0])
        memory |= teacher.teaching(batch=micro, context=length, precision=precision)
        seconds["teacher's forward"] = 2 * teacher.active * steps * per_step / rate
    use = f"train, {micro} x {length} tokens at a time"
    return Plan(
        what=str(what),
        kind="train",
        memory={use: memory},
        peak={use: sum(memory.values())},
        seconds={f"train, {steps:,} steps": seconds},
        machine=machine,
        notes=[
            "one device at the rate of large products, which small models do not reach; evaluation "
            "and data not counted"
        ],
        **_counts(found),
    )


def _construct(
    what: Path | str, recipe: Recipe, machine: Machine, model: Path | str | None
) -> Plan:
    model = model or recipe.model
    if model is None:
        raise UserError(f"{what} names no model. Give one with --model.")
    dense, itemsize = _any_model(model)
    shape = dense.config
    family = known_family(shape.to_dict())
    if family is None:
        raise UserError(
            f"{model} is of type {shape.model_type!r}, not a dense model that experts are made of. "
            f"Plan the construction of one of: {', '.join(sorted(FAMILIES))}."
        )
    mixture = sizes(_mixture(shape, family, recipe))
    attention = sum(
        parameter.numel()
        for name, parameter in dense.named_parameters()
        if ".layers.0.self_attn." in name
    )
    work = Construction(
        hidden=shape.hidden_size,
        width=shape.intermediate_size,
        layers=shape.num_hidden_layers,
        attention=attention,
        vocabulary=shape.vocab_size,
        experts=recipe.experts,
        itemsize=itemsize,
        total=mixture.total,
        split=_look(SPLITS, recipe.split),
        router=_look(ROUTERS, recipe.router),
        refit=recipe.refit is not None,
        attention_refit=recipe.attention is not None,
        maps=recipe.maps and recipe.refit is not None,
        refine=_refined(recipe, machine),
        active=recipe.top_k / recipe.experts,
        distilled=1.0 if machine.gpu else recipe.top_k / recipe.experts,
        tokens=recipe.tokens,
        context=recipe.context,
        priced=_priced(recipe),
    )
    running = mixture.running(batch=1, context=4096)
    memory = {
        f"construct, {moment}": parts for moment, parts in work.memory(gpu=machine.gpu).items()
    }
    memory["convert --split random"] = work.convert_memory()
    memory["run, 1 x 4096 tokens"] = running
    converting = work.convert()
    return Plan(
        what=str(what),
        kind="construct",
        memory=memory,
        peak={use: sum(parts.values()) for use, parts in memory.items()},
        seconds={
            "construct": {stage.name: stage.seconds(machine) for stage in work.stages()},
            "construct, one layer": {s.name: s.seconds(machine) for s in work.one_layer().stages()},
            "convert --split random": {"all": converting.seconds(machine)},
        },
        machine=machine,
        notes=[
            f"{work.tokens:,} calibration tokens",
            "layers are made one by one: memory does not grow with their number",
            "times and memory are predicted: operations and bytes counted, nothing run",
            *(
                f"what the {name} does on text beside the layers is not counted"
                for name, look in (("split", work.split), ("router", work.router))
                if not look.whole
            ),
        ],
        **_counts(mixture),
    )


def _look(registry: Any, choice: str | Mapping[str, Any]) -> Look:
    """What a registered method looks at. Raises UserError for an unknown one."""
    if made_before(choice, registry.names()):
        return Look()
    method: Any = registry.resolve(choice)
    if isinstance(method, Energy):
        k_means = method.starts * K_MEANS_ROUNDS
        return Look("text", method.tokens, method.rounds, k_means, fits=True)
    if type(method).needs_data:
        by_layer = isinstance(method, CalibratedSplit | CalibratedRouter)
        return Look("text", method.tokens, getattr(method, "steps", 1), whole=by_layer)
    return Look("weights", rounds=_K_MEANS) if method.key == "cluster" else Look()


def _priced(recipe: Recipe) -> int:
    """Numbers of active experts tried in a layer, where layers have numbers of their own."""
    routed, chosen = recipe.experts - recipe.shared, recipe.top_k - recipe.shared
    return routed - 1 if recipe.experts_per_layer == "allotted" and chosen < routed else 0


def _refined(recipe: Recipe, machine: Machine) -> tuple[float, int, int | None, bool] | None:
    """What the cost of the distillation depends on, where there is one."""
    from torch import device

    settings = refinement(recipe)
    if settings is None:
        return None
    settings = settings.on(device("cuda" if machine.gpu else "cpu"))
    return settings.passes, settings.batch, settings.ahead, settings.kl > 0


def _mixture(shape: Any, family: DenseFamily, recipe: Recipe) -> Any:
    """The mixture that a dense model of this shape becomes, on the meta device."""
    from moesaic.models.families.moesaic_moe import MoesaicMoeConfig, MoesaicMoeForCausalLM
    from moesaic.models.llama_moe import LlamaMoEConfig, LlamaMoEForCausalLM
    from moesaic.models.llama_moe_residual import (
        LlamaMoEResidualConfig,
        LlamaMoEResidualForCausalLM,
    )
    from moesaic.models.load import on_meta

    routed, selects = recipe.experts - recipe.shared, recipe.top_k - recipe.shared
    if not (routed >= 1 and 1 <= selects <= routed):
        raise UserError(
            f"experts={recipe.experts}, shared={recipe.shared} and top_k={recipe.top_k} do not go "
            "together: top_k counts shared experts and is more than they are."
        )
    check_division(recipe.experts, shape.intermediate_size)
    width = shape.intermediate_size // recipe.experts
    if family.mixture(shape.to_dict()) == "moesaic_moe":
        config = MoesaicMoeConfig(
            text_config=shape,
            num_experts=routed,
            num_experts_per_tok=selects,
            moe_intermediate_size=width,
            shared_expert_intermediate_size=recipe.shared * width,
        )
        return on_meta(config, MoesaicMoeForCausalLM)
    fields = {
        name: getattr(shape, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "tie_word_embeddings",
            "attention_bias",
        )
        if getattr(shape, name, None) is not None
    }
    fields |= {"num_experts": routed, "num_selects": selects, "gate_network": "linear"}
    fields |= {"pad_token_id": None}
    if not recipe.shared:
        whole = LlamaMoEConfig(**fields, intermediate_size=shape.intermediate_size)
        return on_meta(whole, LlamaMoEForCausalLM)
    residual = LlamaMoEResidualConfig(
        **fields,
        intermediate_size=shape.intermediate_size,
        intermediate_size_moe=routed * width,
        intermediate_size_residual=recipe.shared * width,
        num_experts_residual=recipe.shared,
    )
    return on_meta(residual, LlamaMoEResidualForCausalLM)


def _any_model(model: Path | str) -> tuple[Any, int]:
    """A preset's or a model's shape on the meta device, and the bytes of a stored number."""
    if str(model) in recipes("init") and not Path(model).exists():
        preset = load(InitConfig, recipes("init")[str(model)])
        return _shape(preset), _TYPES[preset.dtype]
    source = find(model, config_only=True)
    stored = source.config.get("dtype") or source.config.get("torch_dtype")
    return build(source), _TYPES.get(str(stored), 2)


def _counts(found: Sizes) -> dict[str, Any]:
    return {
        "architecture": found.anatomy.architecture,
        "parameters": found.total,
        "active": found.active,
        "parts": found.parts,
    }
