from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import moesaic
from tests.helpers import assert_user_error, run_cli


def test_version():
    assert run_cli("--version").stdout.strip() == f"moesaic {moesaic.__version__}"


def test_unknown_command_and_missing_file_exit_with_2(tmp_path):
    assert run_cli("convrt").exit_code == 2
    result = run_cli("info", tmp_path / "nothing")
    assert_user_error(result, str(tmp_path / "nothing"))


def test_help_is_fast():
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "moesaic", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5  # of the processor: a busy machine may wait


def test_public_names_resolve():
    for name in moesaic.__all__:
        assert callable(getattr(moesaic, name)) or name == "__version__", name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "x", "-o", "y", "--top-k", "two"], ["--top-k", "integer"]),
        (["convert", "x", "--top-k", "2"], ["--out", "moesaic convert --help"]),
        (["split", "x", "-o", "y", "--experts", "4", "--shard", "1"], ["--shard", "--shared"]),
        (["kernels", "check", "x", "--tokens", "0"], ["--tokens", "moesaic kernels check --help"]),
        (["convrt"], ["convert", "moesaic --help"]),
        (["list", "splts"], ["did you mean 'splits'"]),
    ],
)
def test_wrong_arguments_are_one_line_with_the_cure(arguments: list[str], words: list[str]):
    result = run_cli(*arguments)
    assert_user_error(result, *words)
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1


def test_list_takes_the_singular():
    assert run_cli("list", "split", "--json").json == run_cli("list", "splits", "--json").json


def test_no_room_hides_a_public_name():
    """`import moesaic.x` sets the attribute `x`: a room of that name would replace the function."""
    rooms = {path.stem for path in Path(moesaic.__file__).parent.iterdir()}
    assert not rooms & set(moesaic.__all__)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("I/O error: No space left on device (28)"),
    ],
)
def test_a_full_disk_is_said_whoever_noticed(error: Exception, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("moesaic.models.save.save", fail)
    result = run_cli("init", "llama-moe-tiny", "-o", tmp_path / "new" / "x")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no space left")
    assert list(tmp_path.iterdir()) == []
