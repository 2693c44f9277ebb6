"""The example of docs/offload.md runs, and its commands are spelled right."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.helpers import run_cli

PAGE = Path(__file__).parents[2] / "docs" / "offload.md"


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    exec(compile(code, "offload.md", "exec"), {})
    shown = capsys.readouterr().out
    assert re.search(r"\d+% hits, \d+ experts fetched on demand", shown)
    assert "Measured(tokens_per_second=" in shown


def test_the_commands_are_spelled_right():
    (block,) = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "moesaic"
        shown = run_cli(*arguments[:2], "--help").stdout
        assert all(word in shown for word in arguments if word.startswith("--"))
