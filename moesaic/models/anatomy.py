"""Where a model's experts are and what they cost, read off the architecture itself.

A model is built from its config without memory (on the meta device) and its modules are walked:
experts are 3-D weights [E, ., .] or a list of E modules, beside a router. No table of families.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from moesaic.core.errors import UserError
from moesaic.models.catalog import Source, find, refusal
from moesaic.models.load import NUM_EXPERTS, TOP_K, config_of, model_class, on_meta

_ROUTER = re.compile(r"^(gate|gating|router|moe_gate)$")
_ALWAYS_ON = re.compile(r"shared|residual")  # parts of a layer that every token visits
_NO_PART = re.compile(r"(gate|norm|dropout)$")  # ... unless their names end so
_ATTENTION = re.compile(r"att(entio)?n")
_STACK = re.compile(r"(^|\.)(layers|blocks?|h)$")
_TRAINING_ONLY = re.compile(r"\.weight_noise\.")
_NUM_SHARED = ("n_shared_experts", "num_shared_experts", "num_shared_expert")


@dataclass(frozen=True)
class MoELayer:
    """One routed layer.

    `index` counts the model's blocks, a decoder's after its encoder's; `router` and `experts` are
    module paths (`router` is "" where routing is not a module). `num_shared` experts are always on
    and not counted in `num_experts`.
    """

    index: int
    kind: Literal["mlp", "attention"]
    router: str
    experts: str
    num_experts: int
    top_k: int
    num_shared: int


@dataclass(frozen=True)
class Anatomy:
    """The routed layers of a model and its sizes.

    `params_total` counts every weight once: tied matrices once, the zero padding of experts of
    unequal width not at all. `params_active` leaves out the (E - K) / E of the routed experts that
    a token does not visit (the mean where widths differ); embeddings count in both.
    """

    architecture: str
    model_type: str
    num_layers: int
    layers: tuple[MoELayer, ...]
    params_total: int
    params_active: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        size = f"{_short(self.params_total)} parameters"
        if not self.layers:
            return f"{self.architecture}: dense, {self.num_layers} layers, {size}"
        kinds = sorted({(m.kind, m.num_experts, m.top_k, m.num_shared) for m in self.layers})
        groups = [
            f"{sum((m.kind, m.num_experts, m.top_k, m.num_shared) == key for m in self.layers)} "
            f"{key[0]} layers with {key[2]} of {key[1]} experts"
            + (f" + {key[3]} shared" if key[3] else "")
            for key in kinds
        ]
        return (
            f"{self.architecture}: {self.num_layers} layers, {', '.join(groups)}; {size}, "
            f"{_short(self.params_active)} active a token"
        )


def anatomy(model: PreTrainedModel | PreTrainedConfig | str | Path) -> Anatomy:
    """Describe a loaded model, a config, or a path, hub id or alias (only config.json is read).

    Raises UserError as `moesaic.load` does when the model is not found or not supported, and when
    experts are found whose number per token is nowhere to be read.
    """
    if isinstance(model, (str, Path)):
        return anatomy_of(find(model, config_only=True))
    if isinstance(model, PreTrainedConfig):
        model = on_meta(model)
    stacks = _stacks(model)
    layers, idle = [], 0.0
    for block in _blocks(model):
        top_k = _top_k(model, block)
        idle += block.params * (block.num_experts - top_k) / block.num_experts
        layers.append(
            MoELayer(
                index=_index(stacks, block.experts),
                kind="attention" if _ATTENTION.search(block.path) else "mlp",
                router=block.router,
                experts=block.experts,
                num_experts=block.num_experts,
                top_k=top_k,
                num_shared=_num_shared(model, block),
            )
        )
    if not layers and _expects_experts(model.config):
        raise UserError(
            f"{type(model).__name__} has experts in a form that moesaic does not know, so its "
            "anatomy cannot be told. Please report this model."
        )
    total = sum(p.numel() for p in model.parameters()) - sum(_padding(m) for m in model.modules())
    idle += sum(p.numel() for name, p in model.named_parameters() if _TRAINING_ONLY.search(name))
    return Anatomy(
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        num_layers=sum(stacks.values()),
        layers=tuple(layers),
        params_total=total,
        params_active=round(total - idle),
    )


def anatomy_of(source: Source) -> Anatomy:
    """Describe a model that `catalog.find` found.

    Raises UserError for a family that this version does not load right and for a config.json that
    describes no model.
    """
    return anatomy(build(source))


def build(source: Source) -> PreTrainedModel:
    """Build the model that a config.json describes on the meta device.

    Raises UserError as `anatomy_of` does.
    """
    reason = refusal(source.config)
    if reason is not None:
        raise UserError(f"{source.name} is not supported: {reason}.")
    cls = model_class(source.fields, source=source.name)
    try:
        config, _ = config_of(source)
        return on_meta(config, cls)
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{source.name}: config.json describes no {cls.__name__}: {reason}"
        ) from error


@dataclass(frozen=True)
class _Block:
    """A module that routes: module paths, the number of experts, and the experts' weights."""

    path: str
    router: str
    experts: str
    num_experts: int
    params: int


