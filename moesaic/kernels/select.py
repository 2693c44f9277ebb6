"""Which code runs a transformers experts module: our kernels if it is plain, else transformers'.

`experts_forward` is what transformers calls for `experts_implementation="moesaic"`. It reads a
module only through the attributes that transformers' `use_experts_implementation` puts there.
T tokens, D hidden size, E experts, I expert width, J = 2I, K experts a token.

A module is plain when it holds `gate_up_proj` [E, J, D] and `down_proj` [E, D, I] (or both
transposed) as ordinary tensors, gate rows first, without biases, with the default gating of SiLU or
GELU. Plain modules run on one of our paths, the first that takes them:

* fused: Triton kernels, on a GPU;
* grouped: torch's grouped matmul, on a CPU and on GPUs;
* loop: a loop over the experts' rows, where torch refuses their sizes.

Others go to transformers' grouped_mm function, or, where that fails (sizes that torch refuses,
torch.compile), through `kernels.unusual`. Each choice is said once, with its reason.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from moesaic.core.console import note
from moesaic.kernels import grouped, options, unusual
from moesaic.kernels.reference import Activation

Path = Literal["fused", "grouped", "loop"]
PATHS: tuple[Path, ...] = ("fused", "grouped", "loop")
_PLAIN_GATE = "_default_apply_gate"  # transformers' `act_fn(gate) * up` on the two halves
_PLAIN = {  # attribute: value in a plain module (assumed where a version lacks it), else what it is
    "has_gate": (True, "its experts have no gate"),
    "has_bias": (False, "its experts have biases"),
    "is_concatenated": (True, "its gate and up rows are interleaved"),
    "has_post_expert_norm": (False, "its experts end in a norm"),
}
_WEIGHTS = ("gate_up_proj", "down_proj")
_said: dict[str, None] = {}  # in order


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run the experts of module `self` on x_TD, ids_TK, weights_TK (transformers' signature)."""
    # Read once: under LoRA each reading of a weight computes it anew.
    gate_up_EJD, down_EDI = _weights(self)
    reason = _why_unusual(self, gate_up_EJD, down_EDI)
    if reason is not None:
        return _delegate(self, reason, hidden_states, top_k_index, top_k_weights)
    if getattr(self, "is_transposed", False):
        gate_up_EJD, down_EDI = gate_up_EJD.transpose(1, 2), down_EDI.transpose(1, 2)
    x_TD, sentinels = hidden_states, getattr(self, "_is_expert_parallel", False)
    activation = activation_of(self) or "silu"
    name = type(self).__name__

    refused = _why_no_triton(x_TD.device)
    if refused is None:
        # The kernels take one dtype. Autograd takes the gradients back to the types given.
        compute = grouped.compute_dtype(x_TD, gate_up_EJD)
        operands = x_TD.to(compute), gate_up_EJD.to(compute), down_EDI.to(compute), top_k_index
        refused = _triton().why_not(*operands)
        if refused is None:
            _say_fused(name, x_TD.device)
            out_TD: torch.Tensor = _triton().experts(
                *operands, top_k_weights, activation=activation, sentinels=sentinels
            )
            return out_TD.to(x_TD.dtype)
    backend, reason = grouped.choose_backend(x_TD, gate_up_EJD, down_EDI)
    if reason is None:
        say(f"{name}: torch's grouped matmul: {refused}.")
    else:
        say(f"{name}: a loop over experts instead of grouped matmul: {reason}.")
    return grouped.experts(
        x_TD,
        gate_up_EJD,
        down_EDI,
        top_k_index,
        top_k_weights,
        activation=activation,
        backend=backend,
        sentinels=sentinels,
    )


def why_unusual(module: torch.nn.Module) -> str | None:
    """Say in a few words why our kernels do not take this experts module, or return None."""
    return _why_unusual(module, *_weights(module))


