"""Join dense models of one shape into one mixture: each model's feed-forward layers an expert.

What is not an expert is the models' mean (Branch-Train-MiX, arXiv 2403.07816) or the first model's
(mergekit). Routers come from each model's own text. They are fitted to what they will really see:
the text runs through the joined model itself, layer by layer, the routers of the layers before
already in place, and the inputs are taken behind the norm in front of the experts. (mergekit takes
the layer's input of one of the dense models, before attention and norm.)

Notation: T tokens, D hidden size, E experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from moesaic.construct.activations import LayerStream, text_sample
from moesaic.construct.dense import DenseModel
from moesaic.construct.merged import check_alike
from moesaic.construct.upcycle_method import UpcycleInputs, UpcycleMethod
from moesaic.construct.upcycles import UPCYCLES
from moesaic.core.errors import UserError
from moesaic.measure.exactness import FeedForward, feed_forward

_SCALES = [2.0**power for power in range(-3, 9)]


@UPCYCLES.register
class Join(UpcycleMethod):
    """Several dense models of one shape, each an expert, with routers from their own text."""

    several: ClassVar[bool] = True

    others: Literal["mean", "first"] = "mean"
    """What is not an expert: the mean of the models, or the first model's."""
    router: Literal["ridge", "centroid", "random"] = "ridge"
    """From each model's text: a ridge regression that tells the texts apart; the mean input of the
    text, less the mean of all, at length 1; or random weights, which need no text."""
    tokens: int = Field(default=8192, ge=64)
    """Tokens of text per model."""
    context: int = Field(default=512, ge=2)
    """Tokens in a row."""
    ridge: float = Field(default=1e-3, gt=0)
    """Strength of the ridge, as a share of the mean squared input."""

    def check(self, inputs: UpcycleInputs) -> None:
        """Raise UserError unless models are alike and every model has a text of its own."""
        count = len(inputs.sources)
        if count < 2:
            raise UserError(
                "join was given 1 model. Give two or more, or use the method copies to make "
                "experts of one."
            )
        if inputs.experts != count:
            raise UserError(
                f"{inputs.experts} routed experts were asked of {count} models. "
                f"Leave experts out, or give {count + inputs.shared}."
            )
        check_alike(inputs.sources)
        if self.router == "random":
            super().check(inputs)
            return
        given = len(inputs.data or ())
        if given != count:
            raise UserError(
                f"{given} texts were given for {count} models, whose routers need one each. "
                f"Give data {count} times, in the order of the models, or set router=random."
            )

    def exact(self, inputs: UpcycleInputs) -> bool:
        """Only where all models are one: otherwise there is no single dense model to equal."""
        first, *others = inputs.sources
        return all(_same(first, other) for other in others)

    def expert(self, inputs: UpcycleInputs, layer: int, expert: int, dense: Any) -> FeedForward:
        """The layer of model number `expert`."""
        made: FeedForward = dense[expert]
        return made

    def routers(self, inputs: UpcycleInputs) -> Iterator[torch.Tensor]:
        """Fit the routers layer by layer on the joined model's own hidden states."""
        if self.router == "random":
            yield from super().routers(inputs)
            return
        path = inputs.dense.checkpoint.path
        rows = [
            text_sample(path, data, tokens=self.tokens, context=self.context)
            for data in inputs.data or ()
        ]
        label_T = torch.repeat_interleave(
            torch.arange(len(rows)), torch.tensor([ids.numel() for ids in rows])
        )
        # Every eighth row is held back: it sets the sharpness and measures the router. Tokens of
        # one row are too alike to be held back from each other, unless there are no eight rows.
        places = [torch.arange(ids.numel()) for ids in rows]
        held_T = torch.cat(
            [
                (place // ids.shape[1] if len(ids) >= 8 else place) % 8 == 7
                for ids, place in zip(rows, places, strict=True)
            ]
        )
        stream = LayerStream(inputs.dense, context=rows[0].shape[1])
        hidden_BCD = stream.embed(torch.cat(rows))
        right: list[float] = []
        for layer in range(inputs.dense.layers):
            module: Any = stream.load(layer)
            residual_TD, x_TD = stream.attend(module, hidden_BCD)
            router_ED = self._fit(x_TD[~held_T], label_T[~held_T], len(rows))
            router_ED = router_ED * _sharpness(x_TD[held_T] @ router_ED.T, label_T[held_T])
            logits_TE = x_TD @ router_ED.T
            right.append(float((logits_TE.argmax(1) == label_T)[held_T].float().mean()))
            yield router_ED
            out_TD = _mixture(inputs, layer, x_TD, logits_TE)
            hidden_BCD = stream.finish(module, residual_TD, out_TD).view_as(hidden_BCD)
        inputs.facts["own_text_first"] = [round(share, 4) for share in right]

    def _fit(self, x_TD: torch.Tensor, label_T: torch.Tensor, experts: int) -> torch.Tensor:
        """Router rows [E, D] without sharpness."""
        target_TE = torch.nn.functional.one_hot(label_T, experts).float()
        if self.router == "centroid":
            mean_ED = (target_TE.T @ x_TD) / target_TE.sum(0)[:, None]
            return torch.nn.functional.normalize(mean_ED - mean_ED.mean(0), dim=1)
        # float64: with fewer tokens than dimensions the Gram matrix is singular but for the ridge.
        x_TD, target_TE = x_TD.double(), target_TE.double() - 1 / experts
        gram_DD = x_TD.T @ x_TD / len(x_TD)
        gram_DD.diagonal().add_(self.ridge * float(gram_DD.diagonal().mean()))
        return torch.linalg.solve(gram_DD, x_TD.T @ target_TE / len(x_TD)).T.float()


def _same(one: DenseModel, other: DenseModel) -> bool:
    """Whether two models have the same weights; they are read up to the first that differs."""
    return one.shapes == other.shapes and all(
        torch.equal(one.read(name), other.read(name)) for name in one.shapes
    )


def _sharpness(logits_TE: torch.Tensor, label_T: torch.Tensor) -> float:
    """The factor on logits under which the texts' own experts are likeliest."""
    losses = [
        float(torch.nn.functional.cross_entropy(logits_TE * scale, label_T)) for scale in _SCALES
    ]
    return _SCALES[losses.index(min(losses))]


@torch.inference_mode()
def _mixture(
    inputs: UpcycleInputs, layer: int, x_TD: torch.Tensor, logits_TE: torch.Tensor
) -> torch.Tensor:
    """What the joined layer gives, [T, D]: one expert in memory at a time."""
    top_TK, ids_TK = logits_TE.topk(inputs.selects, dim=1)
    weights_TK = top_TK.softmax(1) * inputs.routed_share
    out_TD = torch.zeros_like(x_TD)
    for expert, source in enumerate(inputs.sources):
        weights = FeedForward(*(source.read(name) for name in source.ffn(layer)))
        activation = source.activation
        token_N, choice_N = torch.where(ids_TK == expert)
        part_ND = feed_forward(x_TD[token_N], weights, activation)
        out_TD.index_add_(0, token_N, part_ND * weights_TK[token_N, choice_N, None])
        if expert == 0 and inputs.shared:
            share = 1 - inputs.routed_share
            out_TD += share * feed_forward(x_TD, weights, activation)
    return out_TD
