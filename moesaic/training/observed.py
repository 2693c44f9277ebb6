"""A balance loss for models that compute none: made of what their routers are heard to say.

Hooks keep a router's logits with their gradient, and the ids that its experts are given, while a
forward pass is listened to; a layer that is recomputed in the backward pass is not heard again.

The loss of one layer is `share_balance` over each sequence by itself, of the router's own scores
brought to sum 1 (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), so it does not depend on how an
update's sequences are divided into passes. Layers are summed, as DeepSeek's programs do.

    logits_TE, ids_TK, weights_TK   of one layer: T rows, E experts, K chosen
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from moesaic.models.balance import share_balance, sum_losses
from moesaic.routing.sites import Choice, Heard, Site, find_sites, hear_experts

SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(-1),
    "sigmoid": torch.sigmoid,
    "square root of softplus": lambda logits_TE: F.softplus(logits_TE).sqrt(),
    "plain": lambda logits_TE: logits_TE,  # what the router returns are scores already
}
"""What routers make of their logits before they choose."""

_PROBED_TOKENS = 16
_ALIKE = 0.03
"""Largest relative difference of weights and scores; bfloat16 has 8 bits."""


class Observed(NamedTuple):
    """One pass: the loss, and choices and weights by layer and expert [L, E] (None: E differs)."""

    loss: torch.Tensor
    load_LE: torch.Tensor | None
    importance_LE: torch.Tensor | None


class RouterObserver:
    """Listens to the decoder's routers of one model.

    `score` names their score function and `widths` their numbers of experts, once probed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sites = [site for site in find_sites(model) if site.stack == "decoder"]
        self.score: str | None = None
        self.widths: tuple[int, ...] = ()
        self.listening = False
        self._router: list[Any] = [None] * len(self.sites)
        self._experts: list[Any] = [None] * len(self.sites)
        self._logits: list[Any] = [None] * len(self.sites)
        for index, site in enumerate(self.sites):
            self._listen(index, site)

    def _listen(self, index: int, site: Site) -> None:
        def router(_: nn.Module, args: Any, output: Any) -> None:
            if self.listening:
                self._router[index] = output

        def logits(_: nn.Module, args: Any, output: Any) -> None:
            if self.listening:
                self._logits[index] = output

        def experts(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self.listening:
                self._experts[index] = hear_experts(args, kwargs)

        if site.router is not None:
            site.router.register_forward_hook(router)
        if site.logits is not None:
            site.logits.register_forward_hook(logits)
        if site.experts is not None:
            site.experts.register_forward_pre_hook(experts, with_kwargs=True)

    def start(self) -> None:
        """Listen from now on."""
        for kept in (self._router, self._experts, self._logits):
            for index in range(len(kept)):
                kept[index] = None
        self.listening = True

    def stop(self) -> list[Choice]:
        """Stop listening and return what each site said, logits with their gradient.

        Raises ValueError for a site that said nothing that is understood.
        """
        self.listening = False
        found = [self._choice(index, site) for index, site in enumerate(self.sites)]
        for kept in (self._router, self._experts, self._logits):
            for index in range(len(kept)):
                kept[index] = None  # let go of the graph
        return found

    def _choice(self, index: int, site: Site) -> Choice:
        output = self._router[index]
        if isinstance(output, torch.Tensor):
            output = (output,)
        router = None
        if isinstance(output, (tuple, list)):
            router = tuple([x for x in output[:4] if isinstance(x, torch.Tensor)])
        return site.read(site, Heard(router, self._experts[index], self._logits[index]))

    def read(self, choices: list[Choice], sequences: int) -> Observed:
        """Return loss and counts of one pass over so many sequences of one length."""
        assert self.score is not None, "probe comes first"
        losses, loads, weights = [], [], []
        for choice in choices:
            assert choice.logits is not None, "the probe made sure of it"
            scores_TE = SCORES[self.score](choice.logits.float())
            probs_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
            losses.append(share_balance(probs_TE, choice.ids, groups=sequences))
            empty_E = probs_TE.new_zeros(probs_TE.shape[-1])
            ids_N, weights_N = choice.ids.flatten(), choice.weights.detach().float().flatten()
            loads.append(empty_E.index_add(0, ids_N, torch.ones_like(weights_N)))
            weights.append(empty_E.index_add(0, ids_N, weights_N))
        loss = sum_losses(losses)
        if len({len(load_E) for load_E in loads}) != 1:
            return Observed(loss, None, None)
        device = loss.device
        return Observed(
            loss,
            torch.stack([load_E.detach().to(device) for load_E in loads]),
            torch.stack([weight_E.to(device) for weight_E in weights]),
        )

    def probe(self, model: nn.Module) -> str | None:
        """Find the score function from one tiny pass; return why the routers cannot be read.

        Weights of chosen experts are in proportion to their scores, whatever they are divided by
        or multiplied with. The routers get random weights for this pass: of new ones, which may be
        zero, nothing could be told. Nothing is left changed.
        """
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        weight = embeddings.weight
        draw = torch.Generator().manual_seed(0)
        ids_BT = torch.randint(0, weight.shape[0], (1, _PROBED_TOKENS), generator=draw)
        devices = [weight.device] if weight.device.type == "cuda" else []
        try:
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices),
                _random_routers(self.sites, draw),
                _evaluating(model),
            ):
                self.start()
                model(input_ids=ids_BT.to(weight.device), use_cache=False)
                choices = self.stop()
        except ValueError as error:
            return str(error)
        finally:
            self.listening = False
        for site, choice in zip(self.sites, choices, strict=True):
            if choice.logits is None or choice.logits.shape[0] != _PROBED_TOKENS:
                return f"{site.path} does not say its logits"
            if bool((choice.ids < 0).any()) or choice.ids.shape[0] != _PROBED_TOKENS:
                return f"{site.path} drops tokens"
        found = list(zip(self.sites, choices, strict=True))
        apart = {name: max(_apart(name, *said) for said in found) for name in SCORES}
        self.score = score = min(apart, key=lambda name: apart[name])
        if apart[score] > _ALIKE:
            return f"{self.sites[0].path} weighs experts in a way that is not known"
        self.widths = tuple(c.logits.shape[1] for c in choices if c.logits is not None)
        return None


