"""Rows of whole conversations: nothing lost, nothing shared, resumable."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.core.errors import UserError
from moesaic.data import EndOfData, MixtureStream, open_mixture
from moesaic.data.chat import IGNORED
from moesaic.data.conversations import ConversationDomain, conversation_rows, open_conversations
from moesaic.data.packing import Block
from moesaic.data.sources import Texts, open_source
from moesaic.data.tokens import TokenDomain

LENGTHS = [5, 2, 14, 3, 16, 7, 6, 2, 9, 11, 40, 4, 4, 12]
BLOCK = 16


def make_domain(name: str = "d") -> TokenDomain:
    """Every token is another number; the first half of a conversation is context."""
    starts = np.cumsum([10, *LENGTHS])
    return TokenDomain.from_documents(
        name,
        [
            [~t if t < first + (n + 1) // 2 else t for t in range(first, first + n)]
            for first, n in zip(starts.tolist(), LENGTHS, strict=False)
        ],
    )


def parts(block: Block) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each conversation of a row."""
    assert block.labels is not None
    cuts = [*np.flatnonzero(block.position == 0).tolist(), len(block.ids)]
    assert np.array_equal(np.diff(block.document), (block.position[1:] == 0).astype(int))
    return [
        (block.ids[a:b].tolist(), block.labels[a:b].tolist()) for a, b in itertools.pairwise(cuts)
    ]


def whole(domain: TokenDomain) -> list[tuple[list[int], list[int]]]:
    found = []
    for index in range(len(domain)):
        kept = domain.document(index).tolist()
        ids = [~t if t < 0 else t for t in kept]
        found.append((ids, [IGNORED if t < 0 else t for t in kept]))
    return found


@pytest.mark.parametrize("epochs", [1, 3])
def test_every_conversation_that_fits_is_learned_once_an_epoch(epochs: int) -> None:
    domain = make_domain()
    packed = ConversationDomain(domain, block=BLOCK, seed=0, max_epochs=epochs)
    learned: Counter[tuple[int, ...]] = Counter()
    expected = {tuple(ids): labels for ids, labels in whole(domain) if len(ids) <= BLOCK}
    while True:
        try:
            block = packed.take()
        except EndOfData:
            break
        assert block.ids.shape == (BLOCK,)
        for ids, labels in parts(block):
            if any(label != IGNORED for label in labels):
                assert labels == expected[tuple(ids)]
                learned[tuple(ids)] += 1
            else:  # what fills the row is the beginning of another conversation
                assert any(list(other[: len(ids)]) == ids for other in expected)
    assert learned == dict.fromkeys(expected, epochs)
    assert packed.epochs == epochs
    with pytest.raises(EndOfData, match=f"'d' has been read {epochs} times.*raise max_epochs"):
        packed.take()


def test_rows_are_as_full_as_their_order_allows() -> None:
    packed = ConversationDomain(make_domain(), block=BLOCK, seed=1)
    fillers, before = 0, list[int]()
    for _ in range(40):
        items = parts(packed.take())
        first = items[0][0]
        if before:  # the row before was closed by what this one begins with
            assert len(first) > len(before)
            assert first[: len(before)] == before
        before = items[-1][0] if set(items[-1][1]) == {IGNORED} else []
        fillers += bool(before)
    assert fillers > 10


def test_long_conversations_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    domain = make_domain()
    caplog.set_level("INFO", "moesaic")
    ConversationDomain(domain, block=BLOCK, seed=0)
    assert "d: 1 of 14 conversations are longer than a row of 16 tokens" in caplog.text
    with pytest.raises(UserError, match=r"'d' has no conversation of at most 1 tokens.*has 2"):
        ConversationDomain(domain, block=1, seed=0)


def test_streams_resume_and_are_shared_by_processes() -> None:
    def stream(**options: int) -> MixtureStream:
        domains = {"a": make_domain("a"), "b": make_domain("b")}
        return MixtureStream(domains, block=BLOCK, seed=5, conversations=True, **options)

    def same(one: Block, two: Block) -> bool:
        return all(
            np.array_equal(getattr(one, field), getattr(two, field))
            for field in ("domain", "ids", "document", "position", "labels")
        )

    one = stream()
    rows = [one.next() for _ in range(30)]
    ranks = [stream(rank=rank, world=3) for rank in range(3)]
    for index, row in enumerate(rows):
        assert same(ranks[index % 3].next(), row)
    state = json.loads(json.dumps(one.state_dict()))
    resumed = stream()
    resumed.load_state_dict(state)
    assert all(same(resumed.next(), one.next()) for _ in range(30))
    state["domains"]["a"]["tokens"] += 1
    with pytest.raises(UserError, match="'a' is one among 14 conversations"):
        stream().load_state_dict(state)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer_dir: Path) -> Any:
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tokenizer_dir)
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    own.chat_template = CHATML
    return own


def write(path: Path, *conversations: list[str]) -> Path:
    lines = [
        json.dumps({"conversations": [
            {"from": name, "value": said}
            for name, said in zip(["human", "gpt"] * len(talk), talk, strict=False)
        ]})
        for talk in conversations
    ]  # fmt: skip
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_files_are_tokenised_once_and_anew_for_another_template(
    tmp_path: Path, chat_tokenizer: Any
) -> None:
    data = write(tmp_path / "x.jsonl", ["hi", "the fox"], ["no answer"], ["é\ud800", "dog"])
    cache = tmp_path / "cache"
    first = open_conversations(data, chat_tokenizer, cache=cache)["x"]
    assert len(first) == 2
    kept = first.document(0)
    assert chat_tokenizer.decode(kept[kept >= 0]) == "the fox<|im_end|>"
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nthe fox<|im_end|>\n"
    assert chat_tokenizer.decode(np.where(kept < 0, ~kept, kept)) == text
    held_out = conversation_rows(open_source(data), chat_tokenizer, context=9)
    assert list(held_out) == [first.document(i)[:9].tolist() for i in range(2)]
    open_conversations(data, chat_tokenizer, cache=cache)
    assert len(list(cache.iterdir())) == 1
    chat_tokenizer.chat_template = CHATML.replace("\n", " ")
    again = open_conversations(data, chat_tokenizer, cache=cache)["x"]
    assert len(list(cache.iterdir())) == 2
    assert not np.array_equal(again.ids, first.ids)


def test_faults_name_their_place(tmp_path: Path, chat_tokenizer: Any) -> None:
    def refused(data: Any, words: str) -> None:
        with pytest.raises(UserError, match=words):
            open_mixture(
                data, chat_tokenizer, block=64, conversations=True, cache=tmp_path / "cache"
            )

    good = write(tmp_path / "good.jsonl", ["hi", "the fox"])
    bad = tmp_path / "bad.jsonl"
    bad.write_text(good.read_text() + '{"text": "x"}\n')
    refused(bad, r"bad.jsonl:2: no conversation \(it holds: text\)")
    bad.write_text("nonsense\n")
    refused(bad, "bad.jsonl:1: not JSON")
    text = tmp_path / "tale.txt"
    text.write_text("hi")
    refused({"x": [good, text]}, "tale.txt: text, but conversations are asked for")
    refused({"x": Texts(("hi",))}, "this is text")
    refused(write(tmp_path / "q.jsonl", ["only a question"]), "'q' holds no")
    chat_tokenizer.chat_template = "{{ raise_exception('no!') }}"
    refused(good, "good, conversation 1: the tokenizer's chat template refuses: no!")
