"""Load the tokenizer that lies beside a model, without remote code."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

import moesaic.models  # noqa: F401 - a directory's model type must be known, or transformers warns
from moesaic.core.errors import UserError, nearest

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model or tokenizer directory, or of a hub id (``org/name``).

    Raises UserError for a folder that does not exist, one without a vocabulary, and files that
    cannot be read.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in VOCABULARY_FILES):
            raise UserError(
                f"{folder} holds no tokenizer ({', '.join(VOCABULARY_FILES)}). Copy the files of "
                "the model it was made from there, or name another folder."
            )
    elif folder.is_absolute() or len(folder.parts) != 2 or folder.parent.is_dir():
        near = folder.parent if folder.parent.is_dir() else Path()
        hint = nearest(folder.name, [entry.name for entry in near.iterdir()])
        raise UserError(f"{path}: no such folder.{hint} Give the folder of a tokenizer or model.")
    try:
        return AutoTokenizer.from_pretrained(folder if folder.is_dir() else str(path))
    except Exception as error:  # transformers raises what it likes: OSError, ValueError, KeyError
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: the tokenizer cannot be read ({detail}). Restore its files, or name another."
        ) from error
