"""Held-out loss per domain, in nats a token.

The convention of every table here: one document a row, ``BOS text EOS`` cut off after `context`
tokens; every token but a row's first is predicted; inside a domain all tokens weigh the same;
``mean`` is the plain mean over the domains. Padding is masked and never counted, and neither is
what conversations hold beside the assistant's answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesaic.core.console import progress
from moesaic.core.errors import UserError
from moesaic.data.batches import document_rows
from moesaic.data.conversations import conversation_rows
from moesaic.data.sources import Data, open_domains
from moesaic.measure.rows import by_length, evaluating, padded

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
    conversations: bool = False,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Return ``{"mean": ..., domain: ...}``: cross entropy in nats a token, without any balance
    loss.

    `batch_size` is in rows of `context` tokens; more rows share a batch where documents are short.
    `max_documents` reads only the first documents of each domain. With `conversations` the data
    holds those: a row is one, and only what the assistant says is predicted. The model is put in
    eval mode for the time, and is moved to `device` when one is given. Raises UserError for a
    domain that has no token to predict.
    """
    import torch

    if context < 2:
        raise UserError(f"context={context}. A row needs at least 2 tokens: one to predict from.")
    if device is not None:
        model.to(device)
    losses: dict[str, float] = {}
    with evaluating(model), torch.inference_mode():
        for name, source in open_domains(data).items():
            cut = conversation_rows if conversations else document_rows
            found = cut(source, tokenizer, context=context, max_documents=max_documents)
            rows = [row for row in found if any(token >= 0 for token in row[1:])]
            if not rows:
                raise UserError(f"the domain '{name}' holds no token to predict. Give it text.")
            losses[name] = _domain_loss(model, rows, name, batch_size * context)
    return {"mean": sum(losses.values()) / len(losses), **losses}


def _domain_loss(model: Any, rows: list[list[int]], name: str, budget: int) -> float:
    total, count = 0.0, 0
    with progress(f"held-out loss: {name}", len(rows)) as bar:
        for batch in by_length(rows, budget):
            loss, predicted = batch_loss(model, batch)
            total += loss
            count += predicted
            bar.advance(len(batch), loss=total / count)
    return total / count


def batch_loss(model: Any, rows: list[list[int]]) -> tuple[float, int]:
    """Return the summed cross entropy of `rows` (nats) and how many tokens were predicted.

    A token of context is given as ~id, and is not predicted.
    """
    import torch

    given_BT, mask_BT = padded(rows, model)
    learned_BT = given_BT >= 0
    ids_BT = torch.where(learned_BT, given_BT, ~given_BT)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    kept_BT = mask_BT[:, 1:].bool() & learned_BT[:, 1:]
    # float32: a bf16 log-softmax over thousands of words is off in the third digit.
    losses_N = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1][kept_BT].float(), ids_BT[:, 1:][kept_BT], reduction="none"
    )
    return float(losses_N.double().sum()), int(kept_BT.sum())
