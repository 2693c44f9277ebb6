"""A complete analysis at the size of the routing study: time and memory of `moesaic.analyze`.

A trace of 11 domains, 2,048 samples each of 512 tokens, 16 layers of 64 experts, 8 chosen, is made
from the sticky scores of `benchmarks.routing`: every 256 samples are the same ones with their
experts renamed and every domain prefers other experts. Words follow Zipf's law over 50,304.

    python -m benchmarks.routing_scale make /tmp/scale
    /usr/bin/time -v moesaic route analyze /tmp/scale -o /tmp/scale-report
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from benchmarks.routing import EXPERTS, LAYERS, SAMPLES, TOKENS, TOP_K, routed

DOMAINS = (
    "c4", "cc2306", "book", "wikipedia", "arxiv", "stackexchange", "github", "lmarena", "math",
    "code", "science",
)  # fmt: skip
PER_DOMAIN, VOCABULARY = 2048, 50_304


def make(directory: Path, per_domain: int = PER_DOMAIN) -> None:
    """Write the trace."""
    from moesaic.routing.trace import Shape, TraceWriter

    shape = Shape(
        layers=tuple(range(LAYERS)), num_experts=(EXPERTS,) * LAYERS, top_k=(TOP_K,) * LAYERS
    )
    facts = {
        "model": "", "architecture": "synthetic", "model_type": "synthetic",
        "domains": list(DOMAINS), "sample_length": TOKENS, "vocab_size": VOCABULARY, "settings": {},
    }  # fmt: skip
    writer = TraceWriter(directory, shape, facts)
    ids = routed().reshape(SAMPLES * TOKENS, LAYERS, TOP_K)
    rng = np.random.default_rng(0)
    rows = len(ids)
    weights = np.sort(rng.dirichlet(np.ones(TOP_K), size=(4096, LAYERS)), axis=2)[:, :, ::-1]
    weights = np.tile(weights.astype(np.float16), (rows // 4096, 1, 1))
    layer = np.arange(LAYERS)[None, :, None]
    odds = 1 / np.arange(1, VOCABULARY + 1)
    odds = np.cumsum(odds / odds.sum())
    for domain in range(len(DOMAINS)):
        for start in range(0, per_domain, SAMPLES):
            names = np.stack([rng.permutation(EXPERTS) for _ in range(LAYERS)]).astype(np.uint8)
            token_ids = np.searchsorted(odds, rng.random(rows)).clip(0, VOCABULARY - 1)
            writer.append(
                {
                    "experts": names[layer, ids],
                    "weights": weights,
                    "token_ids": token_ids,
                    "predicted": np.roll(token_ids, -1),
                    "loss": rng.gamma(2.0, 1.2, rows),
                    "document": np.repeat(np.arange(start, start + SAMPLES), TOKENS),
                    "position": np.tile(np.arange(TOKENS), SAMPLES),
                    "domain": np.full(rows, domain),
                }
            )
    writer.finish()


if __name__ == "__main__":
    make(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else PER_DOMAIN)
