"""The refit of attention: ridge regressions towards the dense model.

The converted layers before have changed what attention gets. Its output projection, and with `maps`
its query, key and value projections, cost nothing more than before and make up for part of that.
Notation: B rows, C tokens a row, T = B*C tokens, D hidden size, P inputs of o_proj.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from moesaic.construct.activations import ROWS_AT_ONCE, LayerStream
from moesaic.construct.free.ridge import regress
from moesaic.construct.free.view import held_back
from moesaic.construct.input_maps import fit_map, fold

__all__ = ["Attended", "attend_both"]


@dataclass
class Attended:
    """What the feed-forward part of both models gets; all [T, D]."""

    dense_residual_TD: torch.Tensor
    dense_normed_TD: torch.Tensor
    residual_TD: torch.Tensor
    """The converted model's residual stream."""
    normed_TD: torch.Tensor
    weights: dict[str, torch.Tensor]
    """The weights that were refitted, by name in the layer."""


@torch.inference_mode()
def attend_both(
    stream: LayerStream,
    module: Any,
    dense_BCD: torch.Tensor,
    moe_BCD: torch.Tensor,
    *,
    blend: float | None,
    maps: bool,
    dtype: torch.dtype,
) -> Attended:
    """Attention of one layer on both streams; with `blend`, o_proj refitted on the converted one.

    The target lies `blend` of the way from what the layer gives on the converted stream to what
    brings that stream back to the dense one, or, where the family puts a norm between, to what the
    dense model's projection gives. `maps` folds a map of what q, k and v read into them before.
    Weights are rounded to `dtype`, that of the file. Streams that are the same tensor are attended
    to once, and nothing is refitted.
    """
    if moe_BCD is dense_BCD:
        both = stream.attend(module, dense_BCD)
        return Attended(*both, *both, {})
    if blend is None:
        dense = stream.attend(module, dense_BCD)
        return Attended(*dense, *stream.attend(module, moe_BCD), {})
    attention, projection = module.self_attn, module.self_attn.o_proj
    readers = [name for name in _READERS if getattr(attention, name, None) is not None]
    normed = stream.output_norms(module)
    with (
        _Tap(projection, inputs=False, outputs=normed) as dense_tap,
        _Tap(getattr(attention, readers[0]), inputs=maps, outputs=False) as reads,
    ):
        dense_residual_TD, dense_normed_TD = stream.attend(module, dense_BCD)
    weights: dict[str, torch.Tensor] = {}
    held_T = held_back(moe_BCD[..., 0].numel(), moe_BCD.shape[1]).to(moe_BCD.device)
    if maps:
        given_TD = _read(stream, module, getattr(attention, readers[0]), moe_BCD)
        map_DD = fit_map(given_TD, reads.seen_inputs(), held_T)
        for name in readers:
            reader: Any = getattr(attention, name)
            folded = weights[f"self_attn.{name}.weight"] = fold(reader.weight, map_DD, dtype)
            _put(reader, folded)
        del given_TD
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
    found = regress(mixed_TP, target_TD, held_T, start_PQ=projection.weight.T.contiguous())
    weight_DP = weights[_OUTPUT] = found.weights_PQ.T.contiguous().to(dtype).float()
    if normed:
        _put(projection, weight_DP)
        residual_TD, normed_TD = stream.attend(module, moe_BCD)
    else:
        torch.addmm(before_TD, mixed_TP, weight_DP.T, out=residual_TD)
        residual_TD += offset
        for part, out in zip(residual_TD.split(_PART), normed_TD.split(_PART), strict=True):
            out.copy_(module.post_attention_layernorm(part))
    return Attended(dense_residual_TD, dense_normed_TD, residual_TD, normed_TD, weights)


_PART = 8192
_OUTPUT = "self_attn.o_proj.weight"
_READERS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa")


def _put(projection: Any, weight: torch.Tensor) -> None:
    projection.weight = torch.nn.Parameter(weight, requires_grad=False)


def _read(
    stream: LayerStream, module: Any, reader: torch.nn.Module, hidden_BCD: torch.Tensor
) -> torch.Tensor:
    """What `reader` is given, [T, D]; the layer is left as soon as it has been."""
    with _Tap(reader, inputs=True, outputs=False, leave=True) as tap:
        for rows_BCD in hidden_BCD.split(ROWS_AT_ONCE):
            with contextlib.suppress(_Seen):
                stream.block(module, rows_BCD)
    return tap.seen_inputs()


class _Seen(Exception):
    """What was looked for has been seen."""


class _Tap:
    """Keeps what goes into a module and what comes out, where that is asked for."""

    def __init__(
        self, module: torch.nn.Module, *, inputs: bool, outputs: bool, leave: bool = False
    ) -> None:
        self._module, self._inputs, self._outputs, self._leave = module, inputs, outputs, leave
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
        if self._leave:
            raise _Seen

    def seen_inputs(self) -> torch.Tensor:
        """All inputs, [T, P]."""
        return torch.cat(self._in)

    def seen_outputs(self) -> torch.Tensor:
        """All outputs, [T, D]."""
        return torch.cat(self._out)
