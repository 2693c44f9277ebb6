"""`moesaic doctor`: is this installation fit, and does it compute what it should?"""

from __future__ import annotations

from typing import Any

from moesaic.cli.output import JsonOption, emit

PANEL = "Help"

# Versions that the suite has run on; others within the package's bounds are allowed and said.
TESTED = {"torch": ("2.11", "2.13"), "transformers": ("5.17", "5.23")}


def command(json: JsonOption = False) -> None:
    """Check Python, packages, GPU and kernels; exit code 1 when something needed is wrong.

    The kernels are run against their plain reference, forward and backward, on the CPU and on the
    GPU where there is one.

    Example: `moesaic doctor`
    """
    from moesaic.core.errors import MoesaicError

    if _installed("moesaic") is None:
        raise MoesaicError("moesaic runs from its source folder, not installed: pip install -e .")
    checks = [_python(), *_packages(), *_extras(), *_devices(), *_kernels()]

    def render() -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table("", "what", "found", "remark")
        marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "wrong": "[red]wrong[/]"}
        for check in checks:
            table.add_row(
                marks[check["state"]], check["what"], check["found"], check.get("remark", "")
            )
        Console().print(table)

    wrong = [check["what"] for check in checks if check["state"] == "wrong"]
    emit({"ok": not wrong, "checks": checks}, json=json, render=render)
    if wrong:
        raise MoesaicError(f"wrong: {', '.join(wrong)}. See the remarks above.")


def _row(what: str, found: str, state: str = "ok", remark: str = "") -> dict[str, str]:
    return {"what": what, "found": found, "state": state, "remark": remark}


def _python() -> dict[str, str]:
    import sys
    from importlib.metadata import metadata

    from packaging.specifiers import SpecifierSet

    version = sys.version.split()[0]
    wanted = metadata("moesaic")["Requires-Python"] or ""
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return _row("python", version)
    return _row("python", version, "wrong", f"needs {wanted}")


def _requirements() -> list[Any]:
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    return [Requirement(line) for line in requires("moesaic") or ()]


def _installed(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _packages() -> list[dict[str, str]]:
    from packaging.version import Version

    rows = []
    for need in _requirements():
        if need.marker is not None and "extra" in str(need.marker):
            continue
        version = _installed(need.name)
        if version is None or not need.specifier.contains(version, prereleases=True):
            cure = f"needs {need.specifier}: pip install '{need.name}{need.specifier}'"
            rows.append(_row(need.name, version or "missing", "wrong", cure))
            continue
        low, high = TESTED.get(need.name, ("0", "999999"))
        minor = Version(".".join(version.split(".")[:2]))
        if Version(low) <= minor <= Version(high):
            rows.append(_row(need.name, version))
        else:
            rows.append(_row(need.name, version, "note", f"tested on {low} to {high}"))
    return rows


def _extras() -> list[dict[str, str]]:
    import re

    rows: dict[str, dict[str, str]] = {}
    for need in _requirements():
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", str(need.marker))
        if extra is None or need.name == "moesaic" or extra[1] == "test":
            continue
        version = _installed(need.name)
        fits = version is not None and need.specifier.contains(version, prereleases=True)
        cure = "" if fits else f"optional: pip install 'moesaic[{extra[1]}]'"
        what = f"{need.name} ({extra[1]})"
        rows[need.name] = _row(what, version or "missing", "ok" if fits else "note", cure)
    return list(rows.values())


def _devices() -> list[dict[str, str]]:
    try:
        import torch
    except ImportError:
        return []
    cpu = _row("cpu", f"{torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        return [cpu, _row("gpu", "none", remark="everything runs on the CPU")]
    rows = [cpu]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}"
        old = facts.major < 8
        remark = "experts run as a loop: grouped matmul needs sm_80" if old else ""
        rows.append(_row(f"gpu {index}", found, "note" if old else "ok", remark))
    return rows


def _kernels() -> list[dict[str, str]]:
    try:
        import torch
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        import moesaic.models  # noqa: F401 - registers what is checked here
        from moesaic.kernels import NAME
        from moesaic.kernels.check import check
    except ImportError as error:
        return [_row("kernels", "not importable", "wrong", str(error))]
    known = ", ".join(sorted(ALL_EXPERTS_FUNCTIONS.keys()))
    missing = NAME not in ALL_EXPERTS_FUNCTIONS.keys()  # noqa: SIM118 - no plain dict
    rows = [_row("experts implementations", known, "wrong" if missing else "ok")]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.float32, torch.bfloat16):
            for hidden, width in ((64, 48), (60, 43)):  # one that grouped matmul takes, one not
                result = check(hidden=hidden, width=width, dtype=dtype, device=device)
                rows.append(
                    _row(
                        f"experts, {result.dtype} on {device}",
                        f"{result.backend}: error {max(result.errors.values()):.0e}",
                        "ok" if result.passed else "wrong",
                        "" if result.passed else f"allowed is {result.tolerance:.0e}",
                    )
                )
    return rows
