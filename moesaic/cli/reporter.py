"""Notes and progress drawn with rich on standard error."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

EVERY = 5.0  # seconds between two lines of progress in a log


class RichReporter:
    """Draw progress bars with an ETA; one line a note. Nothing is written to standard output.

    Where standard error is a file or a pipe, progress is a plain line every `EVERY` seconds.
    """

    def __init__(self, *, plain: bool = False) -> None:
        self.console = Console(stderr=True, no_color=plain or None)
        self._progress: Progress | None = None

    def note(self, text: str) -> None:
        """Print one line above the bars."""
        console = self._progress.console if self._progress else self.console
        console.print(Text(text, style="dim"), soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, what: str, total: float | None) -> Iterator[_RichBar | _PlainBar]:
        """Show a bar; bars opened inside another one are stacked below it."""
        if not self.console.is_terminal:
            yield _PlainBar(self.console, what, total)
            return
        if self._progress is not None:
            with self._bar(self._progress, what, total) as bar:
                yield bar
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[facts]}"),
        )
        try:
            with (
                Progress(*columns, console=self.console, transient=True) as self._progress,
                self._bar(self._progress, what, total) as bar,
            ):
                yield bar
        finally:
            self._progress = None

    @contextlib.contextmanager
    def _bar(self, progress: Progress, what: str, total: float | None) -> Iterator[_RichBar]:
        task = progress.add_task(what, total=total, facts="")
        try:
            yield _RichBar(progress, task)
        finally:
            progress.remove_task(task)


class _RichBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, steps: float = 1, **fields: object) -> None:
        if fields:
            facts = "  ".join(f"{name} {_short(value)}" for name, value in fields.items())
            self._progress.update(self._task, advance=steps, facts=facts)
        else:
            self._progress.update(self._task, advance=steps)


class _PlainBar:
    """Progress as lines of a log: `training 300/1200, 25 %, ETA 1:30, loss 2.41`."""

    def __init__(self, console: Console, what: str, total: float | None) -> None:
        self._console, self._what, self._total = console, what, total
        self._done = 0.0
        self._start = self._said = time.monotonic()

    def advance(self, steps: float = 1, **fields: object) -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._said < EVERY:
            return
        self._said = now
        parts = [f"{self._what} {self._done:g}"]
        if self._total:
            share = min(self._done / self._total, 1)
            minutes, seconds = divmod(round((now - self._start) * (1 / max(share, 1e-9) - 1)), 60)
            parts = [f"{parts[0]}/{self._total:g}", f"{share:.0%}", f"ETA {minutes}:{seconds:02}"]
        parts += [f"{name} {_short(value)}" for name, value in fields.items()]
        self._console.print(Text(", ".join(parts), style="dim"), soft_wrap=True)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
