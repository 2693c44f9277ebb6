from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.core.errors import UserError
from moesaic.data import MixtureStream, open_mixture
from moesaic.data.packing import EndOfData
from moesaic.data.tokens import TokenDomain
from tests.data.test_packing import make_domain


def domains() -> dict[str, TokenDomain]:
    return {
        name: make_domain([(7 * i * i) % 50 for i in range(n)], name=name)
        for name, n in (("books", 12), ("github", 40), ("wiki", 25))
    }


def draw(stream: MixtureStream, n: int) -> list[tuple[str, list[int]]]:
    return [(name, ids.tolist()) for name, ids in (stream.next_block() for _ in range(n))]


def test_domains_are_drawn_in_proportion() -> None:
    stream = MixtureStream(
        domains(), block=8, weights={"wiki": 6, "books": 3, "github": 1}, seed=11
    )
    counts = Counter(name for name, _ in draw(stream, 4000))
    for name, share in {"wiki": 0.6, "books": 0.3, "github": 0.1}.items():
        deviation = (share * (1 - share) / 4000) ** 0.5
        assert abs(counts[name] / 4000 - share) < 4 * deviation


def test_size_weights_read_every_domain_equally_often() -> None:
    stream = MixtureStream(domains(), block=8, weights="size")
    total = sum(packed.epoch_tokens for packed in stream.domains.values())
    for name, packed in stream.domains.items():
        assert stream.weights[name] == pytest.approx(packed.epoch_tokens / total)


def test_the_stream_does_not_end_when_a_domain_does() -> None:
    stream = MixtureStream(domains(), block=32, seed=1)
    draw(stream, 2000)
    epochs = stream.epochs
    assert min(epochs.values()) > 5
    assert sum(e * stream.domains[n].epoch_tokens for n, e in epochs.items()) == 2000 * 32


@pytest.mark.parametrize("at", [0, 1, 17, 500])
def test_resuming_is_bit_equal_and_reads_nothing(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = MixtureStream(domains(), block=16, seed=4)
    draw(stream, at)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = draw(stream, 300)
    resumed = MixtureStream(domains(), block=16, seed=4)
    with monkeypatch.context() as patch:
        patch.setattr(TokenDomain, "read", lambda *a: pytest.fail("replayed"))
        resumed.load_state_dict(state)
    assert draw(resumed, 300) == expected
    assert resumed.state_dict() == stream.state_dict()


def test_state_is_a_copy() -> None:
    stream = MixtureStream(domains(), block=16)
    draw(stream, 5)
    state = stream.state_dict()
    before = json.dumps(state)
    draw(stream, 50)
    assert json.dumps(state) == before


@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_share_one_sequence(world: int) -> None:
    whole = draw(MixtureStream(domains(), block=16, seed=9), 24 * world)
    ranks = [MixtureStream(domains(), block=16, seed=9, rank=r, world=world) for r in range(world)]
    parts = [draw(stream, 24) for stream in ranks]
    assert [block for step in zip(*parts, strict=True) for block in step] == whole
    states = [stream.state_dict() for stream in ranks]
    assert all(state == states[0] for state in states)
    alone = MixtureStream(domains(), block=16, seed=9)
    alone.load_state_dict(states[0])  # another number of processes goes on where these stopped
    for stream in ranks:
        stream.load_state_dict(states[0])
    parts = [draw(stream, 4) for stream in ranks]
    assert [block for step in zip(*parts, strict=True) for block in step] == draw(alone, 4 * world)


def test_weights_can_change_between_draws_and_travel_with_the_state() -> None:
    stream = MixtureStream(domains(), block=8, seed=2)
    draw(stream, 10)
    stream.set_weights({"books": 1e-9, "github": 1.0, "wiki": 1e-9})
    assert {name for name, _ in draw(stream, 200)} == {"github"}
    resumed = MixtureStream(domains(), block=8, seed=2)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.weights == stream.weights
    assert draw(resumed, 50) == draw(stream, 50)


def test_a_change_of_weights_does_not_change_the_order_inside_a_domain() -> None:
    def books(weights: dict[str, float]) -> list[list[int]]:
        stream = MixtureStream(domains(), block=8, weights=weights, seed=2)
        return [ids for name, ids in draw(stream, 400) if name == "books"][:40]

    assert books({"books": 1, "github": 1, "wiki": 1}) == books(
        {"books": 8, "github": 1, "wiki": 3}
    )


def test_max_epochs_ends_iteration_and_explains_itself() -> None:
    stream = MixtureStream(domains(), block=16, max_epochs=2)
    blocks = list(stream)
    assert max(stream.epochs.values()) <= 2
    assert len(blocks) == stream.draws
    with pytest.raises(EndOfData, match="max_epochs"):
        draw(stream, 10_000)


def test_block_with_boundaries_is_the_same_block() -> None:
    one, two = (MixtureStream(domains(), block=16, seed=3) for _ in range(2))
    for _ in range(50):
        name, ids = one.next_block()
        block = two.next()
        assert block.domain == name
        assert np.array_equal(block.ids, ids)


def test_a_state_that_does_not_fit_is_refused() -> None:
    state = MixtureStream(domains(), block=16, seed=3).state_dict()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"block": 16, "seed": 4}, "seed=3"),
        ({"block": 8, "seed": 3}, "block=16"),
    ]
    for arguments, words in wrong:
        with pytest.raises(UserError, match=words):
            MixtureStream(domains(), **arguments).load_state_dict(state)
    fewer = {name: domain for name, domain in domains().items() if name != "wiki"}
    with pytest.raises(UserError, match="domains books, github, wiki"):
        MixtureStream(fewer, block=16, seed=3).load_state_dict(state)
    grown = MixtureStream(domains(), block=16, seed=3)
    draw(grown, 20)
    other = domains() | {"books": make_domain([3] * 12, name="books")}
    with pytest.raises(UserError, match="Resume with the data"):
        MixtureStream(other, block=16, seed=3).load_state_dict(grown.state_dict())


def test_wrong_arguments() -> None:
    with pytest.raises(UserError, match="rank=2 of world=2"):
        MixtureStream(domains(), block=8, rank=2, world=2)
    with pytest.raises(UserError, match="block=0"):
        MixtureStream(domains(), block=0)
    with pytest.raises(UserError, match="holds no token"):
        MixtureStream({"x": make_domain([])}, block=8)


def test_from_text_to_blocks(corpus: Path, tokenizer: Any, tmp_path: Path) -> None:
    stream = open_mixture(
        f"{corpus}/*/train.jsonl",
        tokenizer,
        block=24,
        weights={"books": 1, "github": 2, "wiki": 1},
        seed=5,
        cache=tmp_path,
    )
    name, ids = stream.next_block()
    assert ids.shape == (24,)
    assert ids[0] == tokenizer.bos_token_id
    texts = (corpus / name / "train.jsonl").read_text(encoding="utf-8")
    first = tokenizer.decode(ids[1:]).split("<|endoftext|>")[0]
    assert json.dumps(first)[1:-1] in texts
