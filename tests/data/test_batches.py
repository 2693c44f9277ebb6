from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.core.errors import UserError
from moesaic.data import calibration_batches, document_rows, open_source
from moesaic.data.sources import Texts


def test_rows_are_documents_cut_off(tokenizer: Any) -> None:
    texts = ("hello fox", "", "the lazy dog " * 50)
    rows = list(document_rows(Texts(texts), tokenizer, context=16))
    assert rows[0] == [1, *tokenizer("hello fox", add_special_tokens=False)["input_ids"], 0]
    assert len(rows) == 2  # the empty document is left out
    assert rows[1] == tokenizer(texts[2])["input_ids"][:16]
    assert len(list(document_rows(Texts(texts), tokenizer, context=16, max_documents=1))) == 1


def test_calibration_batches_are_full_rows_of_real_text(corpus: Path, tokenizer: Any) -> None:
    data = f"{corpus}/*/train.jsonl"
    batches = list(calibration_batches(data, tokenizer, tokens=330, context=32, batch=4))
    assert [tuple(batch.shape) for batch in batches] == [(4, 32), (4, 32), (2, 32)]
    assert all(batch.dtype == torch.long for batch in batches)
    rows = torch.cat(batches)
    for index, name in enumerate(("books", "github", "wiki")):  # the domains take turns
        source = open_source(corpus / name / "train.jsonl")
        stream = [t for row in document_rows(source, tokenizer, context=10**9) for t in row]
        mine = rows[index::3].flatten().tolist()
        assert mine == stream[: len(mine)]


def test_rows_that_begin_with_a_document(tokenizer: Any) -> None:
    texts = ("the lazy dog " * 9, "a fox", "the old tree sleeps " * 4, "hello " * 40)
    read = list(document_rows(Texts(texts), tokenizer, context=10**9))
    given = {"x": Texts(texts)}
    rows = torch.cat(
        list(calibration_batches(given, tokenizer, tokens=999, context=16, starts=True))
    )
    # a short document is followed by the next; what is left of a long one is dropped
    wanted = [read[0][:16], [*read[1], *read[2]][:16], read[3][:16]]
    assert len(read[1]) < 16
    assert rows.tolist() == wanted


def test_too_little_text(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="less than one row of 512 tokens"):
        list(calibration_batches({"x": Texts(("short",))}, tokenizer, tokens=1024))
