"""Rows of unequal length as padded batches, and a model put in eval mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def by_length(rows: list[list[int]], budget: int) -> Iterator[list[list[int]]]:
    """Yield batches of rows of like length, longest first, each at most `budget` tokens padded.

    Sorting keeps padding below a few percent; the order of rows does not change a sum over them.
    """
    ordered = sorted(rows, key=len, reverse=True)
    start = 0
    while start < len(ordered):
        size = max(1, budget // len(ordered[start]))
        yield ordered[start : start + size]
        start += size


def padded(rows: list[list[int]], model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids [B, T] and mask [B, T] (int64, padded on the right) on the model's device."""
    import torch

    width = max(map(len, rows))
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids_BT[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask_BT[index, : len(row)] = 1
    device = next(model.parameters()).device
    return ids_BT.to(device), mask_BT.to(device)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put `model` in eval mode, and every module back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
