"""Packing and its inverse, beside LLaMA-MoE-v2's own numbers."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from moesaic.core.errors import UserError
from moesaic.data.chat import IGNORED, Conversation
from moesaic.data.segments import first_fit, pack, unpad
from tests.helpers import GOLDEN

PACKING = json.loads((GOLDEN / "llama_moe_v2/packing.json").read_text())


def test_groups_of_the_original() -> None:
    limit = PACKING["pack_len"]
    groups = first_fit(PACKING["lens"], limit=limit)
    assert groups == PACKING["groups"]
    # The original opens with an empty group where the first item fills a row; here none is empty.
    defect = PACKING["first_item_equal_pack_len_bug"]
    assert defect[0] == []
    assert first_fit([limit, limit], limit=limit) == defect[1:]


def test_groups_are_in_order_within_the_limit_and_no_shorter_than_needed() -> None:
    rng = random.Random(0)
    for _ in range(50):
        limit = rng.randrange(1, 40)
        lengths = [rng.randrange(limit + 1) for _ in range(rng.randrange(30))]
        groups = first_fit(lengths, limit=limit)
        assert [item for group in groups for item in group] == list(range(len(lengths)))
        totals = [sum(lengths[item] for item in group) for group in groups]
        assert all(group and total <= limit for group, total in zip(groups, totals, strict=True))
        for total, following in zip(totals, groups[1:], strict=False):
            assert total + lengths[following[0]] > limit
    with pytest.raises(UserError, match="item 1 has 9 tokens but a row holds 8"):
        first_fit([8, 9], limit=8)


def test_row_of_the_original() -> None:
    golden = PACKING["pack_dps_FA"]
    ids = golden["input_ids"]
    # What it was made of: three items, of the last two one more label is masked.
    items = [
        Conversation(ids[:3], ids[:3]),
        Conversation(ids[3:8], [IGNORED, IGNORED, *ids[5:8]]),
        Conversation(ids[8:], [IGNORED, IGNORED, *ids[10:]]),
    ]
    row = pack(items)
    assert row.ids.tolist() == golden["input_ids"]
    assert row.labels.tolist() == golden["labels"]
    assert row.segment.tolist() == golden["attention_mask"]
    assert row.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_padding_is_no_segment() -> None:
    row = pack([Conversation([5, 6], [5, 6]), Conversation([], []), Conversation([7], [7])],
               length=6, pad=2)  # fmt: skip
    assert row.ids.tolist() == [5, 6, 7, 2, 2, 2]
    assert row.labels.tolist() == [IGNORED, 6, IGNORED, IGNORED, IGNORED, IGNORED]
    assert row.segment.tolist() == [1, 1, 3, 0, 0, 0]
    assert row.position.tolist() == [0, 1, 0, 0, 1, 2]
    assert all(array.dtype == np.int64 for array in row)
    with pytest.raises(UserError, match="2 tokens do not fit into a row of 1"):
        pack([Conversation([5, 6], [5, 6])], length=1)


@pytest.mark.parametrize("case", ["unpad", "unpad_full_rows"])
def test_places_of_the_original(case: str) -> None:
    golden = PACKING[case]
    found = unpad(torch.tensor(golden["mask"]))
    assert found.indices.tolist() == golden["indices"]
    assert found.cu_seqlens.tolist() == golden["cu_seqlens"]
    assert found.cu_seqlens.dtype == torch.int32
    assert found.max_seqlen == golden["max_seqlen"]


def test_unpad_finds_what_was_packed() -> None:
    rng = random.Random(1)
    for _ in range(30):
        rows, wanted, tokens = [], [], []
        for _ in range(rng.randrange(1, 4)):
            sizes = [rng.randrange(1, 6) for _ in range(rng.randrange(4))]
            items = [Conversation([rng.randrange(1, 99) for _ in range(n)], [1] * n) for n in sizes]
            rows.append(pack(items, length=20))
            wanted += sizes
            tokens += [token for item in items for token in item.ids]
        found = unpad(torch.from_numpy(np.stack([row.segment for row in rows])))
        ids_N = torch.from_numpy(np.stack([row.ids for row in rows])).flatten()
        assert found.cu_seqlens.diff().tolist() == wanted
        assert found.max_seqlen == max(wanted, default=0)
        assert ids_N[found.indices].tolist() == tokens
