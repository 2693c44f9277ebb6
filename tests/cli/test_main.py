from __future__ import annotations

import subprocess
import sys
import time

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
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "moesaic", "--help"], check=True, capture_output=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.5


def test_public_names_resolve():
    for name in moesaic.__all__:
        assert callable(getattr(moesaic, name)) or name == "__version__", name
