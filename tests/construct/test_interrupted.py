"""A conversion that is killed, or that finds the disk full, leaves nothing under its name."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moesaic.construct.convert import convert
from moesaic.models.checkpoint import Checkpoint
from tests.construct.dense_models import write_dense
from tests.helpers import Result, run_cli

# Converts for real; only the arranging of a layer is slowed, so that there is a middle to kill in.
SLOW = """
import sys, time
from moesaic.construct import stream
from moesaic.construct.convert import convert
arrange = stream.rearrange
def slowly(*args):
    time.sleep(0.5)
    arrange(*args)
stream.rearrange = slowly
convert(sys.argv[1], out=sys.argv[2], experts=4, top_k=2, verify="layers")
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense") / "model", num_hidden_layers=40)


def test_kill_9_in_the_middle_leaves_no_checkpoint_and_the_next_run_cleans_up(
    dense: Path, tmp_path: Path
) -> None:
    out = tmp_path / "moe"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(dense), str(out)])
    try:
        deadline = time.monotonic() + 60
        while not (found := list(tmp_path.glob(".moe.partial-*/*.safetensors"))):
            assert process.poll() is None, "the conversion ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not out.exists()
    assert found[0].stat().st_size > 0
    convert(dense, out=out, experts=4, top_k=2, verify="layers")
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]
    assert len(Checkpoint(out).keys()) > 40


def failed_for_space(result: Result, folder: Path) -> None:
    assert result.exit_code == 1, result
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "space" in errors[0].lower()
    assert not list(folder.iterdir())


def run(dense: Path, out: Path) -> Result:
    return run_cli("convert", dense, "-o", out, "--experts", 4, "--top-k", 2, "--verify", "off")


def test_a_disk_that_fills_up_while_writing(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = os.pwrite, [1]

    def fills_up(descriptor: int, data: memoryview, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", fills_up)
    failed_for_space(run(dense, tmp_path / "moe"), tmp_path)
    assert left[0] < 0


def test_a_file_that_may_not_grow(dense: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        result = run(dense, tmp_path / "moe")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    failed_for_space(result, tmp_path)


def test_a_small_file_system(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting is not permitted here")
    try:
        failed_for_space(run(dense, disk / "moe"), disk)  # refused beforehand
        from moesaic.models import writer

        monkeypatch.setattr(
            writer.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 40})
        )
        failed_for_space(run(dense, disk / "moe"), disk)  # met while writing
    finally:
        subprocess.run(["umount", str(disk)], check=True)
