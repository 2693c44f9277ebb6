from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.conftest import text, write_jsonl
from tests.helpers import assert_user_error, run_cli


def test_stats(corpus: Path, tokenizer_dir: Path) -> None:
    result = run_cli("data", "stats", f"{corpus}/*/train.jsonl", "-t", tokenizer_dir, "--json")
    assert result.exit_code == 0
    domains = result.json["domains"]
    assert {name: d["documents"] for name, d in domains.items()} == {
        "books": 20,
        "github": 30,
        "wiki": 40,
    }
    texts = [text(i, 1 + (i * i) % 60) for i in range(20)]
    assert domains["books"]["bytes"] == sum(len(t.encode()) for t in texts)
    assert 0 < domains["books"]["tokens"] < domains["books"]["bytes"]
    plain = run_cli("data", "stats", corpus)
    assert plain.exit_code == 0
    assert "github" in plain.stdout
    assert "35" in plain.stdout  # 30 + 5 documents


def test_inspect_shows_borders(corpus: Path, tokenizer_dir: Path) -> None:
    arguments = ("data", "inspect", corpus, "-t", tokenizer_dir, "--documents", 1, "--domain")
    shown = run_cli(*arguments, "books")
    assert shown.exit_code == 0
    assert "books, document 0" in shown.stdout
    assert "<s>|" in shown.stdout
    assert "github" not in shown.stdout
    document = run_cli(*arguments, "books", "--json").json["documents"][0]
    assert "".join(document["pieces"]) == f"<s>{text(0, 1)}<|endoftext|>"
    assert_user_error(run_cli(*arguments, "boks"), "unknown domain", "did you mean 'books'")


def test_tokenize_fills_the_cache(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    result = run_cli("data", "tokenize", corpus, "-t", tokenizer_dir, "-o", out)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == str(out)
    assert len(list(out.iterdir())) == 3


def test_tokenizer_is_trained(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokenizer"
    result = run_cli("data", "tokenizer", corpus, "-o", out, "--vocabulary", 300, "--json")
    assert result.exit_code == 0
    assert result.json == {"path": str(out), "vocabulary": 300}
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize("line", ["", "no json"])
def test_bad_lines_write_nothing(tmp_path: Path, tokenizer_dir: Path, line: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ["fine"])
    path.write_text(path.read_text() + line + "\n")
    out = tmp_path / "out"
    result = run_cli("data", "tokenizer", path, "-o", out)
    assert_user_error(result, "x.jsonl:2:")
    assert_user_error(run_cli("data", "tokenize", path, "-t", tokenizer_dir, "-o", out), ":2:")
    assert_user_error(run_cli("data", "tokenize", path, "-t", tokenizer_dir, "-o", path), "a file")
    assert not out.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]
