"""The golden traces of the routing study, as arrays: inputs, expected arrays and tables."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import GOLDEN, SHARED

OWN = GOLDEN / "routing"
ALL = SHARED / "golden" / "routing"
CASES: dict[str, Any] = json.loads((OWN / "cases.json").read_text())["cases"]
SEGMENTS = (4, 16, 64, 256)
EVERY = [
    name
    if (OWN / name).exists()
    else pytest.param(
        name,
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not (ALL / name).exists(), reason="not in the repository"),
        ],
    )
    for name in CASES
]


def folder(name: str) -> Path:
    return OWN / name if (OWN / name).exists() else ALL / name


@dataclass(frozen=True)
class Stack:
    """The layers of one side of a model: `side` is d (decoder, or all) or e (encoder)."""

    side: str
    layers: list[int]
    names: list[int]
    """Layer numbers of the tables."""
    ids: dict[str, np.ndarray]
    """Domain -> [N, T, L, k]."""

    @property
    def decoder(self) -> str:
        return str(self.side == "d")


@cache
def arrays(name: str, which: str) -> dict[str, np.ndarray]:
    with np.load(folder(name) / f"{which}.npz") as archive:
        return {key: archive[key] for key in archive.files}


@cache
def stacks(name: str) -> list[Stack]:
    case, given = CASES[name], arrays(name, "input")
    half = case["L"] // 2 if case["type"] == "seq2seq" else 0
    layers = case["moe_layers"]
    domains = [key.split("_")[2] for key in given if key.startswith(f"topk_{layers[0]:02d}_")]
    sides = {"e": [x for x in layers if x < half], "d": [x for x in layers if x >= half]}
    return [
        Stack(
            side,
            own,
            [x - half if side == "d" else x for x in own],
            {d: np.stack([given[f"topk_{x:02d}_{d}"] for x in own], axis=2) for d in domains},
        )
        for side, own in sides.items()
        if own
    ]


def table(path: Path) -> list[dict[str, str]]:
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return list(csv.DictReader(text.decode().splitlines()))


def scores(bits: np.ndarray) -> np.ndarray:
    """Router scores from bit patterns of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
