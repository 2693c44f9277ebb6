"""Notes and progress drawn with rich on standard error."""

from __future__ import annotations

import contextlib
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


class RichReporter:
    """Draw progress bars with an ETA; one line a note. Nothing is written to standard output."""

    def __init__(self, *, plain: bool = False) -> None:
        self.console = Console(stderr=True, no_color=plain or None)
        self._progress: Progress | None = None

    def note(self, text: str) -> None:
        """Print one line above the bars."""
        console = self._progress.console if self._progress else self.console
        console.print(Text(text, style="dim"), soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, what: str, total: float | None) -> Iterator[_RichBar]:
        """Show a bar; bars opened inside another one are stacked below it."""
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


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
