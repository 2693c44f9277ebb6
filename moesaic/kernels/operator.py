"""The experts layer as one differentiable operator, run eagerly or traced.

T tokens, D hidden size, E experts, I expert width, J = 2I, K experts a token.

Eagerly it is an autograd Function. Under torch.compile both passes are opaque custom operators: no
graph can hold the lengths that the routing decides, and dynamo of torch 2.11 gave zero gradients
for the Function (measured). Schemas are written out because annotations are strings here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

_INPUTS = "Tensor x, Tensor gate_up, Tensor down, Tensor ids, Tensor weights"
Notes = dict[str, Any]
"""What a backward pass leaves for the next one through the same, retained graph."""


class Operator:
    """Call with x_TD, gate_up_EJD, down_EDI, ids_TK, weights_TK and how, positionally.

    `forward` takes the same and returns out_TD and three tensors that the backward pass needs;
    `shapes` returns empty ones like those. `backward(grad_TD, saved, needs, notes, *how)` returns
    the gradients of x, gate_up, down and weights, None where not `needs`; `saved` are these four
    inputs and the three tensors, `notes` is None where nothing saved may be touched. `how` is the
    schema of the further arguments.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., tuple[torch.Tensor, ...]],
        backward: Callable[..., list[torch.Tensor | None]],
        *,
        shapes: Callable[..., tuple[torch.Tensor, ...]],
        how: str,
    ) -> None:
        self._name = name
        self._function = _function(forward, backward)
        _register(name, forward, backward, shapes, how)

    def __call__(self, *arguments: Any) -> torch.Tensor:
        """Return out_TD, differentiable in all but the ids, once."""
        if torch.compiler.is_compiling():
            traced: torch.Tensor = getattr(torch.ops.moesaic, self._name)(*arguments)[0]
            return traced
        out_TD: torch.Tensor = self._function.apply(*arguments)
        return out_TD


def _function(forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    class Experts(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
            out_TD, *kept = forward(*arguments)
            _keep(ctx, arguments, kept)
            ctx.notes = {}
            return out_TD

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            gradients = backward(grad_TD, ctx.saved_tensors, _needs(ctx), ctx.notes, *ctx.how)
            return _in_place_of_inputs(gradients, ctx.how)

    return Experts


def _register(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    shapes: Callable[..., Any],
    how: str,
) -> None:
    forward_op = torch.library.custom_op(
        f"moesaic::{name}",
        forward,
        mutates_args=(),
        schema=f"({_INPUTS}, {how}) -> (Tensor, Tensor, Tensor, Tensor)",
    )
    forward_op.register_fake(shapes)

    @torch.library.custom_op(
        f"moesaic::{name}_backward",
        mutates_args=(),
        schema=f"(Tensor grad, Tensor[] saved, bool[] needs, {how}) -> Tensor[]",
    )
    def backward_op(
        grad: torch.Tensor, saved: list[torch.Tensor], needs: list[bool], *how: Any
    ) -> list[torch.Tensor]:
        gradients = backward(grad, saved, needs, None, *how)
        return [grad.new_empty(0) if gradient is None else gradient for gradient in gradients]

    @backward_op.register_fake
    def _(
        grad: torch.Tensor, saved: list[torch.Tensor], needs: list[bool], *how: Any
    ) -> list[torch.Tensor]:
        return [
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            if needed
            else grad.new_empty(0)
            for tensor, needed in zip(saved[:4], needs, strict=True)
        ]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        _keep(ctx, inputs, output[1:])
        ctx.set_materialize_grads(False)

    def through(ctx: Any, grad_TD: torch.Tensor, *unused: Any) -> tuple[Any, ...]:
        needs = _needs(ctx)
        found = getattr(torch.ops.moesaic, f"{name}_backward")(
            grad_TD, ctx.saved_tensors, needs, *ctx.how
        )
        gradients = [g if needed else None for g, needed in zip(found, needs, strict=True)]
        return _in_place_of_inputs(gradients, ctx.how)

    forward_op.register_autograd(through, setup_context=setup)


def _keep(ctx: Any, arguments: Sequence[Any], kept: Sequence[torch.Tensor]) -> None:
    x_TD, gate_up_EJD, down_EDI, _, weights_TK, *ctx.how = arguments
    ctx.save_for_backward(x_TD, gate_up_EJD, down_EDI, weights_TK, *kept)


def _needs(ctx: Any) -> list[bool]:
    x, gate_up, down, _, weights = ctx.needs_input_grad[:5]
    return [x, gate_up, down, weights]


def _in_place_of_inputs(
    gradients: Sequence[torch.Tensor | None], how: Sequence[Any]
) -> tuple[torch.Tensor | None, ...]:
    d_x, d_gate_up, d_down, d_weights = gradients
    return d_x, d_gate_up, d_down, None, d_weights, *[None] * len(how)