def _apart(name: str, site: Site, choice: Choice) -> float:
    """Relative difference of weights and scores after scaling both; median over rows and ids."""
    assert choice.logits is not None
    logits_TE, weights_TK = choice.logits.float(), choice.weights.float()
    scale_E = getattr(site.router, "per_expert_scale", None)  # Gemma's, on the weights
    if isinstance(scale_E, torch.Tensor):
        weights_TK = weights_TK / scale_E.detach().float()[choice.ids]
    scores_TE = SCORES[name](logits_TE)
    if bool((scores_TE < 0).any()):
        return math.inf
    scores_TK = scores_TE.gather(1, choice.ids)
    dims = (-1,) if weights_TK.shape[1] > 1 else (0, 1)  # of one expert a row only its size tells
    scores_TK, weights_TK = (x / x.sum(dims, keepdim=True) for x in (scores_TK, weights_TK))
    return float(((scores_TK - weights_TK).abs() / weights_TK.abs().clamp_min(1e-6)).median())


@contextmanager
def _random_routers(sites: list[Site], draw: torch.Generator) -> Iterator[None]:
    """Give every router random weights inside the block, and its own back, bit for bit."""
    routers = [site.router for site in sites if site.router is not None]
    weights = {id(p): p for router in routers for p in router.parameters() if p.ndim == 2}
    kept = [(p, p.detach().clone()) for p in weights.values()]
    try:
        for p, _ in kept:
            # logits of size 3: around 0 the score functions are much alike
            p.copy_(torch.randn(p.shape, generator=draw) * (3.0 / math.sqrt(p.shape[-1])))
        yield
    finally:
        for p, before in kept:
            p.copy_(before)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every module's own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
