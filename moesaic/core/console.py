"""How library code speaks: notes and progress go to the current reporter; nothing is printed.

The default reporter logs notes and shows no progress. The CLI installs one that draws with rich on
standard error. Libraries that embed moesaic may install their own with `reporting`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sized
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")

_log = logging.getLogger("moesaic")


class Bar(Protocol):
    """A progress bar in use."""

    def advance(self, steps: float = 1, **fields: object) -> None:
        """Move on by `steps`; `fields` (loss=2.1) are shown beside the bar."""


class Reporter(Protocol):
    """Where notes and progress go."""

    def note(self, text: str) -> None:
        """Say one line."""

    def progress(self, what: str, total: float | None) -> AbstractContextManager[Bar]:
        """Show that `what` is under way, with an ETA where `total` is known."""


class _SilentBar:
    def advance(self, steps: float = 1, **fields: object) -> None:
        pass


class LoggingReporter:
    """Notes go to the logger ``moesaic`` at INFO; progress is not shown."""

    def note(self, text: str) -> None:
        """Log one line."""
        _log.info(text)

    @contextlib.contextmanager
    def progress(self, what: str, total: float | None) -> Iterator[Bar]:
        """Show nothing."""
        yield _SilentBar()


_reporter: ContextVar[Reporter] = ContextVar("moesaic_reporter", default=LoggingReporter())  # noqa: B039


@contextlib.contextmanager
def reporting(reporter: Reporter) -> Iterator[Reporter]:
    """Send notes and progress to `reporter` inside the block."""
    token = _reporter.set(reporter)
    try:
        yield reporter
    finally:
        _reporter.reset(token)


def current() -> Reporter:
    """Return the reporter in force, for one that wraps it."""
    return _reporter.get()


def note(text: str) -> None:
    """Say one line to the user: a fallback that was chosen, a figure that decides something."""
    _reporter.get().note(text)


def progress(what: str, total: float | None = None) -> AbstractContextManager[Bar]:
    """Show that `what` is under way; the block calls ``bar.advance(1, loss=2.1)``."""
    return _reporter.get().progress(what, total)


def track(items: Iterable[T], what: str, total: float | None = None) -> Iterator[T]:
    """Yield `items`, reporting progress."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(what, total) as bar:
        for item in items:
            yield item
            bar.advance(1)
