"""Tokens as text that people read: single words, and the pieces of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moesaic.core.console import note
from moesaic.core.errors import UserError

__all__ = ["decoder_of", "open_tokenizer", "pieces"]

_CONTEXT = 6  # tokens before one whose text may depend on them
_SPACES = ("Ġ", "▁")  # what byte-level BPE and SentencePiece write for a space


def open_tokenizer(tokenizer: Any, model: str | None) -> Any:
    """Return the tokenizer given (itself or where it lies), or the model's; None without one.

    A tokenizer that was named must be there; that of the model is left out with a note.
    """
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return tokenizer
    from moesaic.models.tokenizer import load_tokenizer

    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    if not model:
        return None
    try:
        return load_tokenizer(model)
    except UserError as error:
        note(f"words are shown as numbers, there is no tokenizer: {error}")
        return None


def decoder_of(tokenizer: Any) -> Callable[[int], str]:
    """Return a function from a token id to its text; `#17` for ids that have none."""

    def decode(token: int) -> str:
        if tokenizer is None:
            return f"#{token}"
        raw = tokenizer.convert_ids_to_tokens(token)
        if raw is None:
            return f"#{token}"
        text = str(tokenizer.decode([token])).strip(" ")
        if not text or "\ufffd" in text:
            text = raw.lstrip("".join(_SPACES)) or "␣"
        return text.replace("\n", "⏎").replace("\t", "⇥")

    return decode


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds; `#17 ` for each id where there is no tokenizer."""
    if tokenizer is None:
        return [f"#{token} " for token in ids]
    found: list[str] = []
    for place in range(len(ids)):
        start = max(0, place - _CONTEXT)
        before = tokenizer.decode(list(ids[start:place])) if place > start else ""
        after = tokenizer.decode(list(ids[start : place + 1]))
        text = after[len(before) :] if after.startswith(before) else after[-1:]
        found.append(text)
    return found
