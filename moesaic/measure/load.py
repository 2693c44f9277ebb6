"""How evenly a model spreads tokens over its experts: load and importance per layer and domain.

    load        how many of the tokens chose an expert (each token counts once for each of its K)
    importance  the sum of the weights given to an expert

    counts_DLE, importance_DLE    D domains, L layers with experts, E routed experts

Padding is never counted, and neither are shared experts, which every token passes through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moesaic.core.console import progress
from moesaic.core.errors import UserError
from moesaic.data.batches import document_rows
from moesaic.data.sources import Data, open_domains
from moesaic.measure.rows import by_length, evaluating, padded

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class LoadReport:
    """Load of every expert; `tokens_D` is how many tokens were run, `top_k` the experts of each.

    `top_k` is a list where layers differ.
    """

    domains: tuple[str, ...]
    layers: tuple[str, ...]
    top_k: int | list[int]
    tokens_D: np.ndarray
    counts_DLE: np.ndarray
    importance_DLE: np.ndarray

    @property
    def share_DLE(self) -> np.ndarray:
        """Each expert's share of the routed tokens: sums to 1 over the experts."""
        return load_share(self.counts_DLE)

    def summary(self) -> dict[str, Any]:
        """Return everything as JSON: per domain and for all of them together (``all``)."""
        counts = dict(zip(self.domains, self.counts_DLE, strict=True))
        counts["all"] = self.counts_DLE.sum(axis=0)
        weights = dict(zip(self.domains, self.importance_DLE, strict=True))
        weights["all"] = self.importance_DLE.sum(axis=0)
        tokens = dict(zip(self.domains, self.tokens_D.tolist(), strict=True))
        tokens["all"] = int(self.tokens_D.sum())
        return {
            "layers": list(self.layers),
            "experts": int(self.counts_DLE.shape[-1]),
            "top_k": self.top_k,
            "domains": {
                name: {
                    "tokens": tokens[name],
                    "load": load_share(counts_LE).tolist(),
                    "importance": load_share(weights[name]).tolist(),
                    "cv": variation(counts_LE).tolist(),
                    "entropy": entropy(counts_LE).tolist(),
                    "dead": dead_experts(counts_LE).tolist(),
                }
                for name, counts_LE in counts.items()
            },
        }


def load_share(counts: Array) -> Array:
    """Divide by the sum over the last axis (experts); all zeros stay zeros."""
    total = counts.sum(axis=-1, keepdims=True)
    share: Array = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    return share


def variation(counts: Array) -> Array:
    """Coefficient of variation over the experts: standard deviation / mean, 0 for even load.

    The deviation is the population's (divided by E): the largest value is sqrt(E - 1).
    """
    mean = counts.mean(axis=-1)
    deviation = counts.std(axis=-1)
    varied: Array = np.divide(deviation, mean, out=np.zeros(mean.shape), where=mean > 0)
    return varied


def entropy(counts: Array) -> Array:
    """Entropy of the load over the experts, divided by its maximum log E: 1 is even load."""
    if counts.shape[-1] == 1:
        return np.ones(counts.shape[:-1])
    share = load_share(counts)
    logs = np.log(share, out=np.zeros(share.shape), where=share > 0)
    # abs, not minus: one expert with everything has the entropy 0, not -0.0
    relative: Array = np.abs((share * logs).sum(axis=-1)) / np.log(counts.shape[-1])
    return relative


def dead_experts(counts: Array) -> Array:
    """Number of experts that no token chose."""
    dead: Array = (counts == 0).sum(axis=-1)
    return dead


