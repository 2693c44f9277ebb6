"""Run tests marked `interpreted` in a process of their own, where Triton interprets its kernels.

Triton reads TRITON_INTERPRET when a kernel is defined, so that one process holds either compiled or
interpreted kernels. The first such test sends all those of the session to one child; each then
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
    if INTERPRETED or not _interpreted(pyfuncitem):
        return None  # pytest calls the function
    session = pyfuncitem.session
    names = tuple(item.nodeid for item in session.items if _interpreted(item))
    verdicts, log = _child(names, session.config.rootpath)
    verdict = verdicts.get(pyfuncitem.nodeid, f"did not run in the child:\n{log}")
    if verdict is not None:
        pytest.fail(f"under the interpreter: {verdict}", pytrace=False)
    return True


def _interpreted(item: pytest.Item) -> bool:
    return item.get_closest_marker("interpreted") is not None


@cache
def _child(names: tuple[str, ...], root: Path) -> tuple[dict[str, str | None], str]:
    """Run tests under the interpreter; return what failed of each by name (None: it passed)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(
            [*command, f"--junitxml={report}", *names],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        verdicts: dict[str, str | None] = {}
        if report.exists():
            for case in ElementTree.parse(report).iter("testcase"):
                file = case.get("classname", "").replace(".", "/") + ".py"
                bad = [part for part in case if part.tag in ("failure", "error", "skipped")]
                verdict = (bad[0].text or bad[0].get("message")) if bad else None
                verdicts[f"{file}::{case.get('name')}"] = verdict
    return verdicts, ran.stdout[-2000:] + ran.stderr[-2000:]
