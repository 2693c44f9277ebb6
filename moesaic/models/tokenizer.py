"""Load the tokenizer that lies beside a model, without remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moesaic.core.errors import UserError, nearest
from moesaic.models.catalog import aliases, find, refusal
from moesaic.models.checkpoint import read_json
from moesaic.models.load import config_of

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model or tokenizer directory, an alias, or a hub id (``org/name``).

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
    elif str(path) in aliases():
        pass
    elif folder.is_absolute() or len(folder.parts) != 2 or folder.parent.is_dir():
        near = folder.parent if folder.parent.is_dir() else Path()
        hint = nearest(folder.name, [entry.name for entry in near.iterdir()])
        raise UserError(f"{path}: no such folder.{hint} Give the folder of a tokenizer or model.")
    given = folder if folder.is_dir() else _hub_id(str(path))
    # The model's config is ours to read: transformers asks on the terminal whether to run the code
    # that an unknown model_type, or none, comes with.
    options: dict[str, Any] = {"trust_remote_code": False, **_config(given)}
    from_file = _needs_code(folder) or _of_no_family(folder)
    try:
        if from_file:
            return PreTrainedTokenizerFast.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(given, **options)
    except Exception as error:  # transformers raises what it likes: OSError, ValueError, KeyError
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: the tokenizer cannot be read ({detail}). Restore its files, or name another."
        ) from error


def _hub_id(name: str) -> str:
    entry = aliases().get(name)
    return name if entry is None or entry.hub is None else entry.hub


def _config(given: Path | str) -> dict[str, Any]:
    """The model's config as a keyword, where moesaic or transformers knows the family."""
    if isinstance(given, Path) and not (given / "config.json").is_file():
        return {}
    try:
        source = find(given, config_only=True, local_files_only=True)
        return {"config": config_of(source)[0]} if refusal(source.config) is None else {}
    except (UserError, StrictDataclassError, TypeError, ValueError, KeyError):
        return {}  # a tokenizer can be read beside a config.json that cannot


def _needs_code(folder: Path) -> bool:
    """Whether a directory names a tokenizer class of its own, beside a vocabulary that needs none.

    Raises UserError where only its own code could read it.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return False
    settings = read_json(file, cure="Download it again.")
    own = isinstance(settings.get("auto_map"), dict) and "AutoTokenizer" in settings["auto_map"]
    if not own or hasattr(transformers, str(settings.get("tokenizer_class"))):
        return False
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder}: the tokenizer is code of its own (auto_map in tokenizer_config.json), "
            "which is never run. Convert it to a tokenizer.json where you trust it."
        )
    return True


def _of_no_family(folder: Path) -> bool:
    """Whether a directory says that tokenizer.json is all there is to its tokenizer.

    transformers takes the class of the model's family all the same, and Qwen2's cuts text by its
    own rules, whatever the file says.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    named = read_json(file, cure="Download it again.").get("tokenizer_class")
    return named in ("PreTrainedTokenizerFast", "TokenizersBackend")