def measure_load(
    model: Any,
    tokenizer: Any,
    data: Data,
    *,
    context: int = 512,
    batch_size: int = 16,
    max_documents: int | None = None,
) -> LoadReport:
    """Run `model` over `data` (one document a row, as `held_out_loss`) and count what it routes.

    Works on every model whose routers return (logits, weights [T, K], ids [T, K]), as those of
    transformers and moesaic do. Raises UserError for a model without such a router and for a domain
    without text.
    """
    import torch

    counters: list[_Counter] = []
    tokens: list[int] = []
    domains = open_domains(data)
    with evaluating(model), torch.inference_mode(), _recording(model) as routing:
        for name, source in domains.items():
            rows = list(
                document_rows(source, tokenizer, context=context, max_documents=max_documents)
            )
            if not rows:
                raise UserError(f"the domain '{name}' holds no token. Give it text.")
            counters.append(_Counter())
            tokens.append(sum(map(len, rows)))
            with progress(f"expert load: {name}", len(rows)) as bar:
                for batch in by_length(rows, batch_size * context):
                    routing.clear()
                    ids_BT, mask_BT = padded(batch, model)
                    model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
                    counters[-1].add(routing, mask_BT.flatten().bool())
                    bar.advance(len(batch))
    return _report(domains, counters, tokens)


def _report(domains: Any, counters: list[_Counter], tokens: list[int]) -> LoadReport:
    if not counters[0].layers:
        raise UserError(
            "the model has no router: it is dense, or routes in a way that is not known here. "
            "Give a mixture-of-experts model."
        )
    layers = list(counters[0].layers)
    chosen = [layer.top_k for layer in counters[0].layers.values()]
    return LoadReport(
        domains=tuple(domains),
        layers=tuple(layers),
        top_k=chosen[0] if len(set(chosen)) == 1 else chosen,
        tokens_D=np.array(tokens),
        counts_DLE=np.stack(
            [[counter.layers[layer].counts_E for layer in layers] for counter in counters]
        ),
        importance_DLE=np.stack(
            [[counter.layers[layer].importance_E for layer in layers] for counter in counters]
        ),
    )


@dataclass
class _Layer:
    top_k: int
    counts_E: np.ndarray
    importance_E: np.ndarray


class _Counter:
    """Sums over the batches of one domain."""

    def __init__(self) -> None:
        self.layers: dict[str, _Layer] = {}

    def add(self, routing: _Routing, valid_T: torch.Tensor) -> None:
        """Add the tokens of one batch where `valid_T` is true."""
        for name, (experts, ids_TK, weights_TK) in routing.items():
            ids_N = ids_TK[valid_T].flatten()
            weights_N = weights_TK[valid_T].flatten().double()
            counts_E = ids_N.bincount(minlength=experts).cpu().numpy()
            importance_E = ids_N.bincount(weights_N, minlength=experts).cpu().numpy()
            layer = self.layers.setdefault(
                name, _Layer(ids_TK.shape[1], np.zeros_like(counts_E), np.zeros_like(importance_E))
            )
            layer.counts_E += counts_E
            layer.importance_E += importance_E


_Routing = dict[str, tuple[int, Any, Any]]


@contextlib.contextmanager
def _recording(model: Any) -> Iterator[_Routing]:
    """Collect what every router decides in a forward pass: module name -> (E, ids, weights)."""
    seen: _Routing = {}

    def hook_for(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if found := _decision(output):
                seen[name] = found

        return hook

    handles = [
        module.register_forward_hook(hook_for(name))
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("gate", "router") and "residual" not in name
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _decision(output: Any) -> tuple[int, Any, Any] | None:
    """Read (logits [T, E], weights [T, K], ids [T, K]) from a router's output, or None."""
    import torch

    if not isinstance(output, tuple) or len(output) < 3:
        return None
    logits_TE, weights_TK, ids_TK = output[:3]
    if not all(
        isinstance(x, torch.Tensor) and x.dim() == 2 for x in (logits_TE, weights_TK, ids_TK)
    ):
        return None
    if ids_TK.is_floating_point() or weights_TK.shape != ids_TK.shape:
        return None
    return int(logits_TE.shape[-1]), ids_TK, weights_TK
