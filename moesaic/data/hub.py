"""A Hugging Face dataset as a source, streamed; needs the package `datasets` (extra `data`)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.core.errors import UserError
from moesaic.data.chat import Message, read_messages


@dataclass(frozen=True)
class HubDataset:
    """The column `text` of one split of a dataset: ``org/name``, ``org/name:config@split``."""

    path: str
    config: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, name: str) -> HubDataset:
        """Read ``path[:config][@split]``."""
        found = re.fullmatch(
            r"(?P<path>[^:@]+)(?::(?P<config>[^:@]+))?(?:@(?P<split>[^:@]+))?", name
        )
        if found is None:
            raise UserError(f"'{name}' is no dataset name. Write org/name, org/name:config@split.")
        return cls(found["path"], found["config"], found["split"] or "train")

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"{self.path}{config}@{self.split}"

    def documents(self) -> Iterator[str]:
        """Yield the text of each row. Raises UserError without a text column or a connection."""
        for number, row in enumerate(self._rows()):
            text = row.get("text")
            if not isinstance(text, str):
                raise UserError(
                    f"{self}: row {number} has no string 'text' (columns: {', '.join(row)}). "
                    "Choose a dataset with a text column, or write it to a .jsonl file."
                )
            yield text

    def conversations(self) -> Iterator[list[Message]]:
        """Yield the conversation of each row. Raises UserError where there is none."""
        for number, row in enumerate(self._rows()):
            yield read_messages(row, where=f"{self}: row {number}")

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        library = _library(self.path)
        try:
            rows = library.load_dataset(self.path, self.config, split=self.split, streaming=True)
        except Exception as error:
            raise self._refusal(error) from None
        yield from rows

    def fingerprint(self) -> str:
        """Hash the name and the revision that it stands for now."""
        try:
            builder = _library(self.path).load_dataset_builder(self.path, self.config)
        except UserError:
            raise
        except Exception as error:
            raise self._refusal(error) from None
        facts = (str(self), str(builder.hash), str(builder.cache_dir))
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def _refusal(self, error: Exception) -> UserError:
        detail = " ".join(str(error).split())[:300]
        return UserError(
            f"{self}: neither a file here nor a dataset that can be read ({detail}). "
            "Check the name, the split and the connection, or give a .jsonl or .txt file."
        )


def _library(name: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(
            f"'{name}' is not a file here; to read it as a Hugging Face dataset install "
            "the package `datasets`: pip install 'moesaic[data]'."
        ) from None
    return datasets
