"""Imports go down only, and the light rooms stay light (design: Rooms)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "moesaic"
LEVELS = [
    {"core"},
    {"recipes"},  # YAML files and how to find them
    {"models", "kernels"},
    {"data"},
    {"measure"},
    {"construct", "training", "routing", "evaluate", "generation", "report", "hub", "plan"},
    {"integrations"},
    {"cli", "demo", "__init__", "__main__"},
]
LEVEL = {room: index for index, rooms in enumerate(LEVELS) for room in rooms}
LIGHT = {"core", "cli", "__init__", "__main__"}
HEAVY = {"torch", "transformers", "numpy", "datasets", "matplotlib"}
# Rooms that share a level and may know each other, with the reason.
NEIGHBOURS = {
    ("models", "kernels"),  # models register the experts kernels
    ("training", "routing"),  # a run listens to its own routers, before there is a directory
    ("plan", "construct"),  # a plan reads the files of what it foretells
    ("plan", "training"),
    ("routing", "report"),  # an analysis ends with its page, which reads its directory only
}


def _room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(tree: ast.AST) -> list[str]:
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "moesaic":
                found += [f"moesaic.{alias.name}" for alias in node.names]
            else:
                found.append(node.module)
    return found


def _at_module_level(tree: ast.Module) -> list[str]:
    body = [
        n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))
    ]
    statements = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
    return _imports(ast.Module(body=statements, type_ignores=[]))


def test_every_room_has_a_level():
    rooms = {_room(file) for file in PACKAGE.rglob("*.py")}
    assert rooms <= LEVEL.keys(), f"give these rooms a level: {rooms - LEVEL.keys()}"


def test_imports_go_down_only():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        here = _room(file)
        if here == "__init__":  # the public names, resolved on first use
            continue
        for name in _imports(ast.parse(file.read_text(encoding="utf-8"))):
            parts = name.split(".")
            if parts[0] != "moesaic" or len(parts) < 2 or parts[1] not in LEVEL:
                continue
            there = parts[1]
            sideways = LEVEL[there] == LEVEL[here] and there != here
            if LEVEL[there] > LEVEL[here] or (sideways and (here, there) not in NEIGHBOURS):
                if here in {"cli", "__main__"}:
                    continue
                wrong.append(f"{file.relative_to(PACKAGE)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_kernels_know_no_model_classes():
    wrong = [
        f"{file.name}: {name}"
        for file in (PACKAGE / "kernels").rglob("*.py")
        for name in _imports(ast.parse(file.read_text(encoding="utf-8")))
        if name.startswith(("moesaic.models", "transformers.models"))
    ]
    assert not wrong, wrong


def test_light_rooms_import_nothing_heavy():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        if _room(file) in LIGHT:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            wrong += [
                f"{file.relative_to(PACKAGE)} imports {name} at module level"
                for name in _at_module_level(tree)
                if name.split(".")[0] in HEAVY
            ]
    assert not wrong, "\n".join(wrong)


def test_help_and_import_load_no_torch():
    code = (
        "import sys, moesaic; from moesaic.cli.main import build; build(); "
        f"bad = {HEAVY!r} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
