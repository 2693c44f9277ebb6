"""Gates from hidden features: what a layer's MLP sees of text, clustered into one row per expert.

Source: LLaMA-MoE-v2's hidden_feature_clustering and hidden_feature_random_selection (arXiv
2411.15708). The features are the inputs of gate_proj and up_proj; gates are the clusters' centers,
unscaled. The text passes through one layer at a time; its hidden states are held once, in a file
where they are large.

Notation: B rows of text, C tokens a row, T real tokens, D hidden size, E experts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moesaic.construct.activations import LayerStream
from moesaic.construct.calibration import check_enough
from moesaic.construct.dense import DenseModel
from moesaic.construct.sized_kmeans import Distance, means, nearest, size_bounds, sized_kmeans
from moesaic.core.console import note, track
from moesaic.core.errors import UserError

__all__ = ["HiddenLayer", "HiddenSettings", "hidden_gates", "hidden_layers"]

TOKENS_PER_EXPERT = 32
"""Fewer than this and a center is a few tokens' noise."""
IN_MEMORY = 2_000_000_000
"""Bytes of hidden states beyond which they are kept in a temporary file."""
_ROWS = 8


@dataclass(frozen=True)
class HiddenLayer:
    """One layer, its attention done: `hidden_BCD` is the residual stream before the MLP."""

    layer: int
    stream: LayerStream
    module: Any
    hidden_BCD: torch.Tensor
    real_BC: torch.Tensor

    def features(self) -> Iterator[torch.Tensor]:
        """Yield the MLP's inputs of real tokens, a few rows at a time: [t, D]."""
        for rows, real in zip(self.hidden_BCD.split(_ROWS), self.real_BC.split(_ROWS), strict=True):
            with torch.inference_mode():
                yield self.stream.reads(self.module, rows)[real]

    def pick(self, places_N: torch.Tensor) -> torch.Tensor:
        """The features of some real tokens, given their ascending numbers: [N, D]."""
        found, start = [], 0
        for features_TD in self.features():
            stop = start + len(features_TD)
            inside = places_N[(places_N >= start) & (places_N < stop)]
            found.append(features_TD[inside - start])
            start = stop
        return torch.cat(found)


@dataclass(frozen=True)
class HiddenSettings:
    """How features become gates."""

    method: Literal["clusters", "random"] = "clusters"
    """Centers of clusters, or randomly picked features."""
    jitter: float = 0.4
    """Clusters hold T/E tokens, less or more by this share; 0 is exactly balanced."""
    metric: Distance = "l2"
    sample: int = 16_384
    """Tokens that are clustered; two passes over all tokens follow."""
    starts: int = 4


@torch.inference_mode()
def hidden_layers(
    dense: DenseModel, ids_BC: torch.Tensor, real_BC: torch.Tensor | None = None
) -> Iterator[HiddenLayer]:
    """Run text through a dense model, yielding every layer between its attention and its MLP.

    `real_BC` is False at padding, which must be on the right: then no real token sees it.
    """
    stream = LayerStream(dense, context=ids_BC.shape[1])
    real_BC = torch.ones_like(ids_BC, dtype=torch.bool) if real_BC is None else real_BC.bool()
    with tempfile.NamedTemporaryFile(prefix="moesaic-hidden-") as file:
        hidden_BCD = _room((*ids_BC.shape, dense.hidden), file.name)
        for rows, ids in zip(hidden_BCD.split(_ROWS), ids_BC.split(_ROWS), strict=True):
            rows.copy_(stream.embed(ids))
        for layer in range(dense.layers):
            module: Any = stream.load(layer)
            for rows in hidden_BCD.split(_ROWS):
                rows.copy_(stream.block(module, rows)[0])
            yield HiddenLayer(layer, stream, module, hidden_BCD, real_BC)
            for rows in hidden_BCD.split(_ROWS):
                rows.copy_(stream.finish(module, rows, module.mlp(stream.reads(module, rows))))


