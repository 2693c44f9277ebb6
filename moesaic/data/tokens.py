"""Token ids of a domain on disk: written once, memory-mapped from then on.

A cache entry is a directory ``<tokenizer key>-<content key>`` of

    ids.bin        every token of every document, no special tokens, uint16 or uint32
    offsets.bin    int64 [documents + 1]: document i is ids[offsets[i]:offsets[i + 1]]
    tokens.json    counts, dtype and what was tokenised

Text is text: ``<s>`` in a web page is three characters, not the token that starts a document.
Which tokens delimit documents is decided when blocks are made, so the cache serves every policy.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.core.console import progress
from moesaic.core.errors import UserError
from moesaic.core.files import check_folder
from moesaic.data.sources import Data, Source, open_domains

_FORMAT = 1
_FIRST_CHARACTERS, _BATCH_CHARACTERS = 64_000, 4_000_000
_BATCH_DOCUMENTS = 2_000
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True, eq=False)
class TokenDomain:
    """The documents of one domain as token ids.

    `ids` [tokens] and `offsets` [documents + 1] are memory-mapped. `bos` and `eos` are the ids that
    delimit a document when blocks are made, or None; they are not in `ids`.
    """

    name: str
    ids: np.ndarray
    offsets: np.ndarray
    bos: int | None = None
    eos: int | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """Tokens of all documents, delimiters not counted."""
        return int(self.offsets[-1])

    def length(self, index: int) -> int:
        """Tokens of one document, delimiters not counted."""
        return int(self.offsets[index + 1] - self.offsets[index])

    def document(self, index: int) -> np.ndarray:
        """Return the ids of one document, int64 [tokens], without delimiters."""
        return self.read(index, 0, self.length(index))

    def read(self, index: int, start: int, stop: int) -> np.ndarray:
        """Return ids `start` to `stop` of one document, int64 [stop - start]."""
        first = int(self.offsets[index])
        return self.ids[first + start : first + max(start, stop)].astype(np.int64)

    @classmethod
    def from_documents(
        cls, name: str, documents: Iterable[Any], *, bos: int | None = None, eos: int | None = None
    ) -> TokenDomain:
        """Make a domain of lists of ids that are in memory."""
        arrays = [np.asarray(document, dtype=np.int64) for document in documents]
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(array) for array in arrays], out=offsets[1:])
        ids = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
        return cls(name, ids, offsets, bos, eos)


def open_tokens(
    data: Data, tokenizer: Any, *, cache: Path | str | None = None
) -> dict[str, TokenDomain]:
    """Tokenise every domain of `data`, or find it in the cache; `cache` None: `cache_directory()`.

    `tokenizer` is a transformers tokenizer, best a fast one. Raises UserError for faults in the
    data and for a domain without a single token.
    """
    return cached_tokens(
        data,
        tokenizer,
        lambda _, source: encode_batches(source.documents(), tokenizer),
        fingerprint=tokenizer_fingerprint(tokenizer),
        dtype=np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32,
        cache=cache,
    )


def cached_tokens(
    data: Data,
    tokenizer: Any,
    encode: Callable[[str, Source], Iterator[list[list[int]]]],
    *,
    fingerprint: str,
    dtype: type[np.integer[Any]],
    cache: Path | str | None,
) -> dict[str, TokenDomain]:
    """Return every domain of `data` as `encode` makes it (of its name and source), or from cache.

    `fingerprint` is the key of what decides ids beside the data, `dtype` holds them.
    """
    folder = cache_directory() if cache is None else check_folder(cache)
    opened = {}
    for name, source in open_domains(data).items():
        path = folder / f"{fingerprint[:16]}-{source.fingerprint()[:32]}"
        if not (path / "tokens.json").is_file():
            _write(path, encode(name, source), dtype, name)
        opened[name] = _open(path, name, tokenizer)
    return opened


def cache_directory() -> Path:
    """Return where token ids are kept: $MOESAIC_CACHE, or moesaic in the user's cache folder."""
    if given := os.environ.get("MOESAIC_CACHE"):
        return Path(given).expanduser() / "tokens"
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "moesaic" / "tokens"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a key of what decides ids: the model, its rules and added tokens, not its padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules["truncation"] = rules["padding"] = None
        facts: Any = rules
    else:
        facts = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    text = json.dumps([_FORMAT, facts], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def encode_batches(texts: Iterable[str], tokenizer: Any) -> Iterator[list[list[int]]]:
    """Tokenise documents without special tokens; batches of id lists, up to a few megabytes each.

    The first batches are small, for readers who need few tokens.
    """
    encode = _encoder(tokenizer)
    batch: list[str] = []
    size, limit = 0, _FIRST_CHARACTERS
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= limit or len(batch) >= _BATCH_DOCUMENTS:
            yield encode(batch)
            batch, size = [], 0
            limit = min(2 * limit, _BATCH_CHARACTERS)
    if batch:
        yield encode(batch)


def _encoder(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda batch: tokenizer(batch, add_special_tokens=False)["input_ids"]
    own = type(backend).from_str(backend.to_str())  # the caller's truncation and padding stay
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = True
    return lambda batch: [
        found.ids for found in own.encode_batch_fast(batch, add_special_tokens=False)
    ]


def _write(
    path: Path, batches: Iterable[list[list[int]]], dtype: type[np.integer[Any]], name: str
) -> None:
    """Write a cache entry under a name of its own, then rename it; several writers may race."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    # Not core.files.output_directory: several machines may share the cache, and process ids would
    # then neither be unique nor tell who is alive.
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.partial-"))
    try:
        _write_entry(partial, batches, dtype, name)
        try:
            partial.rename(path)
        except OSError:
            if not (path / "tokens.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # a cache that nothing came into


def _write_entry(
    folder: Path, batches: Iterable[list[list[int]]], dtype: type[np.integer[Any]], name: str
) -> None:
    offsets = array.array("q", [0])
    with (folder / "ids.bin").open("wb") as file, progress(f"tokenising {name}") as bar:
        for batch in batches:
            for ids in batch:
                file.write(np.asarray(ids, dtype=dtype).tobytes())
                offsets.append(offsets[-1] + len(ids))
            bar.advance(len(batch), tokens=offsets[-1])
    if offsets[-1] == 0:
        raise UserError(f"the domain '{name}' holds no token. Give it text, or leave it out.")
    with (folder / "offsets.bin").open("wb") as file:
        offsets.tofile(file)
    facts = {"documents": len(offsets) - 1, "tokens": offsets[-1], "dtype": dtype.__name__}
    (folder / "tokens.json").write_text(json.dumps(facts), encoding="utf-8")


def _remove_stale(path: Path) -> None:
    """Remove what a killed writer left; a living one has touched its files within a day."""
    for leftover in path.parent.glob(f".{path.name}.partial-*"):
        with contextlib.suppress(OSError):
            newest = max(file.stat().st_mtime for file in [leftover, *leftover.iterdir()])
            if time.time() - newest > _STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def _open(path: Path, name: str, tokenizer: Any) -> TokenDomain:
    facts = json.loads((path / "tokens.json").read_text(encoding="utf-8"))
    # As plain arrays: slicing a memmap object costs more than the copy it is made for.
    ids = np.asarray(np.memmap(path / "ids.bin", dtype=facts["dtype"], mode="r"))
    offsets = np.asarray(np.memmap(path / "offsets.bin", dtype=np.int64, mode="r"))
    if len(ids) != facts["tokens"] or len(offsets) != facts["documents"] + 1:
        raise UserError(f"{path}: the cached tokens are damaged. Remove that folder.")
    return TokenDomain(name, ids, offsets, tokenizer.bos_token_id, tokenizer.eos_token_id)
