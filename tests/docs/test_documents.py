"""What the documents show is run, what they link to exists, what is generated is current."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.helpers import run_cli

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "moesaic" / "assets" / "demo-llama"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def _blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that has moesaic/assets as a checkout does, and nothing else."""
    (tmp_path / "moesaic").mkdir()
    (tmp_path / "moesaic" / "assets").symlink_to(ROOT / "moesaic" / "assets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_python(elsewhere: Path, capsys: pytest.CaptureFixture[str]):
    blocks = _blocks("README.md", "python")
    assert blocks
    for block in blocks:
        assert len(block.splitlines()) <= 10
        exec(compile(block, "README.md", "exec"), {})
    assert (elsewhere / "runs/moe/config.json").is_file()
    assert capsys.readouterr().out


def test_readme_shell(elsewhere: Path):
    lines = [line for block in _blocks("README.md", "bash") for line in block.splitlines()]
    assert len(lines) >= 3
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "moesaic"
        result = run_cli(*arguments)
        assert result.exit_code == 0, (line, result)
        assert result.stdout.strip(), line


def test_command_page_is_current():
    path = ROOT / "docs" / "make_commands.py"
    spec = importlib.util.spec_from_file_location("make_commands", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/commands.md").read_text(encoding="utf-8") == module.page(), (
        "the help texts changed: run `make docs` (python docs/make_commands.py)"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    code_free = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", code_free):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        if file:
            assert (page.parent / file).exists(), f"{page.name}: {target}"
        else:
            assert anchor in anchors, f"{page.name}: {target}"


def test_images_are_small():
    images = [p for p in (ROOT / "docs/images").rglob("*") if p.is_file()]
    assert images
    for image in images:
        assert image.stat().st_size < 300_000, image


def test_the_split_in_extending_is_one_file_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The page's example, saved under its name, is found, described, configured and exact."""
    import numpy as np

    from moesaic.construct.method import SplitInputs, resolve_method
    from moesaic.construct.splits import SPLITS

    (code,) = _blocks("docs/extending.md", "python")
    (tmp_path / "round_robin.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        importlib.import_module("round_robin")
        assert "round-robin" in SPLITS.names()
        assert SPLITS.describe()["round-robin"].startswith("Neuron j goes to expert")
        method = resolve_method({"method": "round-robin", "offset": 1})
        config = {"num_hidden_layers": 2, "intermediate_size": 12, "model_type": "llama"}
        layers = list(method.divide(SplitInputs(tmp_path, config, 3, 0, None, 0)))
    finally:
        SPLITS._entries.pop("round-robin", None)
        sys.modules.pop("round_robin", None)
    assert [ids.tolist() for ids in layers[0].experts] == [
        [2, 5, 8, 11],
        [0, 3, 6, 9],
        [1, 4, 7, 10],
    ]
    assert np.array_equal(np.sort(np.concatenate(layers[1].experts)), np.arange(12))


def test_documents_name_no_place_outside_the_repository():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for word in ("/work/", "../shared", os.sep + "root" + os.sep):
            assert word not in text, f"{page.name} mentions {word}"
