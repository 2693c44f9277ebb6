"""Which code runs a transformers experts module: our kernels for the plain ones, transformers' own for the others.

`experts_forward` is what transformers calls for `experts_implementation="moesaic"`. It reads a module only through
the attributes that transformers' `use_experts_implementation` puts there, with defaults for versions that lack some.
T tokens, D hidden size, E experts, I expert width, K experts a token.

A module is plain when it holds `gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I] as ordinary tensors, gate first,
no bias, the default gating with SiLU or GELU, and no expert parallelism. Whatever is not plain is handed to
transformers' grouped_mm function, or to the module's own loop where the grouped matmul refuses its sizes. Each
choice that is not the fast one is said once, in one line.
"""

from __future__ import annotations

from typing import Any

import torch

from moesaic.core.console import note
from moesaic.kernels import grouped
from moesaic.kernels.matmul import why_not_grouped
from moesaic.kernels.reference import Activation

# transformers' default gating, by name: `act_fn(gate) * up` on halves
_PLAIN_GATE = "_default_apply_gate"
_EXPECTED = (  # attribute, value it must have, value where transformers does not set it, what it means otherwise
    ("has_gate", True, True, "its experts have no gate"),
    ("has_bias", False, False, "its experts have biases"),
    ("is_transposed", False, False, "its weights are transposed"),
    ("is_concatenated", True, True, "its gate and up rows are interleaved"),
    ("has_post_expert_norm", False, False, "its experts end in a norm"),
    ("_is_expert_parallel", False, False, "it runs expert-parallel"),
)
_said: set[str] = set()


def experts_forward(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run the experts of module `self`: x_TD, ids_TK, weights_TK to out_TD (transformers' signature)."""
    activation = activation_of(self)
    reason = why_unusual(self)
    if reason is not None or activation is None:
        return _delegate(
            self, reason or "its activation is unknown", hidden_states, top_k_index, top_k_weights
        )
    weights = (self.gate_up_proj, self.down_proj)
    backend, reason = grouped.choose_backend(hidden_states, *weights)
    if reason is not None:
        _say(f"moesaic kernels: {type(self).__name__} runs as a loop over its experts: {reason}.")
    return grouped.experts(
        hidden_states, *weights, top_k_index, top_k_weights, activation=activation, backend=backend
    )


def why_unusual(module: torch.nn.Module) -> str | None:
    """Say in a few words why our kernels do not take this experts module, or None when they do."""
    for name, expected, default, meaning in _EXPECTED:
        if getattr(module, name, default) != expected:
            return meaning
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and getattr(gate, "__name__", "") != _PLAIN_GATE:
        return "it has a gating of its own"
    if activation_of(module) is None:
        return f"its activation is {type(getattr(module, 'act_fn', None)).__name__}"
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, torch.Tensor):
            return f"it has no tensor {name}"
        if type(weight) not in (torch.Tensor, torch.nn.Parameter) or not weight.is_floating_point():
            return f"its {name} is a {type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}"
    return None


def activation_of(module: torch.nn.Module) -> Activation | None:
    """Return the name of the module's activation, or None when our kernels do not know it."""
    act = getattr(module, "act_fn", None)
    name = type(act).__name__ if isinstance(act, torch.nn.Module) else getattr(act, "__name__", "")
    if name in ("SiLU", "SiLUActivation", "silu"):
        return "silu"
    if name == "GELUTanh" or (name == "GELU" and getattr(act, "approximate", "") == "tanh"):
        return "gelu_tanh"
    return "gelu" if name in ("GELU", "GELUActivation", "gelu") else None


def _delegate(
    self: Any, reason: str, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> Any:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    name = type(self).__name__
    weights = [w for w in self.parameters(recurse=False) if w.dim() == 3]
    sizes = tuple(size for w in weights for size in w.shape[1:])
    refused = (
        why_not_grouped(weights[0].dtype, x_TD.device, sizes)
        if weights
        else "it has no 3-D weights"
    )
    own_loop = getattr(type(self).forward, "__wrapped__", None)
    if refused is not None and own_loop is not None:
        _say(
            f"moesaic kernels: {name} runs in transformers' loop over experts: {reason}, and {refused}."
        )
        return own_loop(self, x_TD, ids_TK, weights_TK)
    _say(f"moesaic kernels: {name} runs in transformers' grouped_mm: {reason}.")
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, x_TD, ids_TK, weights_TK)


@torch.compiler.assume_constant_result
def _say(text: str) -> None:
    """Say `text` unless it was said before in this process; under torch.compile, while tracing."""
    if text not in _said:
        _said.add(text)
        note(text)
