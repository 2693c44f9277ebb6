from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.core.errors import UserError
from moesaic.data import open_tokens
from moesaic.data import tokens as tokens_module
from moesaic.data.sources import Texts
from moesaic.data.tokens import tokenizer_fingerprint
from tests.data.conftest import write_jsonl


def test_ids_are_those_of_the_tokenizer(corpus: Path, tokenizer: Any, tmp_path: Path) -> None:
    domains = open_tokens(f"{corpus}/*/train.jsonl", tokenizer, cache=tmp_path)
    from moesaic.data import open_domains

    for name, source in open_domains(f"{corpus}/*/train.jsonl").items():
        texts = list(source.documents())
        expected = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        domain = domains[name]
        assert len(domain) == len(texts)
        assert [domain.document(i).tolist() for i in range(len(domain))] == expected
        assert [domain.length(i) for i in range(len(domain))] == [len(e) for e in expected]
        assert domain.tokens == sum(map(len, expected))
        assert domain.document(0).dtype == np.int64
        assert isinstance(domain.ids.base, np.memmap)
        assert domain.ids.dtype == np.uint16
        assert (domain.bos, domain.eos) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_the_cache_is_used_and_follows_content_and_tokenizer(
    corpus: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesaic.data.tokenizer import train_tokenizer
    from moesaic.models.tokenizer import load_tokenizer

    path = write_jsonl(tmp_path / "x.jsonl", ["hello fox", "dog"])
    first = open_tokens(path, tokenizer, cache=tmp_path / "cache")["x"]
    calls: list[int] = []
    real = tokens_module.encode_batches
    monkeypatch.setattr(tokens_module, "encode_batches", lambda *a: calls.append(1) or real(*a))
    tokenizer.padding_side = "left"  # does not change ids
    again = open_tokens(path, tokenizer, cache=tmp_path / "cache")["x"]
    assert not calls
    assert np.array_equal(again.ids, first.ids)
    write_jsonl(path, ["hello fox", "cat"])
    changed = open_tokens(path, tokenizer, cache=tmp_path / "cache")["x"]
    assert calls == [1]
    assert tokenizer.decode(changed.document(1)) == "cat"
    other = load_tokenizer(train_tokenizer(corpus, out=tmp_path / "t", vocabulary=280))
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    open_tokens(path, other, cache=tmp_path / "cache")
    assert calls == [1, 1]
    assert not list((tmp_path / "cache").glob(".*"))


def test_default_cache_follows_the_environment(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "here"))
    open_tokens({"x": Texts(("hello",))}, tokenizer)
    assert len(list((tmp_path / "here" / "tokens").iterdir())) == 1


def test_special_tokens_in_a_text_are_text(tokenizer: Any, tmp_path: Path) -> None:
    text = "a <s>struck</s> word<|endoftext|>"
    domain = open_tokens({"x": Texts((text,))}, tokenizer, cache=tmp_path)["x"]
    ids = domain.document(0).tolist()
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]  # what it would have been


def test_truncation_and_padding_of_the_tokenizer_are_not_applied_nor_lost(
    tokenizer: Any, tmp_path: Path
) -> None:
    texts = ("one two three four five six seven", "x")
    tokenizer(list(texts), padding=True, truncation=True, max_length=4)
    assert tokenizer.backend_tokenizer.truncation is not None
    domain = open_tokens({"x": Texts(texts)}, tokenizer, cache=tmp_path)["x"]
    assert [tokenizer.decode(domain.document(i)) for i in range(2)] == list(texts)
    assert tokenizer.backend_tokenizer.truncation is not None


def test_a_domain_without_a_token_is_refused_and_leaves_nothing(
    tokenizer: Any, tmp_path: Path
) -> None:
    for texts in ((), ("", "")):
        with pytest.raises(UserError, match="the domain 'x' holds no token"):
            open_tokens({"x": Texts(texts)}, tokenizer, cache=tmp_path / "cache")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nbroken\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2"):
        open_tokens(tmp_path / "bad.jsonl", tokenizer, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_damaged_cache_is_noticed(tokenizer: Any, tmp_path: Path) -> None:
    open_tokens({"x": Texts(("hello fox",))}, tokenizer, cache=tmp_path)
    entry = next(tmp_path.iterdir())
    (entry / "ids.bin").write_bytes((entry / "ids.bin").read_bytes()[:2])
    with pytest.raises(UserError, match="damaged"):
        open_tokens({"x": Texts(("hello fox",))}, tokenizer, cache=tmp_path)


def _open(arguments: tuple[str, str, str]) -> int:
    from moesaic.models.tokenizer import load_tokenizer

    data, folder, cache = arguments
    return sum(d.tokens for d in open_tokens(data, load_tokenizer(folder), cache=cache).values())


def test_writers_may_race(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    job = (str(corpus), str(tokenizer_dir), str(tmp_path / "cache"))
    with ThreadPoolExecutor(4) as pool:
        counts = set(pool.map(_open, [job] * 8))
    assert len(counts) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_leftovers_of_killed_writers_are_removed_when_old(tokenizer: Any, tmp_path: Path) -> None:
    open_tokens({"x": Texts(("hello fox",))}, tokenizer, cache=tmp_path)
    entry = next(tmp_path.iterdir())
    old, young = (tmp_path / f".{entry.name}.partial-{n}" for n in ("old", "young"))
    old.mkdir()
    young.mkdir()
    os.utime(old, (1, 1))
    entry.rename(tmp_path / "aside")
    open_tokens({"x": Texts(("hello fox",))}, tokenizer, cache=tmp_path)
    assert not old.exists()
    assert young.exists()
