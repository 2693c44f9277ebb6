from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from moesaic.core.errors import UserError
from moesaic.data.sources import Source, Texts, open_domains, open_source
from tests.data.conftest import write_jsonl


def texts(data: object) -> dict[str, list[str]]:
    return {name: list(source.documents()) for name, source in open_domains(data).items()}


def test_every_form_of_data(tmp_path: Path) -> None:
    root = tmp_path / "c"
    write_jsonl(root / "books.jsonl", ["b0", "b1\nsecond line"])
    (root / "story.txt").write_text("one\n\ndocument\n", encoding="utf-8")
    write_jsonl(root / "code" / "deep" / "y.jsonl", ["y"])
    write_jsonl(root / "code" / "a.jsonl", ["a"])
    (root / "LICENSES.md").write_text("not text to train on")
    (root / ".hidden.jsonl").write_text("broken")
    (root / "empty").mkdir()
    with gzip.open(root / "zipped.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"text": "z", "other": 1}) + "\n")

    assert texts(root / "books.jsonl") == {"books": ["b0", "b1\nsecond line"]}
    assert texts(str(root)) == {
        "books": ["b0", "b1\nsecond line"],
        "code": ["a", "y"],
        "story": ["one\n\ndocument\n"],
        "zipped": ["z"],
    }
    assert texts({"x": root / "code", "y": [str(root / "books.jsonl"), root / "story.txt"]}) == {
        "x": ["a", "y"],
        "y": ["b0", "b1\nsecond line", "one\n\ndocument\n"],
    }
    assert texts({"t": Texts(("in", "memory"))}) == {"t": ["in", "memory"]}


def test_a_pattern_names_domains_by_what_it_leaves_open(corpus: Path) -> None:
    found = open_domains(f"{corpus}/*/train.jsonl")
    assert list(found) == ["books", "github", "wiki"]
    assert len(list(found["books"].documents())) == 20
    assert list(open_domains(f"{corpus}/books/*.jsonl")) == ["train", "valid"]
    assert list(open_domains(f"{corpus}/[bg]*/v*.jsonl")) == ["books/valid", "github/valid"]
    assert len(list(open_source(f"{corpus}/*/valid.jsonl").documents())) == 15


def test_sources_are_read_lazily_and_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ["first", "second"])
    with path.open("a") as file:
        file.write("broken\n")
    source = open_source(path)
    assert isinstance(source, Source)
    assert next(source.documents()) == "first"
    assert next(source.documents()) == "first"
    with pytest.raises(UserError, match=r"x\.jsonl:3: not JSON"):
        list(source.documents())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"\n", "an empty line"),
        (b"   \n", "an empty line"),
        (b"hello\n", "not JSON"),
        (b'{"text": "cut off\n', "not JSON"),
        (b'["text"]\n', "a JSON list, not an object"),
        (b'"text"\n', "a JSON str, not an object"),
        (b'{"content": "x"}\n', "has no 'text' (it holds: content)"),
        (b'{"text": 3}\n', "'text' is not a string"),
        (b'{"text": "\xff"}\n', "is not UTF-8"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b'{"text": "fine"}\n')
    with pytest.raises(UserError) as caught:
        texts(path)
    assert f"{path}:2: " in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a\\ud83d b \\ud83d\\ude00"}\n')
    assert texts(path) == {"x": ["a\ufffd b \U0001f600"]}


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "y.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    assert texts(tmp_path) == {"x": ["hello"], "y": ["hello"]}


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "hello"}\n' * 100)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "not.jsonl.gz").write_bytes(b'{"text": "hello"}\n')
    for name in ("cut", "not"):
        with pytest.raises(UserError, match="damaged or cut off"):
            texts(tmp_path / f"{name}.jsonl.gz")


def test_wrong_data_says_what_is_wrong(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "x.parquet").write_text("")
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "two" / "a.jsonl", ["1"])
    write_jsonl(tmp_path / "two" / "a" / "b.jsonl", ["2"])
    cases: list[tuple[object, str]] = [
        (str(corpus / "books" / "trian.jsonl"), "no such file or folder. Did you mean 'train."),
        ("corpus/a/b/c.jsonl", "no such file or folder"),
        ("./missing", "no such file or folder"),
        ("", "empty name"),
        (tmp_path / "folder", "holds no .jsonl or .txt file"),
        (tmp_path / "x.parquet", "not a kind of text"),
        (tmp_path / "two", "two sources are called 'a'"),
        (f"{corpus}/*/test.jsonl", "file matches"),
        (f"{corpus}/**/train.jsonl", "names no domain"),
        ({}, "empty mapping"),
        ({"a": {"b": "c"}}, "a: a mapping inside a mapping"),
        ({"a": 3}, "a is 3"),
        ({"a": []}, "a is []"),
        ("stdlib@test", "no such split"),
    ]
    for data, words in cases:
        with pytest.raises(UserError) as caught:
            open_domains(data)
        assert words in str(caught.value), (data, str(caught.value))
        assert "\n" not in str(caught.value)


def test_fingerprint_follows_content_not_name(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", ["x", "y"])
    b = write_jsonl(tmp_path / "b.jsonl", ["x", "y"])
    assert open_source(a).fingerprint() == open_source(b).fingerprint()
    before = open_source(a).fingerprint()
    write_jsonl(a, ["x", "z"])
    assert open_source(a).fingerprint() != before
    (tmp_path / "c.txt").write_bytes(b.read_bytes())  # the same bytes, another meaning
    assert open_source(tmp_path / "c.txt").fingerprint() != open_source(b).fingerprint()
    assert open_source([a, b]).fingerprint() != open_source([b, a]).fingerprint()


def test_hugging_face_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "org" / "set" / "train.jsonl", ["d0", "d1"])
    write_jsonl(tmp_path / "org" / "set" / "validation.jsonl", ["v0"])
    from moesaic.data.hub import HubDataset

    assert list(HubDataset.parse("org/set").documents()) == ["d0", "d1"]
    assert list(HubDataset.parse("org/set@validation").documents()) == ["v0"]
    train, valid = (HubDataset.parse(f"org/set@{s}").fingerprint() for s in ("train", "validation"))
    assert train != valid
    with pytest.raises(UserError, match="org/set@tset: neither a file here nor a dataset"):
        list(HubDataset.parse("org/set@tset").documents())
    (tmp_path / "org" / "set" / "train.jsonl").write_text('{"content": "x"}\n')
    with pytest.raises(UserError, match=r"no string 'text' \(columns: content\)"):
        list(HubDataset.parse("org/set").documents())


def test_a_dataset_name_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    source = open_domains("someone/some-data:config@validation")
    assert list(source) == ["some-data"]
    with pytest.raises(UserError, match=r"pip install 'moesaic\[data\]'"):
        next(source["some-data"].documents())
