"""Experts that our kernels do not take, where transformers' grouped_mm function fails too.

A module with biases, a gating or an activation of its own runs through that function as long as
torch takes its sizes. Otherwise transformers would loop over the experts with autograd, where the
slice `w[e]` of each expert costs a gradient of the size of all of them. This file computes the same
on sorted rows: one product, one gradient of each weight. Under torch.compile it stands in always:
the function's float32 gradient does not trace in transformers 5.17.

T tokens, D hidden size, E experts, K experts a token, N = T*K rows sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch

from moesaic.kernels import matmul
from moesaic.kernels.grouped import combine, sort_rows


def why_not_grouped(module: Any, x_TD: torch.Tensor) -> str | None:
    """Say why torch's grouped matmul does not take this module's weights, or return None."""
    weights = _weights(module)
    if not weights:
        return None
    sizes = tuple(size for weight in weights for size in weight.shape[1:])
    return matmul.why_not_grouped(weights[0].dtype, x_TD.device, sizes)


def experts(
    module: Any,
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    backend: matmul.Backend = "loop",
) -> torch.Tensor:
    """Compute what the module's own loop computes, on sorted rows.

    Follows the attributes of transformers' `use_experts_implementation`: has_gate, has_bias,
    is_transposed, has_post_expert_norm; ids of num_experts ("another rank's") are left out.
    """
    up, down = _weights(module)
    count, top_k = up.shape[0], ids_TK.shape[1]
    order_N, ends_E = sort_rows(ids_TK, count)
    expert_N = ids_TK.reshape(-1).index_select(0, order_N)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    x_ND = x_TD.index_select(0, order_N // top_k)
    h = _linear(module, name, up, x_ND, expert_N, ends_E, backend)
    a = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    y_ND = _linear(module, "down_proj", down, a, expert_N, ends_E, backend)
    if getattr(module, "has_post_expert_norm", False):
        y_ND = module.post_expert_norm(y_ND)
    y_ND = y_ND * weights_TK.reshape(-1).index_select(0, order_N).unsqueeze(1)
    y_ND = y_ND.masked_fill((expert_N >= count).unsqueeze(1), 0)
    return combine(y_ND, order_N, top_k).to(x_TD.dtype)


def _weights(module: Any) -> tuple[torch.Tensor, ...]:
    names = ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
    found: list[Any] = [getattr(module, name, None) for name in names]
    return tuple(found) if all(isinstance(w, torch.Tensor) for w in found) else ()


def _linear(
    module: Any,
    name: str,
    weight: torch.Tensor,
    rows: torch.Tensor,
    expert_N: torch.Tensor,
    ends_E: torch.Tensor,
    backend: matmul.Backend,
) -> torch.Tensor:
    if not getattr(module, "is_transposed", False):
        weight = weight.transpose(1, 2)
    out = torch.ops.moesaic.sorted_product(rows.to(weight.dtype), weight, ends_E, backend)
    if not getattr(module, "has_bias", False):
        return out
    bias = getattr(module, f"{name}_bias")
    return out + bias[expert_N.clamp(max=bias.shape[0] - 1)]


# Operators: the lengths of the loop cannot be in a graph of torch.compile. The schemas are written
# out because annotations are strings in this file.
@torch.library.custom_op(
    "moesaic::sorted_product",
    mutates_args=(),
    schema="(Tensor a, Tensor w, Tensor ends, str backend) -> Tensor",
)
def _product(
    a: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, backend: matmul.Backend
) -> torch.Tensor:
    return matmul.clear_tail(
        matmul.rows(a, w, matmul.layout(ends, len(a), a.dtype, backend=backend)), ends
    )


@torch.library.custom_op(
    "moesaic::sorted_outer",
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor ends, str backend) -> Tensor",
)
def _outer(
    a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, backend: matmul.Backend
) -> torch.Tensor:
    return matmul.outer(a, b, matmul.layout(ends, len(a), a.dtype, backend=backend))


@_product.register_fake
def _product_shape(
    a: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, backend: matmul.Backend
) -> torch.Tensor:
    return a.new_empty(a.shape[0], w.shape[2])


@_outer.register_fake
def _outer_shape(
    a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, backend: matmul.Backend
) -> torch.Tensor:
    return a.new_empty(ends.shape[0], a.shape[1], b.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    a, w, ends = ctx.saved_tensors
    needs_a, needs_w = ctx.needs_input_grad[:2]
    operators, how, d_a, d_w = torch.ops.moesaic, ctx.backend, None, None
    if needs_a:
        d_a = operators.sorted_product(grad.contiguous(), w.transpose(1, 2), ends, how)
    if needs_w:
        d_w = operators.sorted_outer(a, grad.contiguous(), ends, how)
    return d_a, d_w, None, None


_product.register_autograd(_backward, setup_context=_save)
