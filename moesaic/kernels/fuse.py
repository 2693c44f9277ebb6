"""Put the fused choice (`kernels.router`) into a model's routers, and take it out again.

A router of transformers is known by its code: `RECIPES` holds, for a digest of a `forward` that was
read, how its logits are made and which `Scheme` follows. Any other code, a newer version's or a
subclass's, keeps running as it is, and is named with the reason. A router of this package tells its
scheme itself (`scheme()`), in place of its `choose`.

Only the instance's `forward` (or `choose`) is replaced, by a call that decides anew each time:
hooks, recorded outputs, names of parameters, saved files and copies stay what they are, and where
the kernel does not run (a CPU), the model's own code does.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from moesaic.kernels import router
from moesaic.kernels.router import Scheme
from moesaic.kernels.select import say

_ROUTER = re.compile(r"(Router|Gating|Gate)$")
_DROPPED = ("ctx", "annotation", "returns", "type_comment", "type_params", "kind")


@dataclass(frozen=True)
class Recipe:
    """What one `forward` does: its logits [T, E] from a module and its input, then a scheme."""

    logits: Callable[[Any, torch.Tensor], torch.Tensor]
    scheme: Callable[[Any], Scheme | str]
    """Of a module; or why it has none."""
    weights: Literal["float32", "logits", "input"]
    """Whose dtype the weights have."""
    biased: bool = False
    """Whether it reads `e_score_correction_bias`, or is given it as the second argument."""
    ids_first: bool = False
    """Whether it returns (ids, weights, logits) instead of (logits, weights, ids)."""


@dataclass(frozen=True)
class Fused:
    """What `fuse_routers` did: paths of the routers, and class names of those left with reasons."""

    routers: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def fuse_routers(model: nn.Module, *, device: torch.device | None = None) -> Fused:
    """Let the routers of `model` choose in one kernel wherever it runs; again changes nothing.

    Routers that are not known keep their code; a line says which and why. With `device` (where the
    model will run) those that could not run there are left, too. Undone by `unfuse_routers`.
    """
    done = Fused()
    for path, module in model.named_modules():
        reason = _why_left(module, device)
        if reason is None:
            _install(module)
            done.routers.append(path)
        elif reason:
            done.left.setdefault(type(module).__name__, reason)
    for name, reason in done.left.items():
        say(f"{name}: its own code instead of our kernel: {reason}.")
    if not done.routers and not done.left:
        say(f"{type(model).__name__}: no routers to fuse: there are none, or none of their own.")
    return done


def unfuse_routers(model: nn.Module) -> list[str]:
    """Give the routers of `model` their own code again; return their paths."""
    found = []
    for path, module in model.named_modules():
        for name in ("forward", "_old_forward", "choose"):  # the second: accelerate
            if _is_ours(vars(module).get(name)):
                delattr(module, name)
                if name == "_old_forward":
                    module._old_forward = type(module).forward.__get__(module)
                found.append(path)
    return found


def recipe_of(module: nn.Module) -> Recipe | None:
    """Return what is known of a module's `forward`, or None."""
    return RECIPES.get(digest(type(module).forward))


@cache
def digest(function: Any) -> str:
    """Return twelve hexadecimal digits that stand for a function's code.

    Comments, layout, annotations and the docstring do not count; the version of Python does not
    either. "" where there is no source.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return ""
    if not isinstance(tree, ast.FunctionDef):
        return ""
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    return hashlib.sha256(" ".join(_words(tree)).encode()).hexdigest()[:12]


def _words(node: Any) -> Iterator[str]:
    """Yield a syntax tree in words; empty fields are left out, which versions of Python name
    differently.
    """
    if isinstance(node, list):
        yield "["
        for item in node:
            yield from _words(item)
        yield "]"
    elif isinstance(node, ast.AST):
        yield type(node).__name__
        for name, value in ast.iter_fields(node):
            if value not in (None, []) and name not in _DROPPED:
                yield name
                yield from _words(value)
    else:
        yield repr(node)


def _why_left(module: nn.Module, device: torch.device | None) -> str | None:
    """Return None for a router to fuse, "" for no router, else why it keeps its code."""
    recipe = recipe_of(module)
    tell: Any = getattr(module, "scheme", None)
    if tell is None and recipe is None:
        named = any(_ROUTER.search(cls.__name__) for cls in type(module).__mro__)
        is_router = named or getattr(module, "is_moe_router", False)
        return "how it chooses is not known to us" if is_router else ""
    scheme = tell() if recipe is None else recipe.scheme(module)
    if isinstance(scheme, str):
        return scheme
    return router.why_not(scheme, _experts(module), device)


def _experts(module: Any) -> int:
    experts: int = module.num_experts if hasattr(module, "num_experts") else module.weight.shape[0]
    return experts


def _install(module: Any) -> None:
    recipe = recipe_of(module)
    if recipe is None:
        module.choose = partial(_choose, module)
        return
    # accelerate's hooks call what was `forward` before them
    name = "_old_forward" if "_old_forward" in vars(module) else "forward"
    setattr(module, name, partial(_forward, recipe, module))


def _is_ours(function: Any) -> bool:
    return isinstance(function, partial) and function.func in (_forward, _choose)


def _choose(module: Any, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of `choose` of a router of this package."""
    scheme = _runnable(module, module.scheme(), logits_TE)
    if scheme is not None:
        return router.choose(logits_TE, scheme)
    weights_TK, ids_TK = type(module).choose(module, logits_TE)
    return weights_TK, ids_TK


