"""Every split on two real checkpoints: is the mixture, with all experts on, the dense model?

    python benchmarks/convert_splits.py ../shared/ckpt ../shared/data/corpus

Converts stories260K-hf into 4 experts (of width 43) and dense-14m into 8 and 16, by every split of
`moesaic list split` that makes one itself, and prints the measured difference of the logits.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moesaic.construct.convert import convert
from moesaic.construct.splits import SPLITS
from moesaic.core.lineage import read_lineage

MODELS = (("stories260K-hf", 4), ("dense-14m", 8), ("dense-14m", 16))


def variants(name: str) -> list[tuple[dict[str, Any], int]]:
    """Settings and number of shared experts to try a split with."""
    if name == "sharing-inter":
        return [({"share": True}, 1), ({"share": False}, 1)]
    return [({}, 0), ({}, 1)] if SPLITS.get(name).makes_shared else [({}, 0)]


def main(checkpoints: Path, corpus: Path) -> None:
    data = {folder.name: folder / "valid.jsonl" for folder in sorted(corpus.iterdir())}
    data = {name: file for name, file in data.items() if file.is_file()}
    print("| model | experts | split | exact | neurons covered | largest logit difference | s |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for model, experts in MODELS:
            for name in SPLITS.names():
                if name == "imported":  # reads a split that another program made
                    continue
                method = SPLITS.get(name)
                for settings, shared in variants(name):
                    started = time.monotonic()
                    path = convert(
                        checkpoints / model,
                        out=Path(folder) / f"{time.monotonic_ns()}",
                        split={"method": name, **settings},
                        experts=experts,
                        shared=shared,
                        top_k=experts // 4 + shared,
                        data=data if method.needs_data else None,
                    )
                    lineage = read_lineage(path) or {}
                    title = ", ".join(
                        [name, *(f"{key} {value}" for key, value in settings.items())]
                        + [f"{shared} shared expert"] * shared
                    )
                    print(
                        f"| {model} | {experts} | {title} | {'yes' if lineage['exact'] else 'no'} "
                        f"| {lineage['neurons_covered']:.1%} | {lineage['difference']:.1e} "
                        f"| {time.monotonic() - started:.0f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
