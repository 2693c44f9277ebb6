from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from moesaic.data.packing import EndOfData, PackedDomain
from moesaic.data.tokens import TokenDomain

BOS, EOS = 1, 0


def make_domain(
    lengths: list[int], *, bos: int | None = BOS, eos: int | None = EOS, name: str = "d"
) -> TokenDomain:
    """Every token of every document is another number, so that none can be mistaken."""
    starts = np.cumsum([10, *lengths])
    documents = [range(start, start + n) for start, n in zip(starts, lengths, strict=False)]
    return TokenDomain.from_documents(name, documents, bos=bos, eos=eos)


LENGTHS = [5, 1, 40, 0, 7, 3, 100, 2, 2, 9, 31, 16, 15, 17, 1]


def wrapped(domain: TokenDomain) -> list[tuple[int, ...]]:
    front = [] if domain.bos is None else [domain.bos]
    back = [] if domain.eos is None or domain.eos == domain.bos else [domain.eos]
    return [(*front, *domain.document(i).tolist(), *back) for i in range(len(domain))]


@pytest.mark.parametrize("block", [1, 7, 16, 64])
@pytest.mark.parametrize("lanes", [1, 3, 8])
@pytest.mark.parametrize("epochs", [1, 3])
def test_no_token_is_lost_and_none_repeated(block: int, lanes: int, epochs: int) -> None:
    domain = make_domain(LENGTHS)
    packed = PackedDomain(domain, block=block, seed=3, lanes=lanes, max_epochs=epochs)
    seen: Counter[int] = Counter()
    blocks = 0
    while True:
        try:
            taken = packed.take()
        except EndOfData:
            break
        assert taken.ids.shape == (block,)
        assert taken.ids.dtype == np.int64
        seen.update(taken.ids.tolist())
        blocks += 1
    expected = Counter(t for document in wrapped(domain) for t in document)
    assert blocks == epochs * packed.epoch_tokens // block  # only the end of the whole is cut
    missing = Counter({t: n * epochs for t, n in expected.items()}) - seen
    assert not seen - Counter({t: n * epochs for t, n in expected.items()})
    assert sum(missing.values()) == epochs * packed.epoch_tokens - blocks * block < block


def test_documents_are_whole_and_in_order_across_blocks() -> None:
    domain = make_domain(LENGTHS)
    packed = PackedDomain(domain, block=8, seed=1, lanes=1, max_epochs=1)
    stream = [t for _ in range(packed.epoch_tokens // 8) for t in packed.take().ids.tolist()]
    documents = wrapped(domain)
    found = []
    while stream:
        match = next((d for d in documents if tuple(stream[: len(d)]) == d), None)
        if match is None:  # the end of the stream is inside a document
            assert any(d[: len(stream)] == tuple(stream) for d in documents)
            break
        found.append(match)
        documents.remove(match)
        stream = stream[len(match) :]
    assert found != sorted(found), "the order is shuffled"


def test_every_epoch_has_its_own_order_and_every_seed() -> None:
    domain = make_domain([4] * 50, bos=None, eos=None)

    def epoch_orders(seed: int) -> list[list[int]]:
        packed = PackedDomain(domain, block=4, seed=seed, lanes=1)
        return [[int(packed.take().ids[0]) for _ in range(50)] for _ in range(3)]

    first = epoch_orders(0)
    assert all(sorted(order) == list(range(10, 210, 4)) for order in first)
    assert first[0] != first[1] != first[2] != first[0]
    assert first == epoch_orders(0)
    assert epoch_orders(1)[0] != first[0]
    other = PackedDomain(make_domain([4] * 50, bos=None, eos=None, name="e"), block=4, seed=0)
    assert [int(other.take().ids[0]) for _ in range(50)] != first[0]


def test_boundaries_describe_the_block() -> None:
    packed = PackedDomain(make_domain(LENGTHS), block=32, seed=5, lanes=4)
    for _ in range(40):
        block = packed.take()
        starts = np.flatnonzero(block.position == 0)
        assert starts[0] == 0
        assert np.array_equal(np.flatnonzero(np.diff(block.document)) + 1, starts[1:])
        assert (block.ids[starts[1:]] == BOS).all()
        for run in np.split(block.position, starts[1:]):
            assert np.array_equal(run, np.arange(len(run)))
        inner = (block.position[1:] > 0) & (block.ids[1:] == BOS)
        assert not inner.any()


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [
        (1, 0, [1, 10, 11, 0]),
        (1, None, [1, 10, 11]),
        (None, 0, [10, 11, 0]),
        (7, 7, [7, 10, 11]),
        (None, None, [10, 11]),
    ],
)
def test_delimiters(bos: int | None, eos: int | None, expected: list[int]) -> None:
    domain = make_domain([2], bos=bos, eos=eos)
    packed = PackedDomain(domain, block=len(expected), seed=0)
    assert packed.take().ids.tolist() == expected
    assert packed.take().ids.tolist() == expected


def test_neighbouring_blocks_are_of_different_documents() -> None:
    packed = PackedDomain(make_domain([1000] * 32), block=10, seed=0, lanes=8)
    owners = [(int(packed.take().ids[5]) - 10) // 1000 for _ in range(64)]
    assert all(len(set(owners[i : i + 8])) == 8 for i in range(len(owners) - 8))


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_skipping_is_taking_without_looking(lanes: int) -> None:
    one, two = (PackedDomain(make_domain(LENGTHS), block=9, seed=2, lanes=lanes) for _ in range(2))
    for turn in range(200):
        if turn % 3:
            one.take()
            two.skip()
        else:
            assert np.array_equal(one.take().ids, two.take().ids)
    assert one.state_dict() == two.state_dict()


def test_epochs_count_tokens() -> None:
    packed = PackedDomain(make_domain([8] * 10), block=25, seed=0)  # 10 documents of 10 tokens
    for _ in range(6):
        packed.take()
    assert packed.epochs == pytest.approx(1.5)


def test_the_end_says_what_to_do_and_changes_nothing() -> None:
    packed = PackedDomain(make_domain([8] * 10), block=30, seed=0, max_epochs=1)
    for _ in range(3):
        packed.take()
    before = packed.state_dict()
    for _ in range(2):
        with pytest.raises(EndOfData, match=r"'d' has been read 1 times.*raise max_epochs"):
            packed.take()
    assert packed.state_dict() == before


def test_a_long_document_is_not_copied_for_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PackedDomain(make_domain([100_000]), block=16, seed=0)
    sizes: list[int] = []
    real = TokenDomain.read

    def read(domain: TokenDomain, index: int, start: int, stop: int) -> np.ndarray:
        sizes.append(stop - start)
        return real(domain, index, start, stop)

    monkeypatch.setattr(TokenDomain, "read", read)
    for _ in range(100):
        packed.take()
    assert max(sizes) <= 16
