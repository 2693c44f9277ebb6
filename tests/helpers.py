"""What several tests use: the command line in this process, and a place for shared fixtures."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).resolve().parents[2] / "shared"


@dataclass(frozen=True)
class Result:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def run_cli(*arguments: object) -> Result:
    """Run `moesaic ARGUMENTS` in this process, through the real `main` with its exit codes."""
    from moesaic.cli.main import main

    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main([str(argument) for argument in arguments])
    return Result(code, stdout.getvalue(), stderr.getvalue())


def assert_user_error(result: Result, *words: str) -> None:
    """Exit code 2, nothing on standard output, one line of error that holds `words`."""
    assert result.exit_code == 2, result
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word.lower() in errors[0].lower(), (word, errors[0])
