"""kill -9 of a real process, in training and in the middle of saving; the same command goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from moesaic.core.config import to_yaml
from moesaic.training.state import states
from tests.helpers import run_cli
from tests.training.test_loop import course, log, weights

# Kills itself inside the third save, when one of the state's files is written and the others are
# not.
KILLED_WHILE_SAVING = """
import os, signal, sys
from moesaic.training import state
saves, original = [], state.save_file
def save_file(tensors, path):
    saves.append(path)
    if len(saves) == 8:
        path.write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    original(tensors, path)
state.save_file = save_file
from moesaic.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def arguments(settings, tmp_path):
    # Enough updates that the kill falls inside; every line of the log is one update.
    config = settings(steps=60, checkpoint={"every": 4}, evaluate={"every": 20, "at_start": False})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    return lambda out: ["train", str(tmp_path / "run.yaml"), "-o", str(tmp_path / out), "--json"]


def start(arguments, *python):
    # As many threads as this process: a sum over another number of threads rounds differently.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, *python, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def lines(out):
    return len(log(out)) if (out / "log.jsonl").is_file() else 0


def assert_resumes(arguments, out):
    straight = run_cli(*arguments("straight"))
    assert straight.exit_code == 0, straight.stderr
    assert not (out / "config.json").exists(), "a model stands under the final name"
    resumed = run_cli(*arguments(out.name))
    assert resumed.exit_code == 0, resumed.stderr
    assert resumed.json["updates"] == 60
    assert "resumed from update" in resumed.stderr
    assert course(out) == course(out.parent / "straight")
    a, b = weights(out.parent / "straight"), weights(out)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_killed_in_training(arguments, tmp_path):
    out = tmp_path / "killed"
    process = start(arguments("killed"), "-m", "moesaic")
    try:
        deadline = time.monotonic() + 120
        while lines(out) < 9 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before the kill"
    assert 9 <= lines(out) < 60
    assert_resumes(arguments, out)


def test_killed_while_saving(arguments, tmp_path):
    out = tmp_path / "killed"
    process = start(arguments("killed"), "-c", KILLED_WHILE_SAVING)
    assert process.wait(timeout=120) == -signal.SIGKILL
    assert list(states(out)) == [4, 8], "two whole states; the third was being written"
    assert list((out / "checkpoints").glob(".step-00000012.partial-*"))
    assert_resumes(arguments, out)
    assert not list((out / "checkpoints").glob(".*")), "the half state is cleaned away"
