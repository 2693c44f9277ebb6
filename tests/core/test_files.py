from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moesaic.core.errors import UserError
from moesaic.core.files import MADE_BY, check_output, check_step, output_directory, write_text
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


def test_only_what_moesaic_made_and_does_not_read_is_replaced(tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    for folder in (out, other):
        folder.mkdir()
        (folder / "x").write_text("x")
    with pytest.raises(UserError, match="did not make it"):
        check_step(out, overwrite=True, inputs=[])
    (out / MADE_BY).write_text("{}")
    given = [other, "random", None, {"data": [str(other / "x")]}, "x" * 5000]
    assert check_step(out, overwrite=True, inputs=given) == out
    (tmp_path / "link").symlink_to(out)
    for held in (out, out / "x", {"a": str(out / "x")}, tmp_path / "link"):
        with pytest.raises(UserError, match="holds an input"):
            check_step(out, overwrite=True, inputs=[held])


def test_a_place_where_nothing_can_be_made_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "file" / "a" / "b")
    with pytest.raises(UserError, match="cannot be made"), output_directory(tmp_path / ("x" * 300)):
        pass
    fail_while_writing(tmp_path / "new" / "er" / "a")
    assert os.listdir(tmp_path) == ["file"], "parents made for it are gone too"


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
