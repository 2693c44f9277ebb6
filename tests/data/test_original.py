from __future__ import annotations

import json

from moesaic.data.original import OriginalMixture, evaluation_blocks, group_texts, packed_blocks
from tests.helpers import GOLDEN

STREAM = json.loads((GOLDEN / "llama_moe_v1" / "streaming.json").read_text())
SIZES = {"block": STREAM["block_size"], "seed": STREAM["seed"], "buffer": STREAM["buffer_size"]}


def test_blocks_of_each_domain() -> None:
    for name, files in STREAM["corpus"].items():
        assert list(packed_blocks(files, **SIZES)) == STREAM["per_domain_blocks"][name]


def test_order_of_the_mixed_stream() -> None:
    domains = {name: STREAM["corpus"][name] for name in STREAM["directory_order"]}
    mixed = list(OriginalMixture(domains, weights=STREAM["prob_map"], **SIZES))
    assert [name for name, _ in mixed] == STREAM["mixed_domain_order"]
    for name in domains:
        own = [block for drawn, block in mixed if drawn == name]
        assert own == STREAM["per_domain_blocks"][name][: len(own)]


def test_weights_can_change() -> None:
    domains = {name: STREAM["corpus"][name] for name in STREAM["directory_order"]}
    mixture = OriginalMixture(domains, weights=STREAM["prob_map"], **SIZES)
    blocks = iter(mixture)
    next(blocks)
    mixture.set_weights({"en_a": 0.0, "en_b": 0.0, "github": 1.0})
    assert {name for name, _ in (next(blocks) for _ in range(20))} == {"github"}


def test_a_buffer_shorter_than_a_block_is_one_short_block() -> None:
    assert list(packed_blocks({"a": [[1, 2], [3]]}, block=8)) in ([[1, 2, 3]], [[3, 1, 2]])


def test_validation_blocks_and_grouping() -> None:
    documents = [d for file in STREAM["corpus"]["en_b"].values() for d in file]
    assert evaluation_blocks(documents, block=16) == STREAM["cached_eval_blocks_en_b"]
    rows = {"input_ids": [[1, 2, 3], [4, 5, 6, 7], [8, 9]]}
    assert group_texts(rows, block=4) == STREAM["group_texts"]
    assert group_texts({"input_ids": [[1, 2], [3]]}, block=4) == {
        key: [STREAM["group_instances_short"][0][key]] for key in ("input_ids", "labels")
    }
