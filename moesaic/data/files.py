"""Text files as documents or conversations: .jsonl (one JSON object a line) and .txt (one document
a file), plain or gzipped; read as a stream, with the file and line of whatever is wrong.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from moesaic.core.errors import UserError
from moesaic.data.chat import Message, read_messages

SUFFIXES = (".jsonl", ".txt", ".jsonl.gz", ".txt.gz")
_HASHED_WHOLE = 1 << 30
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Files:
    """The documents of some .jsonl and .txt files, file after file."""

    paths: tuple[Path, ...]

    def documents(self) -> Iterator[str]:
        """Yield each document. Raises UserError with file and line for a line that is not one."""
        for path in self.paths:
            yield from read_documents(path)

    def conversations(self) -> Iterator[list[Message]]:
        """Yield each conversation. Raises UserError with file and line for what is none."""
        for path in self.paths:
            yield from read_conversations(path)

    def fingerprint(self) -> str:
        """Hash the contents of the files and the form they are read in, not their names."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{suffix_of(path)} {content_hash(path)}\n".encode())
        return digest.hexdigest()


def checked(path: Path) -> Path:
    """Return `path`. Raises UserError when its name says that it is no text that is read here."""
    if not suffix_of(path):
        raise UserError(
            f"{path}: not a kind of text that is read here. Give one of {', '.join(SUFFIXES)}."
        )
    return path


def files_below(folder: Path) -> list[Path]:
    """List the text files of `folder` and its sub-folders, sorted; hidden ones are left out."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if suffix_of(path)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise UserError(
            f"{folder}: holds no {' or '.join(SUFFIXES[:2])} file. Put text there, or give "
            "another folder."
        )
    return found


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of one file.

    Raises UserError with file and line number for an empty line, a line that is not a JSON object,
    an object without ``text``, or bytes that are not UTF-8.
    """
    with _reading(path) as file:
        if suffix_of(path).startswith(".txt"):
            yield _decode(file.read(), str(path))
        else:
            for where, record, escapes in _records(file, path):
                text = _text(record, where)
                yield _whole(text) if escapes else text


def read_conversations(path: Path) -> Iterator[list[Message]]:
    """Yield the conversations of one .jsonl file; see `moesaic.data.chat` for their forms.

    Raises UserError as `read_documents` does, and for a .txt file.
    """
    if suffix_of(path).startswith(".txt"):
        raise UserError(f"{path}: text, but conversations are asked for. Give a .jsonl file.")
    with _reading(path) as file:
        for where, record, escapes in _records(file, path):
            turns = read_messages(record, where=where)
            yield [{k: _whole(v) for k, v in turn.items()} for turn in turns] if escapes else turns


@contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    try:
        with _open(path) as file:
            yield file
    except (gzip.BadGzipFile, EOFError):
        raise UserError(f"{path}: the gzip data is damaged or cut off. Copy it again.") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it.") from None


def content_hash(path: Path) -> str:
    """Return a key of a file's content.

    Up to 1 GB it is the SHA-256 of all bytes. Beyond, where reading it all would delay every start,
    it is that of the size, the time of the last change and 64 MB spread over the file.
    """
    facts = path.stat()
    with path.open("rb") as file:
        if facts.st_size <= _HASHED_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{facts.st_size} {facts.st_mtime_ns}".encode())
        for part in range(64):
            file.seek(part * (facts.st_size - (1 << 20)) // 63)
            digest.update(file.read(1 << 20))
        return digest.hexdigest()


def _records(file: IO[bytes], path: Path) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield place and JSON object of every line, and whether escapes are among it."""
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
                f"{where}: not JSON ({problem}). Every line is one JSON object."
            ) from None
        if not isinstance(record, dict):
            raise UserError(
                f"{where}: a JSON {type(record).__name__}, not an object. "
                'Write {"text": "..."} or {"conversations": [...]} on every line.'
            )
        yield where, record, b"\\u" in line


def _text(record: dict[str, Any], where: str) -> str:
    text = record.get("text")
    if not isinstance(text, str):
        keys = ", ".join(map(str, record)) or "nothing"
        fault = "has no 'text'" if "text" not in record else "'text' is not a string"
        raise UserError(
            f'{where}: {fault} (it holds: {keys[:200]}). Write {{"text": "..."}} on every line.'
        )
    return text


def _whole(text: str) -> str:
    """Half of a surrogate pair is no character, and tokenizers refuse it."""
    return _SURROGATE.sub("\ufffd", text)


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


def suffix_of(path: Path) -> str:
    name = path.name.lower()
    return next((suffix for suffix in reversed(SUFFIXES) if name.endswith(suffix)), "")
