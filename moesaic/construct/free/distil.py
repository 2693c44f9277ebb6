"""Layer-wise distillation: one converted layer at a time follows the dense model through its rest.

Attention, norms, experts and router of the layer are trained so that the stream after it, and the
streams after the frozen dense layers behind it, are the dense model's as the norm that reads each
of them shows it, and that the predictions at the end are the dense model's. No gradient reaches
another converted layer: nothing is trained end to end.
Notation: B rows, C tokens a row, T = B*C tokens, D hidden size, J places where streams are
compared.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field

from moesaic.construct.free.block import RoutedBlock
from moesaic.construct.free.head import Head
from moesaic.core.config import Config
from moesaic.core.errors import UserError

__all__ = ["Distillation", "Target", "distil"]


class Distillation(Config):
    """Settings of `refine: layerwise`; on a CPU, `passes`, `ahead` and `batch` are 1, 1 and 1024
    where they are not given.
    """

    passes: float = Field(default=6.0, gt=0)
    """Passes over the calibration tokens."""
    ahead: int | None = Field(default=None, ge=0)
    """Frozen dense layers behind the layer, whose outputs are compared as well; null: all."""
    kl: float = Field(default=1.0, ge=0)
    """Weight of the divergence of the predictions, where `ahead` reaches the last layer."""
    batch: int = Field(default=8192, ge=1)
    """Tokens of a step, in whole rows of text."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """Highest rate of Adam; warms up over a twentieth of the steps and falls as a cosine."""

    def on(self, device: torch.device) -> Distillation:
        """The settings on a device."""
        if device.type != "cpu":
            return self
        rest = {k: v for k, v in _ON_CPU.items() if k not in self.model_fields_set}
        return self.model_copy(update=rest)


_ON_CPU = {"passes": 1.0, "ahead": 1, "batch": 1024}


@dataclass(frozen=True)
class Target:
    """The dense model's stream at one place, what leads there, and the norm that reads it."""

    stream_BCD: torch.Tensor | None
    """None: made of the place before whenever it is needed; the first place has one."""
    norm: Callable[[torch.Tensor], torch.Tensor]
    lead: Callable[[torch.Tensor], torch.Tensor] | None = None
    """The frozen layer between the place before and this one; None for the first place."""


