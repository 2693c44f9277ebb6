"""Run tests marked `interpreted` in a process of their own, where Triton interprets its kernels.

Triton reads TRITON_INTERPRET when a kernel is defined, so that one process holds either compiled or
interpreted kernels. The first such test of a file sends all of the file's to one child; each then
reports what became of it there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: runs Triton kernels on the CPU, in a child")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INTERPRETED or pyfuncitem.get_closest_marker("interpreted") is None:
        return None  # pytest calls the function
    verdicts, log = _child(pyfuncitem.path)
    verdict = verdicts.get(pyfuncitem.name, f"did not run in the child:\n{log}")
    if verdict is not None:
        pytest.fail(f"under the interpreter: {verdict}", pytrace=False)
    return True


@cache
def _child(path: Path) -> tuple[dict[str, str | None], str]:
    """Run a file's interpreted tests; return what failed of each by name (None: it passed)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable, "-m", "pytest", "-q", "-m", "interpreted", "-p", "no:cacheprovider",
            "-p", "no:randomly", f"--junitxml={report}", str(path),
        ]  # fmt: skip
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        verdicts: dict[str, str | None] = {}
        if report.exists():
            for case in ElementTree.parse(report).iter("testcase"):
                bad = [part for part in case if part.tag in ("failure", "error", "skipped")]
                verdicts[case.get("name", "")] = (
                    bad[0].text or bad[0].get("message") if bad else None
                )
    return verdicts, ran.stdout[-2000:] + ran.stderr[-2000:]
