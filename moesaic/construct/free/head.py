"""The dense model's head: predictions from normed streams, and how far two streams' are apart.

Notation: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from moesaic.construct.activations import LayerStream

__all__ = ["Head", "head_of"]


@dataclass(frozen=True)
class Head:
    """What turns a stream behind the last norm into predictions."""

    weight_VD: torch.Tensor
    cap: float | None = None
    """Logits are cap * tanh(logits / cap)."""

    def log_probabilities(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the next token: [T, V]."""
        return self._logits(x_TD).log_softmax(-1)

    def divergence(self, x_TD: torch.Tensor, wanted_TD: torch.Tensor) -> torch.Tensor:
        """KL of the predictions of `x_TD` from those of `wanted_TD`, mean of the tokens, in nats.

        Its gradient reaches `x_TD` alone. Logits are held for a few tokens at a time.
        """
        found: torch.Tensor = _Divergence.apply(x_TD, wanted_TD, self)
        return found

    def _logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        logits_TV = functional.linear(x_TD, self.weight_VD).float()
        return logits_TV if self.cap is None else logits_TV.div_(self.cap).tanh_().mul_(self.cap)


def head_of(stream: LayerStream) -> Head:
    """The head of a stream's model, in float32 on its device; a tied one is the embedding."""
    before, after = stream.dense.outer()
    name = after[-1] if len(after) > 1 else before[0]
    weight_VD = stream.dense.read(name).to(stream.device).float()
    return Head(weight_VD, stream.dense.config.get("final_logit_softcapping") or None)


class _Divergence(torch.autograd.Function):
    """The gradient with respect to the logits is the difference of the probabilities. It is taken
    to the stream at once, so that no logits are kept.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, wanted_TD: torch.Tensor, head: Head) -> torch.Tensor:
        needed = ctx.needs_input_grad[0]
        slope_TD = torch.empty_like(x_TD) if needed else None
        total = x_TD.new_zeros(())
        step = max(1, (_AT_ONCE if x_TD.is_cuda else _AT_ONCE_ON_CPU) // len(head.weight_VD))
        for start in range(0, len(x_TD), step):
            part = slice(start, start + step)
            logits_TV = head._logits(x_TD[part])
            given_TV = logits_TV.log_softmax(-1)
            log_wanted_TV = head.log_probabilities(wanted_TD[part])
            wanted_TV = log_wanted_TV.exp()
            total += log_wanted_TV.sub_(given_TV).mul_(wanted_TV).sum()
            if slope_TD is not None:
                change_TV = given_TV.exp_().sub_(wanted_TV)
                if head.cap is not None:
                    change_TV *= 1 - (logits_TV / head.cap).square_()
                slope_TD[part] = change_TV @ head.weight_VD
        if slope_TD is not None:
            ctx.save_for_backward(slope_TD.div_(len(x_TD)))
        return total / len(x_TD)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (slope_TD,) = ctx.saved_tensors
        return slope_TD * grads[0], None, None


_AT_ONCE, _AT_ONCE_ON_CPU = 1 << 26, 1 << 21
"""Logits that are held at a time."""
