"""The text that every Python has: three domains made of its standard library.

    code         the source of each module
    docstrings   the docstrings of each module, its classes and functions, under their signatures
    prose        the help topics of `pydoc`, which are chapters of the language reference

A module or topic is held out (split ``valid``) when the SHA-256 of its name says so, about one in
ten: the same ones on every machine, for code and docstrings alike. Help topics quote each other
(that of `while` is a part of that of all compound statements), so paragraphs of held-out topics are
cut out of those to train on. Generated tables, test suites and packages that distributions leave
out are not read. The text differs between Python versions.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from moesaic.core.errors import UserError, nearest
from moesaic.data.sources import Source

Kind = Literal["code", "docstrings", "prose"]
KINDS: tuple[Kind, ...] = ("code", "docstrings", "prose")
SPLITS = ("all", "train", "valid")
HELD_OUT_SHARE = 0.1

_LEFT_OUT = {
    "__phello__",
    "config",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "this",
    "turtledemo",
}


@dataclass(frozen=True)
class StandardLibrary:
    """One domain of the standard library, one split of it."""

    kind: Kind
    split: str = "all"

    def documents(self) -> Iterator[str]:
        """Yield one document a module (or help topic), in the order of names."""
        yield from (text for _, text in self.named() if text)

    def named(self) -> Iterator[tuple[str, str]]:
        """Yield the name of each module or topic with its document, which may be empty."""
        if self.kind == "prose":
            seen_only = self.split == "train"
            for name, text in sorted(_topics().items()):
                if self._wanted(name):
                    yield name, _without_held_out(text) if seen_only else text.strip() + "\n"
            return
        for name, path in _modules():
            if self._wanted(name):
                source = _read(path)
                yield name, source if self.kind == "code" else docstrings(source, name)

    def fingerprint(self) -> str:
        """Hash the text that the documents are made of."""
        digest = hashlib.sha256(f"stdlib 2 {self.kind} {self.split}\n".encode())
        if self.kind == "prose":
            for name, text in sorted(_topics().items()):
                digest.update(f"{name}\n{text}\n".encode())
        else:
            for name, path in _modules():
                digest.update(name.encode() + path.read_bytes())
        return digest.hexdigest()

    def _wanted(self, name: str) -> bool:
        return self.split == "all" or held_out(name) == (self.split == "valid")


def _without_held_out(text: str) -> str:
    kept = [part for part in text.strip().split("\n\n") if part.strip() not in _held_out_prose()]
    return "\n\n".join(kept) + "\n" if kept else ""


@lru_cache(maxsize=1)
def _held_out_prose() -> frozenset[str]:
    """Paragraphs of the help topics that are held out."""
    topics = [text for name, text in _topics().items() if held_out(name)]
    return frozenset(part.strip() for text in topics for part in text.split("\n\n"))


def library(split: str = "all") -> dict[str, Source]:
    """Return the three domains. Raises UserError for a split that is not all, train or valid."""
    if split not in SPLITS:
        raise UserError(
            f"stdlib@{split}: no such split.{nearest(split, SPLITS)} "
            "Write stdlib, stdlib@train or stdlib@valid."
        )
    if not _modules():
        raise UserError(
            f"the standard library of {sys.executable} has no source files in "
            f"{sysconfig.get_path('stdlib')}. Use a Python that ships them, or give other data."
        )
    return {kind: StandardLibrary(kind, split) for kind in KINDS}


def held_out(name: str) -> bool:
    """Say whether the module or topic `name` is held out of training."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def docstrings(source: str, module: str) -> str:
    """Return the docstrings of a module's source, each under its dotted name and arguments."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    found = list(_described(tree, module))
    return "\n\n".join(found) + "\n" if found else ""


def _described(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text and text.strip():
            arguments = f"({ast.unparse(node.args)})" if hasattr(node, "args") else ""
            yield f"{name}{arguments}\n{inspect.cleandoc(text)}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _described(child, f"{name}.{child.name}")


@lru_cache(maxsize=1)
def _modules() -> tuple[tuple[str, Path], ...]:
    """Every module that is read: its dotted name and its file, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = list(path.relative_to(root).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if parts and not any(_skipped(part) for part in parts):
            found.append((".".join(parts), path))
    return tuple(sorted(found))


def _skipped(part: str) -> bool:
    return part in _LEFT_OUT or part.startswith(("_sysconfigdata", "config-")) or "-" in part


def _read(path: Path) -> str:
    try:
        with tokenize.open(path) as file:  # honours a coding line
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions pack it separately
        return {}
    return dict(topics)
