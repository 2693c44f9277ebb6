"""A small tokenizer and a small corpus, both made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

WORDS = """
    the quick brown fox jumps over a lazy dog while experts route tokens and return
    x = 1 ; def f ( y ) : naïve Zürich 東京 42 1234567
""".split()  # noqa: SIM905 - easier to read than a list


def text(seed: int, words: int) -> str:
    """Return a reproducible text without the random module."""
    state, chosen = seed * 7919 + 1, []
    for _ in range(words):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        chosen.append(WORDS[(state >> 33) % len(WORDS)])
    return " ".join(chosen)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus/{books,github,wiki}/{train,valid}.jsonl, documents of 1 to 60 words."""
    root = tmp_path_factory.mktemp("corpus")
    for d, name in enumerate(("books", "github", "wiki")):
        texts = [text(100 * d + i, 1 + (i * i) % 60) for i in range(20 + 10 * d)]
        write_jsonl(root / name / "train.jsonl", texts)
        write_jsonl(root / name / "valid.jsonl", texts[:5])
    return root


@pytest.fixture(scope="session")
def tokenizer_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moesaic.data.tokenizer import train_tokenizer

    return train_tokenizer(corpus, out=tmp_path_factory.mktemp("tok") / "t", vocabulary=320)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)
