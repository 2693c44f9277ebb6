from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moesaic.core.errors import UserError
from moesaic.core.files import output_directory, write_text
from moesaic.core.lineage import read_lineage, write_lineage


def fail_while_writing(out, **options):
    with pytest.raises(ZeroDivisionError), output_directory(out, **options) as partial:
        (partial / "x").write_text(str(1 // 0))


def test_output_appears_whole(tmp_path):
    out = tmp_path / "runs" / "a"
    with output_directory(out) as partial:
        (partial / "x").write_text("1")
        assert not out.exists()
    assert (out / "x").read_text() == "1"
    assert os.listdir(out.parent) == ["a"]


def test_output_vanishes_on_failure_and_keeps_what_was_there(tmp_path):
    out = tmp_path / "a"
    fail_while_writing(out)
    assert os.listdir(tmp_path) == []
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(UserError, match="not empty"), output_directory(out):
        pass
    fail_while_writing(out, overwrite=True)
    assert (out / "old").read_text() == "old"
    with output_directory(out, overwrite=True) as partial:
        (partial / "new").write_text("new")
    assert os.listdir(out) == ["new"]
    assert os.listdir(tmp_path) == ["a"]


def test_a_killed_process_leaves_nothing_for_long(tmp_path):
    code = (
        "import os, signal; from moesaic.core.files import output_directory\n"
        f"with output_directory({str(tmp_path / 'a')!r}) as p:\n"
        "    (p / 'x').write_text('1'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert not (tmp_path / "a").exists()
    assert len(os.listdir(tmp_path)) == 1
    with output_directory(tmp_path / "a") as partial:
        (partial / "x").write_text("2")
    assert os.listdir(tmp_path) == ["a"]


def test_write_text_replaces_atomically(tmp_path):
    path = tmp_path / "f"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert os.listdir(tmp_path) == ["f"]


def test_lineage_keeps_the_parents(tmp_path):
    dense, moe = tmp_path / "dense", tmp_path / "moe"
    dense.mkdir()
    moe.mkdir()
    write_lineage(dense, step="init", parent=None, config={"seed": 1}, seed=1)
    write_lineage(moe, step="convert", parent=dense, config={"experts": 8}, exact=True)
    record = read_lineage(moe)
    assert record is not None
    assert record["exact"] is True
    assert record["parent_lineage"]["step"] == "init"
    assert record["versions"]["moesaic"]
    assert read_lineage(tmp_path) is None