def _blocks(model: nn.Module) -> Iterator[_Block]:
    """Find every routed block, in the model's order."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    inside = None
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        experts = _count_experts(path, module)
        if experts < 2 or _ALWAYS_ON.search(path):
            continue
        inside = path + "."
        params = sum(p.numel() for p in module.parameters()) - _padding(module)
        found.setdefault(_owner(model, path), []).append((path, experts, params))
    for owner, parts in found.items():
        router = next(
            (
                name
                for name, _ in model.get_submodule(owner).named_children()
                if _ROUTER.match(name)
            ),
            "",
        )
        paths = [path for path, _, _ in parts]
        # JetMoE keeps its experts' two matrices in two modules: the block itself holds them
        shared_path = paths[0] if len(paths) == 1 else _common(paths)
        yield _Block(
            owner,
            f"{owner}.{router}" if router else "",
            shared_path,
            max(experts for _, experts, _ in parts),
            sum(params for *_, params in parts),
        )


def _count_experts(path: str, module: nn.Module) -> int:
    """Number of experts that this module holds, 0 if it is no module of experts."""
    if "expert" not in f"{path.rpartition('.')[2]} {type(module).__name__}".lower():
        return 0
    weights = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    if weights:
        return min(p.shape[0] for p in weights)
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        kinds = Counter(type(child) for child in module.children())
        return max(kinds.values(), default=0)
    return 0


def _owner(model: nn.Module, path: str) -> str:
    """Return the nearest module around `path` that holds a router, else its parent."""
    parent = above = path.rpartition(".")[0]
    while above and not above.rpartition(".")[2].isdigit():
        if any(_ROUTER.match(name) for name, _ in model.get_submodule(above).named_children()):
            return above
        above = above.rpartition(".")[0]
    return parent


def _common(paths: list[str]) -> str:
    """Return the innermost module that holds all of `paths`."""
    parts = [path.split(".") for path in paths]
    same = [column[0] for column in zip(*parts, strict=False) if len(set(column)) == 1]
    return ".".join(same)


def _top_k(model: PreTrainedModel, block: _Block) -> int:
    """Experts a token visits: an attribute of router, block or experts, else of the config."""
    places = [model.get_submodule(path) for path in (block.router, block.path) if path]
    for place in (*places, model.config.get_text_config()):
        for name in TOP_K:
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return min(value, block.num_experts)
        numbered = re.search(r"Top(\d+)", type(place).__name__)  # SwitchTransformersTop1Router
        if numbered:
            return int(numbered[1])
    raise UserError(
        f"{type(model).__name__}: how many of its {block.num_experts} experts a token visits is "
        "nowhere to be read. Please report this model."
    )


def _num_shared(model: PreTrainedModel, block: _Block) -> int:
    """Experts that run on every token beside the routed ones."""
    above = block.path
    while above:
        is_layer = above.rpartition(".")[2].isdigit()
        if is_layer and _ATTENTION.search(block.path):
            break  # what stands beside attention belongs to the MLP
        for name, child in model.get_submodule(above).named_children():
            if _ALWAYS_ON.search(name) and not _NO_PART.search(name):
                inner = [_count_experts(path, module) for path, module in child.named_modules()]
                return max(inner) or _configured(model.config, _NUM_SHARED) or 1
        if is_layer:
            break
        above = above.rpartition(".")[0]
    return 0


def _padding(module: nn.Module) -> int:
    """Count the zeros that fill experts narrower than the widest of their layer.

    `sizes` of a module of experts holds their true widths; its weights have the widest (or twice
    that, gate and up) as one of their sizes.
    """
    sizes, down_EDI = getattr(module, "sizes", None), getattr(module, "down_proj", None)
    if not isinstance(sizes, tuple) or not isinstance(down_EDI, nn.Parameter):
        return 0
    experts, _, widest = down_EDI.shape
    missing = sum(widest - size for size in sizes)
    return sum(
        parameter.numel() // (experts * widest) * missing
        for parameter in module.parameters(recurse=False)
        if widest in parameter.shape[1:] or 2 * widest in parameter.shape[1:]
    )


def _stacks(model: nn.Module) -> dict[str, int]:
    """Return the lists of blocks, outermost only: path -> length."""
    return {
        path: len(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and _STACK.search(path)
        and not any(part.isdigit() for part in path.split("."))
    }


def _index(stacks: dict[str, int], path: str) -> int:
    before = 0
    for stack, length in stacks.items():
        if path.startswith(stack + "."):
            return before + int(path.removeprefix(stack + ".").split(".")[0])
        before += length
    return before


def _configured(config: PreTrainedConfig, names: tuple[str, ...]) -> int:
    text = config.get_text_config()
    return next((v for name in names if isinstance(v := getattr(text, name, None), int)), 0)


def _expects_experts(config: PreTrainedConfig) -> bool:
    return _configured(config, NUM_EXPERTS) > 1


def _short(count: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}" if count < 100 * size else f"{count / size:.0f} {unit}"
            )
    return str(count)
