"""Which code runs a transformers experts module: our kernels if it is plain, else transformers'.

`experts_forward` is what transformers calls for `experts_implementation="moesaic"`. It reads a
module only through the attributes that transformers' `use_experts_implementation` puts there.
T tokens, D hidden size, E experts, I expert width, K experts a token.

A module is plain when it holds `gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I] as ordinary
tensors, gate rows first, without biases, with the default gating of SiLU or GELU, and does not run
expert-parallel. Others go to transformers' grouped_mm function, or to the module's own loop where
the grouped matmul refuses their sizes. Each choice but the fast one is said once, in one line.
"""

from __future__ import annotations

from typing import Any

import torch

from moesaic.core.console import note
from moesaic.kernels import grouped
from moesaic.kernels.matmul import why_not_grouped
from moesaic.kernels.reference import Activation

_PLAIN_GATE = "_default_apply_gate"  # transformers' `act_fn(gate) * up` on the two halves
_PLAIN = {  # attribute: value in a plain module (assumed where a version lacks it), else what it is
    "has_gate": (True, "its experts have no gate"),
    "has_bias": (False, "its experts have biases"),
    "is_transposed": (False, "its weights are transposed"),
    "is_concatenated": (True, "its gate and up rows are interleaved"),
    "has_post_expert_norm": (False, "its experts end in a norm"),
    "_is_expert_parallel": (False, "it runs expert-parallel"),
}
_said: set[str] = set()


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run the experts of module `self` on x_TD, ids_TK, weights_TK (transformers' signature)."""
    reason = why_unusual(self)
    if reason is not None:
        return _delegate(self, reason, hidden_states, top_k_index, top_k_weights)
    gate_up_EJD, down_EDI = self.gate_up_proj, self.down_proj
    backend, reason = grouped.choose_backend(hidden_states, gate_up_EJD, down_EDI)
    if reason is not None:
        _say(f"{type(self).__name__}: a loop over experts instead of grouped matmul: {reason}.")
    return grouped.experts(
        hidden_states,
        gate_up_EJD,
        down_EDI,
        top_k_index,
        top_k_weights,
        activation=activation_of(self) or "silu",
        backend=backend,
    )


def why_unusual(module: torch.nn.Module) -> str | None:
    """Say in a few words why our kernels do not take this experts module, or return None."""
    for name, (value, meaning) in _PLAIN.items():
        if getattr(module, name, value) != value:
            return meaning
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and getattr(gate, "__name__", "") != _PLAIN_GATE:
        return "it has a gating of its own"
    for name in ("gate_up_proj", "down_proj"):
        weight: Any = getattr(module, name, None)
        if weight is None:
            return f"it has no {name}"
        if type(weight) not in (torch.Tensor, torch.nn.Parameter):
            return f"its {name} is a {type(weight).__name__}"
        if not weight.is_floating_point():
            return f"its {name} is {str(weight.dtype).removeprefix('torch.')}"
    if activation_of(module) is None:
        return f"its activation is {type(getattr(module, 'act_fn', None)).__name__}"
    return None


def activation_of(module: torch.nn.Module) -> Activation | None:
    """Return the name of the module's activation, or None where our kernels do not know it."""
    act = getattr(module, "act_fn", None)
    name = type(act).__name__ if isinstance(act, torch.nn.Module) else getattr(act, "__name__", "")
    if name in ("SiLU", "SiLUActivation", "silu"):
        return "silu"
    if name == "GELUTanh" or (name == "GELU" and getattr(act, "approximate", "") == "tanh"):
        return "gelu_tanh"
    return "gelu" if name in ("GELU", "GELUActivation", "gelu") else None


def _delegate(
    self: Any, reason: str, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    name = type(self).__name__
    weights = [w for w in self.parameters(recurse=False) if w.dim() == 3]
    sizes = tuple(size for w in weights for size in w.shape[1:])
    refused = why_not_grouped(weights[0].dtype, x_TD.device, sizes) if weights else None
    own_loop = getattr(type(self).forward, "__wrapped__", None)
    if refused is not None and own_loop is not None:
        _say(f"{name}: transformers' loop over experts instead of ours: {reason}; {refused}.")
        out_TD: torch.Tensor = own_loop(self, x_TD, ids_TK, weights_TK)
    else:
        _say(f"{name}: transformers' grouped_mm instead of our kernels: {reason}.")
        out_TD = ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, x_TD, ids_TK, weights_TK)
    return out_TD


@torch.compiler.assume_constant_result
def _say(text: str) -> None:
    """Say `text` unless it was said before in this process; under torch.compile, while tracing."""
    if text not in _said:
        _said.add(text)
        note(text)