def distil(
    block: RoutedBlock,
    rows_BCD: torch.Tensor,
    targets: Sequence[Target],
    *,
    head: Head | None,
    settings: Distillation,
    seed: int,
    graph: bool = False,
) -> dict[str, float]:
    """Train `block` on the rows; returns what is missed before and after, on rows held back.

    `missed_*` are squares as a share of the squares of the normed dense streams, mean of the
    places; with a `head`, which belongs to the last place, `kl_*` are the divergence of the
    predictions in nats a token; `loss_*` are what training lowers, J * missed + settings.kl * kl.
    Where the loss does not fall, the block stays as it was. `graph` replays one captured step on a
    GPU. Raises UserError when the loss is not finite.
    """
    held_B = _held_rows(len(rows_BCD)).to(rows_BCD.device)
    held_N, train_N = (torch.nonzero(part).flatten() for part in (held_B, ~held_B))
    if not len(train_N):
        train_N = held_N
    size = max(1, min(settings.batch // rows_BCD.shape[1], len(train_N)))
    journey = _Journey(targets, head, size)

    def loss(some_B: torch.Tensor) -> torch.Tensor:
        y_BCD = block(rows_BCD.index_select(0, some_B))
        with _half_precision(y_BCD.device):
            missed, kl = journey(y_BCD, some_B)
        return missed + settings.kl * kl

    @torch.no_grad()
    def measured() -> dict[str, float]:
        missed = kl = 0.0
        for some_B in held_N.split(size):
            parts = journey(block(rows_BCD.index_select(0, some_B)), some_B)
            missed, kl = (
                sum_ + float(part) * len(some_B) / len(held_N)
                for sum_, part in zip((missed, kl), parts, strict=True)
            )
        found = {"missed": missed / len(targets), "loss": missed + settings.kl * kl}
        return found if head is None else found | {"kl": kl}

    before = measured()
    start = {name: weight.detach().clone() for name, weight in block.named_parameters()}
    steps = max(1, math.ceil(settings.passes * len(train_N) / size))
    with _faster_products():
        stepper = _Stepper(block, loss, train_N[:size].clone(), settings.learning_rate, graph)
        generator = torch.Generator().manual_seed(seed)
        order: list[torch.Tensor] = []
        for step in range(steps):
            if not order:
                mixed_N = torch.randperm(len(train_N), generator=generator).to(train_N.device)
                order = [part for part in train_N[mixed_N].split(size) if len(part) == size]
            stepper.step(order.pop(), _rate(step, steps))
    after = measured()
    if not math.isfinite(after["loss"]):
        raise UserError(
            f"The layer-wise distillation diverged at learning_rate={settings.learning_rate}. "
            "Lower it."
        )
    if after["loss"] >= before["loss"]:
        block.load_state_dict(start)
        after = before
    return {
        f"{name}_{when}": values[name]
        for name in before
        for when, values in (("before", before), ("after", after))
    }


class _Journey:
    """From place to place through the frozen layers, and what differs at each of them."""

    def __init__(self, targets: Sequence[Target], head: Head | None, rows: int) -> None:
        self._targets, self._head = targets, head
        first = targets[0].stream_BCD
        assert first is not None
        sums, rows_N = [0.0] * len(targets), torch.arange(len(first), device=first.device)
        with torch.no_grad():
            for some_B in rows_N.split(rows):
                for place, (_, normed_BCD) in enumerate(self._wanted(some_B)):
                    sums[place] += float(normed_BCD.square().sum())
        self._squares = [total / first.numel() + 1e-30 for total in sums]

    def __call__(
        self, y_BCD: torch.Tensor, some_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Missed squares, the sum of the places' shares, and the KL, of rows that start as `y`."""
        missed, kl = y_BCD.new_zeros(()), y_BCD.new_zeros(())
        places = zip(self._wanted(some_B), self._squares, strict=True)
        for (target, wanted_BCD), square in places:
            y_BCD = y_BCD if target.lead is None else target.lead(y_BCD)
            given_BCD = target.norm(y_BCD)
            missed = missed + (given_BCD - wanted_BCD).square().mean() / square
        if self._head is not None:
            kl = self._head.divergence(given_BCD.flatten(0, 1), wanted_BCD.flatten(0, 1))
        return missed, kl

    def _wanted(self, some_B: torch.Tensor) -> Iterator[tuple[Target, torch.Tensor]]:
        """The dense model's normed stream at every place."""
        dense_BCD: torch.Tensor | None = None
        for target in self._targets:
            with torch.no_grad():
                if target.stream_BCD is not None:
                    dense_BCD = target.stream_BCD.index_select(0, some_B)
                else:
                    assert target.lead is not None
                    assert dense_BCD is not None
                    dense_BCD = target.lead(dense_BCD)
                normed_BCD = target.norm(dense_BCD)
            yield target, normed_BCD


class _Stepper:
    """Steps of Adam on batches of one size; on a GPU one captured step that is replayed."""

    def __init__(
        self,
        block: RoutedBlock,
        loss: Callable[[torch.Tensor], torch.Tensor],
        example_B: torch.Tensor,
        learning_rate: float,
        graph: bool,
    ) -> None:
        self._loss, self._some_B, self._peak = loss, example_B, learning_rate
        on_gpu = example_B.is_cuda
        self._optimizer = torch.optim.Adam(
            block.parameters(),
            lr=torch.tensor(learning_rate, device=example_B.device) if on_gpu else learning_rate,
            betas=(0.9, 0.98),
            eps=1e-10,  # the loss is a share: gradients are small
            capturable=on_gpu,
            fused=True,
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        if graph and on_gpu:
            self._capture(block)

    def step(self, some_B: torch.Tensor, rate: float) -> None:
        """One step on these rows, at a share of the highest rate."""
        self._some_B.copy_(some_B)
        group = self._optimizer.param_groups[0]
        if some_B.is_cuda:
            group["lr"].fill_(self._peak * rate)  # where a captured step reads it
        else:
            group["lr"] = self._peak * rate
        if self._graph is None:
            self._once()
        else:
            self._graph.replay()

    def _once(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._loss(self._some_B).backward()
        self._optimizer.step()

    def _capture(self, block: RoutedBlock) -> None:
        start = [weight.detach().clone() for weight in block.parameters()]
        side = torch.cuda.Stream(self._some_B.device)
        side.wait_stream(torch.cuda.current_stream(self._some_B.device))
        with torch.cuda.stream(side):
            for _ in range(3):  # kernels are chosen and the moments made
                self._once()
        torch.cuda.current_stream(self._some_B.device).wait_stream(side)
        with torch.no_grad():
            for weight, saved in zip(block.parameters(), start, strict=True):
                weight.copy_(saved)
            for state in self._optimizer.state.values():
                for moment in state.values():
                    moment.zero_()
        self._graph = torch.cuda.CUDAGraph()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(self._graph):
            self._loss(self._some_B).backward()
            self._optimizer.step()


@contextlib.contextmanager
def _faster_products() -> Iterator[None]:
    """TF32 products, which gradient steps do not suffer from; what is measured stays float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _half_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bfloat16 products on a GPU, for what is frozen: the layer that is trained loses by them."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


def _held_rows(rows: int) -> torch.Tensor:
    """Every eighth row, or the last of fewer: bool [B]."""
    place_B = torch.arange(rows)
    return place_B % 8 == 7 if rows >= 8 else place_B == rows - 1


def _rate(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
