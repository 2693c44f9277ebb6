"""The refit of the attention's output projection: ridge regression towards the dense model.

The converted layers before have changed what the attention gets; its output projection, which costs
nothing more than before, makes up for part of that.
Notation: B rows, C tokens a row, T = B*C tokens, D hidden size, P inputs of o_proj.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moesaic.construct.activations import LayerStream
from moesaic.construct.free.ridge import Moments, solve
from moesaic.construct.free.view import held_back

__all__ = ["Attended", "attend_both"]


@dataclass
class Attended:
    """What the feed-forward part of both models gets; all [T, D]."""

    dense_residual_TD: torch.Tensor
    dense_normed_TD: torch.Tensor
    residual_TD: torch.Tensor
    """The converted model's residual stream."""
    normed_TD: torch.Tensor
    weight_DP: torch.Tensor | None
    """The new weight of o_proj, if it was refitted."""


@torch.inference_mode()
def attend_both(
    stream: LayerStream,
    module: Any,
    dense_BCD: torch.Tensor,
    moe_BCD: torch.Tensor,
    *,
    blend: float | None,
    dtype: torch.dtype,
) -> Attended:
    """Attention of one layer on both streams; with `blend`, o_proj refitted on the converted one.

    The target lies `blend` of the way from what the layer gives on the converted stream to what
    brings that stream back to the dense one, or, where the family puts a norm between, to what the
    dense model's projection gives. The weight is rounded to `dtype`, that of the file.
    """
    if blend is None:
        dense = stream.attend(module, dense_BCD)
        return Attended(*dense, *stream.attend(module, moe_BCD), None)
    projection = module.self_attn.o_proj
    normed = stream.output_norms(module)
    with _Tap(projection, inputs=False, outputs=normed) as dense_tap:
        dense_residual_TD, dense_normed_TD = stream.attend(module, dense_BCD)
    with _Tap(projection, inputs=True, outputs=normed) as tap:
        residual_TD, normed_TD = stream.attend(module, moe_BCD)
    mixed_TP = tap.seen_inputs()
    before_TD = moe_BCD.flatten(0, 1)
    if normed:
        target_TD = torch.lerp(tap.seen_outputs(), dense_tap.seen_outputs(), blend)
    else:
        target_TD = torch.lerp(residual_TD, dense_residual_TD, blend).sub_(before_TD)
    offset = 0.0 if projection.bias is None else projection.bias
    target_TD -= offset
    weight_DP = _refit(mixed_TP, target_TD, projection.weight, moe_BCD.shape[1])
    weight_DP = weight_DP.to(dtype).float()
    if normed:
        projection.weight = torch.nn.Parameter(weight_DP, requires_grad=False)
        residual_TD, normed_TD = stream.attend(module, moe_BCD)
    else:
        torch.addmm(before_TD, mixed_TP, weight_DP.T, out=residual_TD)
        residual_TD += offset
        for part, out in zip(residual_TD.split(_PART), normed_TD.split(_PART), strict=True):
            out.copy_(module.post_attention_layernorm(part))
    return Attended(dense_residual_TD, dense_normed_TD, residual_TD, normed_TD, weight_DP)


_PART = 8192


def _refit(
    mixed_TP: torch.Tensor, target_TD: torch.Tensor, start_DP: torch.Tensor, context: int
) -> torch.Tensor:
    held_T = held_back(len(mixed_TP), context).to(mixed_TP.device)
    sizes = (mixed_TP.shape[1], target_TD.shape[1])
    fitted, held = (Moments(*sizes, device=mixed_TP.device) for _ in range(2))
    for x_TP, y_TD, back_T in zip(
        mixed_TP.split(_PART), target_TD.split(_PART), held_T.split(_PART), strict=True
    ):
        fitted.add(x_TP[~back_T], y_TD[~back_T])
        held.add(x_TP[back_T], y_TD[back_T])
    return solve(fitted, held, start_PQ=start_DP.T.contiguous()).weights_PQ.T.contiguous()


class _Tap:
    """Keeps what goes into a module and what comes out, where that is asked for."""

    def __init__(self, module: torch.nn.Module, *, inputs: bool, outputs: bool) -> None:
        self._module, self._inputs, self._outputs = module, inputs, outputs
        self._in: list[torch.Tensor] = []
        self._out: list[torch.Tensor] = []

    def __enter__(self) -> _Tap:
        self._hook = self._module.register_forward_hook(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _see(self, _: torch.nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        if self._inputs:
            self._in.append(given[0].flatten(0, -2))
        if self._outputs:
            self._out.append(out.flatten(0, -2))

    def seen_inputs(self) -> torch.Tensor:
        """All inputs, [T, P]."""
        return torch.cat(self._in)

    def seen_outputs(self) -> torch.Tensor:
        """All outputs, [T, D]."""
        return torch.cat(self._out)