def why_not_fused(
    module: torch.nn.Module,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> str | None:
    """Say why the Triton kernels would not run this experts module, or return None.

    `device` is where it will run and `dtype` that of its products; None: those of its weights.
    """
    weights = _weights(module)
    reason = _why_unusual(module, *weights)
    if reason is not None:
        return reason
    if getattr(module, "is_transposed", False):
        weights = [weight.transpose(1, 2) for weight in weights]
    gate_up_EJD, down_EDI = weights
    device = device or gate_up_EJD.device
    reason = _why_no_triton(device)
    if reason is not None:
        return reason
    dtype = dtype or gate_up_EJD.dtype
    gate_up_EJD, down_EDI = (  # sizes and strides count, numbers do not
        torch.empty_strided(weight.shape, weight.stride(), dtype=dtype, device=device)
        for weight in (gate_up_EJD, down_EDI)
    )
    x_TD = gate_up_EJD.new_empty(1, gate_up_EJD.shape[2])
    ids_TK = torch.zeros(1, 1, dtype=torch.int64, device=device)
    refused: str | None = _triton().why_not(x_TD, gate_up_EJD, down_EDI, ids_TK)
    return refused


def why_not_persistent(device: torch.device, tile_rows: int | None) -> str | None:
    """Say why the Triton kernels, which run on `device`, cannot be persistent, or return None."""
    refused: str | None = _triton().why_not_persistent(device, tile_rows)
    return refused


def said() -> tuple[str, ...]:
    """Return the lines about the paths taken so far in this process, in order."""
    return tuple(_said)


def forget() -> None:
    """Say every path anew from now on."""
    _said.clear()


def why_not(
    path: Path,
    x_TD: torch.Tensor,
    gate_up_EJD: torch.Tensor,
    down_EDI: torch.Tensor,
    ids_TK: torch.Tensor,
) -> str | None:
    """Say why `path` does not take these tensors, or return None; the first that does is taken."""
    if path == "loop":
        return None
    if path == "grouped":
        return grouped.choose_backend(x_TD, gate_up_EJD, down_EDI)[1]
    reason = _why_no_triton(x_TD.device)
    if reason is None:
        reason = _triton().why_not(x_TD, gate_up_EJD, down_EDI, ids_TK)
    return reason


def run(path: Path, *operands: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Compute plain experts by one path: x_TD, gate_up_EJD, down_EDI, ids_TK, weights_TK."""
    if path == "fused":
        out_TD: torch.Tensor = _triton().experts(*operands, activation=activation)
        return out_TD
    return grouped.experts(*operands, activation=activation, backend=path)


def activation_of(module: torch.nn.Module) -> Activation | None:
    """Return the name of the module's activation, or None where our kernels do not know it."""
    act = getattr(module, "act_fn", None)
    name = type(act).__name__ if isinstance(act, torch.nn.Module) else getattr(act, "__name__", "")
    if name in ("SiLU", "SiLUActivation", "silu"):
        return "silu"
    if name == "GELUTanh" or (name == "GELU" and getattr(act, "approximate", "") == "tanh"):
        return "gelu_tanh"
    return "gelu" if name in ("GELU", "GELUActivation", "gelu") else None


def _weights(module: Any) -> list[Any]:
    return [getattr(module, name, None) for name in _WEIGHTS]


def _triton() -> Any:
    import moesaic.kernels.triton as fused

    return fused


def _why_no_triton(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the fused kernels need a GPU, not a {device.type.upper()}"
    try:
        _triton()
    except ImportError as error:
        return f"the fused kernels cannot be imported ({error})"
    return None


def _why_unusual(module: torch.nn.Module, gate_up: Any, down: Any) -> str | None:
    for name, (value, meaning) in _PLAIN.items():
        if getattr(module, name, value) != value:
            return meaning
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and getattr(gate, "__name__", "") != _PLAIN_GATE:
        return "it has a gating of its own"
    for name, weight in zip(_WEIGHTS, (gate_up, down), strict=True):
        if weight is None:
            return f"it has no {name}"
        if type(weight) not in (torch.Tensor, torch.nn.Parameter):
            return f"its {name} is a {type(weight).__name__}"
        if not weight.is_floating_point():
            return f"its {name} is {str(weight.dtype).removeprefix('torch.')}"
    if activation_of(module) is None:
        return f"its activation is {type(getattr(module, 'act_fn', None)).__name__}"
    return None


def _delegate(
    self: Any, reason: str, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    name = type(self).__name__
    refused = unusual.why_not_grouped(self, x_TD)
    if refused is not None:
        say(f"{name}: a loop over experts instead of our kernels: {reason}; {refused}.")
        return unusual.experts(self, x_TD, ids_TK, weights_TK)
    if torch.compiler.is_compiling():
        say(f"{name}: grouped matmuls without fusion instead of our kernels: {reason}.")
        return unusual.experts(self, x_TD, ids_TK, weights_TK, backend="grouped")
    say(f"{name}: transformers' grouped_mm instead of our kernels: {reason}.")
    out_TD: torch.Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, x_TD, ids_TK, weights_TK)
    return out_TD


@torch.compiler.assume_constant_result
def say(text: str) -> None:
    """Say `text` unless it was said before in this process; under torch.compile, while tracing."""
    if text not in _said:
        _said[text] = None
        note(text)


@torch.compiler.assume_constant_result
def _say_fused(name: str, device: torch.device) -> None:
    launch = options.current()
    if why_not_persistent(device, launch.block_m) is not None:
        launch = replace(launch, persistent=False)
    say(f"{name}: fused Triton kernels, {launch}.")
