from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesaic.core.errors import UserError
from moesaic.data.sources import Texts
from moesaic.data.tokenizer import train_tokenizer
from moesaic.models.tokenizer import load_tokenizer


def test_loads_with_auto_tokenizer_and_has_its_special_tokens(tokenizer: Any) -> None:
    assert len(tokenizer) == 320
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer("fox")["input_ids"][0] == 1
    assert len(tokenizer.encode("fox", add_special_tokens=False)) < 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        " two  spaces ",
        "tab\tand\r\n\n  lines",
        "naïve 東京 😀\u200d",
        "x" * 999,
        "1234567.89",
        "\0",
    ],
)
def test_every_text_decodes_to_itself(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_training_is_deterministic(corpus: Path, tmp_path: Path) -> None:
    files = [
        (train_tokenizer(corpus, out=tmp_path / str(i), vocabulary=300) / "tokenizer.json")
        for i in range(2)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_lineage_and_refusals(corpus: Path, tmp_path: Path) -> None:
    path = train_tokenizer(corpus, out=tmp_path / "t", vocabulary=260)
    assert json.loads((path / "moesaic.json").read_text())["config"]["vocabulary"] == 260
    with pytest.raises(UserError, match="not empty"):
        train_tokenizer(corpus, out=path)
    with pytest.raises(UserError, match="vocabulary=100 but the 256 bytes"):
        train_tokenizer(corpus, out=tmp_path / "u", vocabulary=100)
    with pytest.raises(UserError, match="max_bytes=0"):
        train_tokenizer(corpus, out=tmp_path / "u", max_bytes=0)
    assert not (tmp_path / "u").exists()


def test_max_bytes_limits_each_domain(tmp_path: Path) -> None:
    data = {"a": Texts(("zzzz " * 500, "unread " * 500)), "b": Texts(("qqqq " * 500,))}
    path = train_tokenizer(data, out=tmp_path / "t", vocabulary=290, max_bytes=1000)
    tokens = load_tokenizer(path).get_vocab()
    assert {"Ġzzzz", "Ġqqqq"} <= set(tokens)
    assert not any("unr" in token for token in tokens)


def test_loading_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)