def hidden_gates(
    dense: DenseModel,
    ids_BC: torch.Tensor,
    experts: int,
    *,
    settings: HiddenSettings | None = None,
    real_BC: torch.Tensor | None = None,
    seed: int = 0,
    top_k: int = 1,
) -> tuple[torch.Tensor, list[list[int]]]:
    """Make the gates [L, E, D] of all layers, and count the tokens each gate wins: [L][E].

    A token's winners are the `top_k` gates of largest inner product with it, as the router will
    choose; centers differ in length, so these are not the clusters. Raises UserError for too little
    text, and for gates that never win, all of them named.
    """
    settings = settings or HiddenSettings()
    count = ids_BC.numel() if real_BC is None else int(real_BC.sum())
    check_enough(count, experts, each=TOKENS_PER_EXPERT)
    gates, wins = [], []
    layers = hidden_layers(dense, ids_BC, real_BC)
    for seen in track(layers, "clustering hidden features", total=dense.layers):
        generator = torch.Generator().manual_seed(seed + seen.layer)
        if settings.method == "random":
            places_N = torch.randperm(count, generator=generator)[:experts]
            order = places_N.argsort()
            gate_ED = torch.empty(experts, dense.hidden)
            gate_ED[order] = seen.pick(places_N[order])
        else:
            gate_ED = _centers(seen, count, experts, settings, seed + seen.layer, generator)
        gates.append(gate_ED)
        won_E = torch.zeros(experts, dtype=torch.long)
        for features_TD in seen.features():
            chosen = (features_TD @ gate_ED.T).topk(min(top_k, experts), dim=1).indices
            won_E += chosen.flatten().bincount(minlength=experts)
        wins.append([int(number) for number in won_E])
    _check_winners(wins, count)
    return torch.stack(gates), wins


def _centers(
    seen: HiddenLayer,
    count: int,
    experts: int,
    settings: HiddenSettings,
    seed: int,
    generator: torch.Generator,
) -> torch.Tensor:
    size = min(count, max(settings.sample, TOKENS_PER_EXPERT * experts))
    places_N = torch.randperm(count, generator=generator)[:size].sort().values
    smallest, largest = size_bounds(size, experts, settings.jitter)
    found = sized_kmeans(
        seen.pick(places_N),
        experts,
        smallest=smallest,
        largest=largest,
        metric=settings.metric,
        starts=settings.starts,
        seed=seed,
    )
    centers_ED = found.centers_ED
    # The sample's prices keep the sizes of all tokens within the sample's error.
    for _ in range(2 if size < count else 0):
        sums_ED, sizes_E = torch.zeros_like(centers_ED), torch.zeros(experts)
        for features_TD in seen.features():
            labels_T = nearest(features_TD, centers_ED, found.prices_E, settings.metric)
            here_E = labels_T.bincount(minlength=experts)
            sums_ED += means(features_TD, labels_T, torch.zeros_like(centers_ED)) * here_E[:, None]
            sizes_E += here_E
        centers_ED = torch.where(
            sizes_E[:, None] > 0, sums_ED / sizes_E.clamp(min=1)[:, None], centers_ED
        )
    return centers_ED


def _check_winners(wins: list[list[int]], tokens: int) -> None:
    idle = [
        f"layer {layer} expert {expert}"
        for layer, counts in enumerate(wins)
        for expert, number in enumerate(counts)
        if not number
    ]
    if idle:
        raise UserError(
            f"Some experts would never be chosen on these {tokens} tokens: {', '.join(idle)}. Give "
            "more or more varied text, ask for fewer experts, or lower the jitter."
        )
    rare = min(min(counts) / sum(counts) for counts in wins)
    if rare < 0.1 / len(wins[0]):
        note(f"the least chosen expert wins {rare:.2%} of the choices of its layer")


def _room(shape: tuple[int, ...], path: str) -> torch.Tensor:
    size = torch.Size(shape).numel()
    if 4 * size <= IN_MEMORY:
        return torch.empty(shape)
    return torch.from_file(path, shared=True, size=size, dtype=torch.float32).view(shape)
