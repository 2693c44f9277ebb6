"""Where documents come from: files, folders, patterns, Hugging Face datasets, the standard library.

`data` is, everywhere, one of

    a file     ``books.jsonl``, whose lines are JSON objects with a ``text`` (also .jsonl.gz), or
               ``story.txt``, which is one document
    a folder   each file and each sub-folder in it is a domain named by its stem
    a pattern  ``corpus/*/train.jsonl``: each match is a domain named by what stands for the star
    a mapping  domain -> any of these, or a list of them, read one after the other
    a name     ``org/name``, ``org/name:config``, ``org/name@split``: a Hugging Face dataset;
               ``stdlib``, ``stdlib@train``, ``stdlib@valid``: the standard library of this Python

Documents are read as they are asked for; a corpus is never held in memory.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from moesaic.core.errors import UserError, nearest
from moesaic.data.chat import Message
from moesaic.data.files import SUFFIXES, Files, checked, files_below, suffix_of


@runtime_checkable
class Source(Protocol):
    """Documents that can be read again and again, always in the same order."""

    def documents(self) -> Iterator[str]:
        """Yield the text of each document."""

    def fingerprint(self) -> str:
        """Return a key that changes when the documents change."""


def conversations_of(source: Source) -> Iterator[list[Message]]:
    """Return the conversations of a source. Raises UserError for one that is text only."""
    read: Any = getattr(source, "conversations", None)
    if read is None:
        raise UserError("conversations are read from .jsonl files and datasets, this is text.")
    found: Iterator[list[Message]] = read()
    return found


Data = str | os.PathLike[str] | Source | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Chain:
    """Several sources as one."""

    parts: tuple[Source, ...]

    def documents(self) -> Iterator[str]:
        """Yield the documents of each part in turn."""
        for part in self.parts:
            yield from part.documents()

    def conversations(self) -> Iterator[list[Message]]:
        """Yield the conversations of each part in turn. Raises UserError for a part of text."""
        for part in self.parts:
            yield from conversations_of(part)

    def fingerprint(self) -> str:
        """Hash the fingerprints of the parts."""
        text = "\n".join(part.fingerprint() for part in self.parts)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Texts:
    """Documents that are already in memory."""

    texts: tuple[str, ...]

    def documents(self) -> Iterator[str]:
        """Yield each text."""
        yield from self.texts

    def fingerprint(self) -> str:
        """Hash the texts."""
        digest = hashlib.sha256()
        for text in self.texts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


def open_domains(data: Data) -> dict[str, Source]:
    """Return the domains of `data` by name; see the module's docstring for the forms it may take.

    Files are not read yet. Raises UserError for a missing file, an empty folder, a pattern without
    a match, a file that is neither .jsonl nor .txt, and two sources that claim one domain.
    """
    if isinstance(data, Mapping):
        if not data:
            raise UserError("the data is an empty mapping. Give at least one domain: source.")
        return {str(name): open_source(value, where=str(name)) for name, value in data.items()}
    if isinstance(data, str) and _library(data):
        from moesaic.data.stdlib import library

        return dict(library(_library(data)))
    if not isinstance(data, str | os.PathLike):
        return {"text": open_source(data)}
    text = os.fspath(data)
    if not text:
        raise UserError("the data is an empty name. Give a file, a folder or a dataset.")
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return {_stem(path): Files((checked(path),))}
    if glob.has_magic(text):
        return _pattern(str(path))
    _refuse_missing(text, path)
    return {re.split(r"[:@]", text)[0].rpartition("/")[2]: _hub(text)}


def open_source(data: Data, *, where: str = "data") -> Source:
    """Return `data` as one domain: a folder or pattern means all of its files, sorted by name.

    Raises UserError as `open_domains` does; `where` names the place of `data` in the messages.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, Mapping):
        raise UserError(
            f"{where}: a mapping inside a mapping. A domain is a file, a folder, a list or a name."
        )
    if isinstance(data, str) and _library(data):
        from moesaic.data.stdlib import library

        return Chain(tuple(library(_library(data)).values()))
    if isinstance(data, str | os.PathLike):
        text = os.fspath(data)
        path = Path(text).expanduser()
        if path.is_dir():
            return Files(tuple(files_below(path)))
        if path.exists():
            return Files((checked(path),))
        if glob.has_magic(text):
            return Chain(tuple(_pattern(str(path)).values()))
        _refuse_missing(text, path)
        return _hub(text)
    if isinstance(data, Sequence) and data:
        return Chain(tuple(open_source(part, where=where) for part in data))
    raise UserError(
        f"{where} is {data!r}. Give a .jsonl or .txt file, a folder, a list of them, or the "
        "name of a Hugging Face dataset."
    )


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.name[: len(path.name) - len(suffix_of(path))]


def _folder(folder: Path) -> dict[str, Source]:
    domains: dict[str, Source] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or not (entry.is_dir() or suffix_of(entry)):
            continue
        paths = [p for p in [entry] if entry.is_file()] or _maybe_below(entry)
        if paths:
            _add(domains, _stem(entry), Files(tuple(paths)), str(folder))
    if not domains:
        files_below(folder)  # raises: the folder is empty
    return domains


def _maybe_below(folder: Path) -> list[Path]:
    try:
        return files_below(folder)
    except UserError:
        return []


def _pattern(pattern: str) -> dict[str, Source]:
    """Name each match by the parts of its path where the pattern has a wildcard."""
    parts = Path(pattern).parts
    if "**" in parts:
        raise UserError(
            f"{pattern}: '**' names no domain. Give a folder, or write '*' for one level."
        )
    domains: dict[str, Source] = {}
    for match in sorted(glob.glob(pattern)):
        path = Path(match)
        files = _maybe_below(path) if path.is_dir() else [path] if suffix_of(path) else []
        if not files:
            continue
        last = len(parts) - 1
        name = "/".join(
            _stem(path) if index == last else given
            for index, (given, asked) in enumerate(zip(path.parts, parts, strict=True))
            if glob.has_magic(asked)
        )
        _add(domains, name, Files(tuple(files)), pattern)
    if not domains:
        raise UserError(
            f"{pattern}: no {' or '.join(SUFFIXES[:2])} file matches. Check the pattern."
        )
    return domains


def _add(domains: dict[str, Source], name: str, source: Source, where: str) -> None:
    if name in domains:
        raise UserError(
            f"{where}: two sources are called '{name}'. Rename one, or give a mapping "
            "of domain to source."
        )
    domains[name] = source


def _library(name: str) -> str:
    """Return the split asked for when `name` is the standard library, else an empty string."""
    found = re.fullmatch(r"stdlib(?:@(\w+))?", name)
    return (found[1] or "all") if found else ""


def _refuse_missing(text: str, path: Path) -> None:
    """Raise UserError when `text`, which does not exist, can only have been meant as a path."""
    looks_like_path = (
        bool(suffix_of(path))
        or text.startswith(("/", ".", "~"))
        or text.endswith("/")
        or text.count("/") > 1
        or not re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?(?::[\w.-]+)?(?:@[\w.-]+)?", text)
    )
    if looks_like_path:
        near = path.parent
        while not near.is_dir() and near != near.parent:
            near = near.parent
        hint = nearest(path.name, _names(near)) if near == path.parent else ""
        raise UserError(
            f"{text}: no such file or folder.{hint} Give a .jsonl or .txt file, a folder, or the "
            "name of a Hugging Face dataset."
        )


def _names(folder: Path) -> Iterable[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def _hub(name: str) -> Source:
    from moesaic.data.hub import HubDataset

    return HubDataset.parse(name)
