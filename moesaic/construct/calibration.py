"""The text that a construction looks at: full rows, drawn by a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moesaic.core.errors import UserError

__all__ = ["calibration_rows", "check_enough"]

LEAST = 16
"""Tokens for each expert without which nothing can be fitted."""


def calibration_rows(
    model: Path, data: Any, *, tokens: int, context: int, experts: int, seed: int
) -> torch.Tensor:
    """Token ids [B, C]: rows drawn by the seed among four times as many, domains in equal parts.

    Rows begin with a document, as what a model is given later does; where the documents are too
    few for that, they are read one after the other without a gap. Raises UserError when there is no
    data, or too little for the experts.
    """
    from moesaic.data.batches import TooShort, calibration_batches
    from moesaic.models.tokenizer import load_tokenizer

    if data is None:
        raise UserError(
            "No calibration text was given. Put data: in the recipe or give --data: a .jsonl or "
            ".txt file, a folder, or the name of a dataset."
        )
    tokenizer, wanted = load_tokenizer(model), max(1, tokens // context)
    for starts in (True, False):
        sizes = {"tokens": 4 * tokens, "context": context}
        try:
            rows_BC = torch.cat(list(calibration_batches(data, tokenizer, **sizes, starts=starts)))
        except TooShort as error:
            raise UserError(
                f"{error} {experts} experts need at least {LEAST * experts} tokens, better 100 "
                "times as many."
            ) from None
        if len(rows_BC) >= wanted:
            break
    generator = torch.Generator().manual_seed(seed)
    ids_BC = rows_BC[torch.randperm(len(rows_BC), generator=generator)[:wanted]]
    check_enough(ids_BC.numel(), experts)
    return ids_BC


def check_enough(tokens: int, experts: int, *, each: int = LEAST) -> None:
    """Raise UserError, which says how many are needed, for fewer than `each` tokens an expert."""
    if tokens < each * experts:
        raise UserError(
            f"The calibration text holds {tokens} tokens, too few for {experts} experts: at least "
            f"{each * experts} are needed ({each} an expert), better 100 times as many. Give more "
            "text, raise tokens, or make fewer experts."
        )
