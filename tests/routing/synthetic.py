"""A trace without a model: sticky routing of a few domains, for what reads traces."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moesaic.routing.samples import choose
from moesaic.routing.trace import Shape, Trace, TraceWriter


def write_trace(
    directory: Path,
    *,
    domains: Sequence[str] = ("news", "code"),
    samples: int = 8,
    tokens: int = 40,
    last: int | None = 23,
    layers: Sequence[int] = (1, 3),
    experts: int = 6,
    top_k: int = 2,
    vocabulary: int = 30,
    predictions: bool = True,
    dropped: float = 0.02,
    seed: int = 0,
) -> Trace:
    """Write `samples` samples of each domain; the last of each has `last` tokens."""
    rng = np.random.default_rng(seed)
    shape = Shape(
        tuple(layers), (experts,) * len(layers), (top_k,) * len(layers), predictions=predictions
    )
    facts = {
        "model": "", "architecture": "Synthetic", "model_type": "synthetic",
        "domains": list(domains), "sample_length": tokens, "vocab_size": vocabulary,
        "settings": {"seed": seed},
    }  # fmt: skip
    writer = TraceWriter(directory, shape, facts)
    for domain in range(len(domains)):
        taste = rng.normal(size=(len(layers), experts))
        for sample in range(samples):
            count = last if last is not None and sample == samples - 1 else tokens
            scores = rng.normal(size=(count, len(layers), experts))
            for token in range(1, count):
                scores[token] = 0.9 * scores[token - 1] + 0.4 * scores[token]
            ids = choose(scores + taste, top_k).astype(np.int64)
            ids[rng.random(ids.shape) < dropped] = -1
            weights = np.sort(rng.dirichlet(np.ones(top_k), size=(count, len(layers))))[..., ::-1]
            words = rng.integers(0, vocabulary, count)
            rows = {
                "experts": np.where(ids < 0, 255, ids), "weights": weights, "token_ids": words,
                "document": np.full(count, sample), "position": np.arange(count),
                "domain": np.full(count, domain),
            }  # fmt: skip
            if predictions:
                loss = rng.gamma(2, 1, count)
                loss[-1] = np.nan
                rows |= {"predicted": rng.integers(0, vocabulary, count), "loss": loss}
            writer.append(rows)
    writer.finish()
    return Trace(directory)


def arrays_of(trace: Trace) -> tuple[list[np.ndarray], np.ndarray]:
    """Chosen experts of every sample, [tokens, layers, K], and the samples' domains."""
    borders = trace.samples()
    chosen = [trace.chosen(a, b) for a, b in itertools.pairwise(borders)]
    return chosen, np.asarray(trace.domain)[borders[:-1]]