def _forward(
    recipe: Recipe, module: Any, hidden_states: torch.Tensor, *given: Any, **named: Any
) -> Any:
    """In place of `forward` of a router of transformers."""
    scheme = _runnable(module, recipe.scheme(module), hidden_states)
    if scheme is None:
        return type(module).forward(module, hidden_states, *given, **named)
    bias_E = None
    if recipe.biased:
        told = (*given, *named.values())
        bias_E = told[0] if told else module.e_score_correction_bias
    logits_TE = recipe.logits(module, hidden_states)
    dtype = {"logits": logits_TE.dtype, "input": hidden_states.dtype}.get(recipe.weights)
    weights_TK, ids_TK = router.choose(
        logits_TE, scheme, bias_E=bias_E, dtype=dtype or torch.float32
    )
    if recipe.ids_first:
        return ids_TK, weights_TK, logits_TE
    return logits_TE, weights_TK, ids_TK


def _runnable(module: Any, scheme: Scheme | str, like: torch.Tensor) -> Scheme | None:
    """Return the scheme if the kernel takes it where `like` is; say which code runs."""
    if isinstance(scheme, str):
        reason: str | None = scheme
    else:
        reason = router.why_not(scheme, _experts(module), like.device)
    name = type(module).__name__
    if reason is None:
        say(f"{name}: its choice in one Triton kernel.")
        return scheme  # type: ignore[return-value]
    say(f"{name}: its own code instead of our kernel: {reason}.")
    return None


def _linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x.reshape(-1, x.shape[-1]), module.weight)


def _linear_bias(module: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module.weight, module.bias)


def _linear_then_float32(module: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module.weight).float()


def _linear_float32(module: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x.reshape(-1, x.shape[-1]).float(), module.weight.float())


def _linear_in_dtype_of_weight(module: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x.reshape(-1, x.shape[-1]).to(module.weight.dtype), module.weight)


def _softmax(module: Any) -> Scheme:
    return Scheme(module.top_k)


def _softmax_renormalised(module: Any) -> Scheme:
    return Scheme(module.top_k, renormalise=True)


def _softmax_as_configured(module: Any) -> Scheme:
    return Scheme(module.top_k, renormalise=bool(module.norm_topk_prob))


def _softmax_of_chosen(module: Any) -> Scheme:
    return Scheme(module.top_k, "softmax of chosen")


def _sigmoid_renormalised(module: Any) -> Scheme:
    return Scheme(module.top_k, "sigmoid", renormalise=True)


def _deepseek_v2(module: Any) -> Scheme | str:
    limited = {"greedy": False, "group_limited_greedy": True}.get(module.topk_method)
    if limited is None:
        return f"its topk_method is {module.topk_method}"
    groups, kept = (module.num_group, module.topk_group) if limited else (1, 1)
    return Scheme(module.top_k, groups=groups, kept_groups=kept, scale=module.routed_scaling_factor)


def _beam(module: Any) -> Scheme:
    return Scheme(
        module.top_k,
        "sigmoid",
        groups=module.num_group,
        kept_groups=module.topk_group,
        group_rule="two highest",
        renormalise=bool(module.norm_topk_prob),
        epsilon=1e-20,
        rounded=True,  # under autocast its logits are bfloat16, and it stays there
    )


def _deepseek_v3(module: Any) -> Scheme:
    return _beam(module)._replace(scale=module.routed_scaling_factor)


RECIPES = {
    # Mixtral, MiniMax
    "447c144d3dbb": Recipe(_linear, _softmax_renormalised, "float32"),
    # Qwen2-MoE, Qwen3-MoE, OLMoE, FlexOlmo, Qwen3-Next, Qwen3-Omni, Mellum
    "df2b06ea094a": Recipe(_linear, _softmax_as_configured, "logits"),
    # Qwen3.5-MoE, Qwen3-VL-MoE
    "01cfcb9c2b57": Recipe(_linear, _softmax_renormalised, "logits"),
    # Jamba from 5.23
    "d1d0cdecd674": Recipe(_linear, _softmax, "input"),
    # DeepSeek-V2, DeepSeek-OCR-2
    "fe3c106ad5b6": Recipe(_linear_float32, _deepseek_v2, "float32"),
    # DeepSeek-V3 and V3.2, GLM-4-MoE, Dots, Kimi-Linear, Nemotron-H, MiMo-V2, EXAONE-MoE, Solar
    "5c16bf79c980": Recipe(_linear_float32, _deepseek_v3, "logits", biased=True),
    # Beam
    "8ab9e1084c6e": Recipe(_linear_float32, _beam, "logits", biased=True),
    # MiniMax-M3, Step-3.7
    "267a1cfd30d9": Recipe(
        _linear_in_dtype_of_weight, _sigmoid_renormalised, "float32", biased=True
    ),
    # MiniMax-M2
    "4fcae7201b39": Recipe(
        _linear_in_dtype_of_weight, _sigmoid_renormalised, "float32", biased=True
    ),
    # GraniteMoE and its kin; before 5.23, and from there
    "a7d9a12dd9d2": Recipe(_linear_then_float32, _softmax_of_chosen, "input", ids_first=True),
    "cfd2ffa376ab": Recipe(_linear_then_float32, _softmax_of_chosen, "input"),
    # GPT-OSS
    "33daf7f97723": Recipe(_linear_bias, _softmax_of_chosen, "logits"),
}
"""By digest: transformers 5.17 and 5.23 were read."""
