"""The six products of one call, on the kernels that suit the device and the tile.

N routed rows, T tokens, D hidden size, E experts, I expert width, J = 2I.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from moesaic.kernels.reference import Activation
from moesaic.kernels.triton import portable
from moesaic.kernels.triton.budget import Layer, cut, ranges
from moesaic.kernels.triton.combine import combine
from moesaic.kernels.triton.metadata import TILE_ROWS, Routing

_HOPPER = 9  # compute capability with the instructions of `products`


@cache
def hopper(device: torch.device) -> bool:
    """Whether the device runs `products`; elsewhere, and for other tiles, it is `portable`."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER


@cache
def _hopper_modules() -> tuple[Any, Any]:
    from moesaic.kernels.triton import products, tune  # Gluon: not on every Triton

    return products, tune


class Products:
    """The six products of one call, on the kernels that suit the device and the tile."""

    def __init__(
        self,
        routing: Routing,
        x_TD: torch.Tensor,
        down_EDI: torch.Tensor,
        activation: Activation,
    ):
        tokens, rows = x_TD.shape[0], routing.weight_N.shape[0]
        experts, hidden, width = down_EDI.shape
        self.routing, self.activation = routing, activation
        self.hopper = hopper(x_TD.device) and routing.tile_rows == TILE_ROWS
        top_k = rows // max(1, tokens)
        self.cuts = cut(Layer(tokens, hidden, width, experts, top_k, x_TD.itemsize))
        if not self.hopper:  # whose products know no pieces of h
            self.cuts = replace(self.cuts, wa=width)
        self._about: dict[str, Any] = {
            "shape": (hidden, width, experts),
            "rows": rows,
            "dtype": x_TD.dtype,
            "device": x_TD.device,
        }

    def up(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        *,
        h: torch.Tensor | None,
        routing: Routing | None = None,
    ) -> torch.Tensor:
        """Return a; `h`: where h is written."""
        how: dict[str, Any] = {"keep_h": h is not None, "activation": self.activation, "h_NJ": h}
        return self._run("up", "up", x, weight, routing=routing, **how)[0]

    def down(
        self,
        a: torch.Tensor,
        weight: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        routing: Routing | None = None,
    ) -> torch.Tensor:
        how: dict[str, Any] = {"transposed": True, "out_NM": out}
        return self._run("down", "rows", a, weight, routing=routing, **how)

    def x_gradient(
        self, dh: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._run("x_gradient", "rows", dh, weight, transposed=False, out_NM=out)

    def down_summed(
        self,
        a_NI: torch.Tensor,
        down_EDI: torch.Tensor,
        out_TD: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        """Fill out_TD with the weighted sums of a @ down's rows, some columns at a time."""
        return self._summed(self.down, a_NI, down_EDI, 1, out_TD, self.cuts.y, weights_TK)

    def x_gradient_summed(
        self, dh_NJ: torch.Tensor, gate_up_EJD: torch.Tensor, out_TD: torch.Tensor
    ) -> torch.Tensor:
        """Fill out_TD with the sums of dh @ gate_up's rows, some columns at a time."""
        return self._summed(self.x_gradient, dh_NJ, gate_up_EJD, 2, out_TD, self.cuts.dx)

    def _summed(
        self,
        product: Callable[..., torch.Tensor],
        rows_NK: torch.Tensor,
        weight: torch.Tensor,
        axis: int,
        out_TD: torch.Tensor,
        columns: int,
        weights_TK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        inverse_N, rows, hidden = self.routing.inverse_N, rows_NK.shape[0], out_TD.shape[1]
        if columns >= hidden:
            return combine(product(rows_NK, weight), inverse_N, out_TD, weights_TK=weights_TK)
        memory = out_TD.new_empty(rows * columns)
        for start, end in ranges(hidden, columns):
            y = memory[: rows * (end - start)].view(rows, end - start)
            product(rows_NK, weight.narrow(axis, start, end - start), out=y)
            combine(y, inverse_N, out_TD[:, start:end], weights_TK=weights_TK)
        return out_TD

    def activation_gradient(
        self,
        grad: torch.Tensor,
        down: torch.Tensor,
        h: torch.Tensor,
        *,
        clear: bool,
        columns: tuple[int, int] | None = None,
        dh: torch.Tensor | None = None,
    ) -> Any:
        """Return dh, weight * a and the routing weights' gradient in parts.

        Of some `columns` of I; in `dh`, if given: it may be h itself.
        """
        name = "activation_gradient"
        how: dict[str, Any] = {"activation": self.activation}
        if self.hopper:
            how |= {"clear": clear, "columns": columns, "finally_": {"dh_NJ": dh}}
        return self._run(name, name, grad, down, h, **how)

    def up_gradient(self, x: torch.Tensor, dh: torch.Tensor) -> torch.Tensor:
        return self._run("up_gradient", "outer", x, dh, transposed=True)

    def down_gradient(
        self, grad: torch.Tensor, wa: torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        how: dict[str, Any] = {"transposed": False}
        if self.hopper:
            how["out"] = out
        return self._run("down_gradient", "outer", grad, wa, **how)

    def _run(
        self,
        product: str,
        function: str,
        *tensors: torch.Tensor,
        routing: Routing | None = None,
        finally_: Mapping[str, Any] | None = None,
        **how: Any,
    ) -> Any:
        """`finally_`: arguments of the call whose result counts, not of those that are timed."""
        routing = routing or self.routing
        if not self.hopper:
            return getattr(portable, function)(*tensors, routing, **how)
        products, tune = _hopper_modules()
        run: Callable[..., Any] = getattr(products, function)
        launch = tune.fastest(
            product,
            lambda launch: run(*tensors, routing, launch, **how),
            **self._about,
        )
        if launch.copy and not self._may_copy(product):
            launch = replace(launch, copy=False)
        return run(*tensors, routing, launch, **how, **(finally_ or {}))

    def _may_copy(self, product: str) -> bool:
        return self.cuts.copy_up if product == "up" else self.cuts.copy_gradient
