"""Where documents come from: files, folders, patterns, Hugging Face datasets, the standard library.

`data` is, everywhere, one of

    a file       ``books.jsonl`` (one JSON object a line, its ``text`` is the document; also .jsonl.gz)
                 or ``story.txt`` (the whole file is one document)
    a folder     each file and each sub-folder in it is a domain named by its stem
    a pattern    ``corpus/*/train.jsonl``: each match is a domain named by what the pattern leaves open
    a mapping    domain -> any of these (or a list of them, read one after the other)
    a name       ``org/name``, ``org/name:config``, ``org/name@split``: a Hugging Face dataset;
                 ``stdlib``, ``stdlib@train``, ``stdlib@valid``: the standard library of this Python

Documents are read as they are asked for; a corpus is never held in memory.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from moesaic.core.errors import UserError, nearest

SUFFIXES = (".jsonl", ".txt", ".jsonl.gz", ".txt.gz")


@runtime_checkable
class Source(Protocol):
    """Documents that can be read again and again, always in the same order."""

    def documents(self) -> Iterator[str]:
        """Yield the text of each document."""

    def fingerprint(self) -> str:
        """Return a key that changes when the documents change."""


Data = str | os.PathLike[str] | Source | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Files:
    """The documents of some .jsonl and .txt files, file after file."""

    paths: tuple[Path, ...]

    def documents(self) -> Iterator[str]:
        """Yield each document. Raises UserError with file and line for a line that is not one."""
        for path in self.paths:
            yield from read_documents(path)

    def fingerprint(self) -> str:
        """Hash the contents of the files and the form they are read in, not their names."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{_suffix(path)} {content_hash(path)}\n".encode())
        return digest.hexdigest()

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.paths)


@dataclass(frozen=True)
class Chain:
    """Several sources as one."""

    parts: tuple[Source, ...]

    def documents(self) -> Iterator[str]:
        """Yield the documents of each part in turn."""
        for part in self.parts:
            yield from part.documents()

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

    Files are not read yet. Raises UserError for a missing file, an empty folder, a pattern without a
    match, a file that is neither .jsonl nor .txt, and two sources that claim one domain.
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
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return {_stem(path): Files((_checked(path),))}
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
            return Files(tuple(_files_below(path)))
        if path.exists():
            return Files((_checked(path),))
        if glob.has_magic(text):
            return Chain(tuple(_pattern(str(path)).values()))
        _refuse_missing(text, path)
        return _hub(text)
    if isinstance(data, Sequence) and data:
        return Chain(tuple(open_source(part, where=where) for part in data))
    raise UserError(
        f"{where} is {data!r}. Give a .jsonl or .txt file, a folder, a list of them, or the name of "
        "a Hugging Face dataset."
    )


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of one file.

    Raises UserError with file and line number for an empty line, a line that is not a JSON object, an
    object without ``text``, or bytes that are not UTF-8.
    """
    try:
        with _open(path) as file:
            if _suffix(path).startswith(".txt"):
                yield _decode(file.read(), str(path))
            else:
                yield from _lines(file, path)
    except (gzip.BadGzipFile, EOFError):
        raise UserError(f"{path}: the gzip data is damaged or cut off. Copy it again.") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it.") from None


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lines(file: IO[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        where = f"{path}:{number}"
        if not line.strip():
            raise UserError(f"{where}: an empty line. Remove it: every line is a JSON object.")
        try:
            record = json.loads(_decode(line, where))
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            problem = getattr(error, "msg", "it cannot be parsed")
            raise UserError(
                f"{where}: not JSON ({problem}). Every line is an object with a 'text'."
            ) from None
        if not isinstance(record, dict):
            raise UserError(
                f"{where}: a JSON {type(record).__name__}, not an object. "
                'Write {"text": "..."} on every line.'
            )
        text = record.get("text")
        if not isinstance(text, str):
            keys = ", ".join(map(str, record)) or "nothing"
            fault = "has no 'text'" if "text" not in record else "'text' is not a string"
            raise UserError(
                f'{where}: {fault} (it holds: {keys[:200]}). Write {{"text": "..."}} on every line.'
            )
        yield text


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {error.start} is not UTF-8. Convert the file to UTF-8."
        ) from None


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]  # typeshed: GzipFile is no IO
    return path.open("rb")


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return next((suffix for suffix in reversed(SUFFIXES) if name.endswith(suffix)), "")


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.name[: len(path.name) - len(_suffix(path))]


def _checked(path: Path) -> Path:
    if not _suffix(path):
        raise UserError(
            f"{path}: not a kind of text that is read here. Give one of {', '.join(SUFFIXES)}."
        )
    return path


def _files_below(folder: Path) -> list[Path]:
    """List the text files of `folder` and its sub-folders, sorted; hidden ones are left out."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if _suffix(path)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise UserError(
            f"{folder}: holds no {' or '.join(SUFFIXES[:2])} file. Put text there, or give another folder."
        )
    return found


def _folder(folder: Path) -> dict[str, Source]:
    domains: dict[str, Source] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or not (entry.is_dir() or _suffix(entry)):
            continue
        paths = [p for p in [entry] if entry.is_file()] or _maybe_below(entry)
        if paths:
            _add(domains, _stem(entry), Files(tuple(paths)), str(folder))
    if not domains:
        _files_below(folder)  # raises: the folder is empty
    return domains


def _maybe_below(folder: Path) -> list[Path]:
    try:
        return _files_below(folder)
    except UserError:
        return []


def _pattern(pattern: str) -> dict[str, Source]:
    """Name each match by the parts of its path where the pattern has a wildcard."""
    parts = Path(pattern).parts
    if "**" in parts:
        raise UserError(f"{pattern}: '**' names no domain. Give a folder, or write '*' for one level.")
    domains: dict[str, Source] = {}
    for match in sorted(glob.glob(pattern)):
        path = Path(match)
        files = _maybe_below(path) if path.is_dir() else [path] if _suffix(path) else []
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
        raise UserError(f"{pattern}: no {' or '.join(SUFFIXES[:2])} file matches. Check the pattern.")
    return domains


def _add(domains: dict[str, Source], name: str, source: Source, where: str) -> None:
    if name in domains:
        raise UserError(
            f"{where}: two sources are called '{name}'. Rename one, or give a mapping of domain to source."
        )
    domains[name] = source


def _library(name: str) -> str:
    """Return the split asked for when `name` is the standard library, else an empty string."""
    found = re.fullmatch(r"stdlib(?:@(\w+))?", name)
    return (found[1] or "all") if found else ""


def _refuse_missing(text: str, path: Path) -> None:
    """Raise UserError when `text`, which does not exist, can only have been meant as a path."""
    looks_like_path = (
        bool(_suffix(path))
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
            f"{text}: no such file or folder.{hint} Give a .jsonl or .txt file, a folder, or the name "
            "of a Hugging Face dataset."
        )


def _names(folder: Path) -> Iterable[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def _hub(name: str) -> Source:
    from moesaic.data.hub import HubDataset

    return HubDataset.parse(name)
