"""Held-out loss per domain, in nats a token.

The convention of every table here: one document a row, ``BOS text EOS`` cut off after `context`
tokens; every token but a row's first is predicted; inside a domain all tokens weigh the same;
``mean`` is the plain mean over the domains. Padding is masked and never counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moesaic.core.console import progress
from moesaic.core.errors import UserError
from moesaic.data.batches import document_rows
from moesaic.data.sources import Data, open_domains

if TYPE_CHECKING:
    import torch


def held_out_loss(
    model: Any,
    tokenizer: Any,
    data: Data,
    *,
    context: int = 512,
    batch_size: int = 16,
    max_documents: int | None = None,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Return ``{"mean": ..., domain: ...}``: cross entropy in nats a token, without any balance loss.

    `batch_size` is in rows of `context` tokens; more rows share a batch where documents are short.
    `max_documents` reads only the first documents of each domain. The model is put in eval mode for the
    time, and is moved to `device` when one is given. Raises UserError for a domain that has no token to
    predict.
    """
    import torch

    if context < 2:
        raise UserError(f"context={context}. A row needs at least 2 tokens: one to predict from.")
    training = model.training
    if device is not None:
        model.to(device)
    model.eval()
    losses: dict[str, float] = {}
    try:
        with torch.inference_mode():
            for name, source in open_domains(data).items():
                rows = [
                    row
                    for row in document_rows(
                        source, tokenizer, context=context, max_documents=max_documents
                    )
                    if len(row) > 1
                ]
                if not rows:
                    raise UserError(f"the domain '{name}' holds no token to predict. Give it text.")
                losses[name] = _domain_loss(model, rows, name, batch_size * context)
    finally:
        model.train(training)
    mean = sum(losses.values()) / len(losses)
    return {"mean": mean, **losses}


def _domain_loss(model: Any, rows: list[list[int]], name: str, budget: int) -> float:
    total, count = 0.0, 0
    with progress(f"held-out loss: {name}", len(rows)) as bar:
        for batch in _by_length(rows, budget):
            loss, predicted = batch_loss(model, batch)
            total += loss
            count += predicted
            bar.advance(len(batch), loss=total / count)
    return total / count


def batch_loss(model: Any, rows: list[list[int]]) -> tuple[float, int]:
    """Return the summed cross entropy of `rows` (nats, float64) and how many tokens were predicted."""
    import torch

    device = next(model.parameters()).device
    width = max(map(len, rows))
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids_BT[index, : len(row)] = torch.tensor(row)
        mask_BT[index, : len(row)] = 1
    ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    # float32: a bf16 log-softmax over thousands of words is off in the third digit.
    kept_BT = mask_BT[:, 1:].bool()
    losses_N = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1][kept_BT].float(), ids_BT[:, 1:][kept_BT], reduction="none"
    )
    return float(losses_N.double().sum()), int(kept_BT.sum())


def _by_length(rows: list[list[int]], budget: int) -> Iterator[list[list[int]]]:
    """Batches of rows of like length, longest first, each at most `budget` tokens with padding."""
    ordered = sorted(rows, key=len, reverse=True)
    start = 0
    while start < len(ordered):
        size = max(1, budget // len(ordered[start]))
        yield ordered[start : start + size]
        start += size
