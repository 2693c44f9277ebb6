from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.core.errors import UserError
from moesaic.data.sources import Texts
from moesaic.measure import held_out_loss
from tests.data.conftest import text
from tests.helpers import SHARED

TEXTS = {
    "long": Texts(tuple(text(i, 40) for i in range(5))),
    "short": Texts(tuple(text(i, 1 + 2 * i) for i in range(12))),
}


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        attention_dropout=0.2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


def one_by_one(model: Any, tokenizer: Any, texts: Texts, context: int) -> tuple[float, int]:
    """The meaning: transformers' own loss of each document alone, weighted by its tokens."""
    total, count = 0.0, 0
    model.eval()
    for document in texts.documents():
        ids = [1, *tokenizer(document, add_special_tokens=False)["input_ids"], 0][:context]
        row = torch.tensor([ids])
        with torch.no_grad():
            total += float(model(input_ids=row, labels=row).loss) * (len(ids) - 1)
        count += len(ids) - 1
    return total / count, count


@pytest.mark.parametrize("context", [2, 31, 64, 512])
def test_is_the_mean_over_tokens_of_each_domain(
    model: Any,
    tokenizer: Any,
    context: int,
) -> None:
    losses = held_out_loss(model, tokenizer, TEXTS, context=context)
    expected = {n: one_by_one(model, tokenizer, t, context)[0] for n, t in TEXTS.items()}
    assert list(losses) == ["mean", "long", "short"]
    assert losses["mean"] == pytest.approx((losses["long"] + losses["short"]) / 2, rel=1e-9)
    for name, loss in expected.items():
        assert losses[name] == pytest.approx(loss, abs=1e-5)


def test_batching_and_padding_do_not_matter(model: Any, tokenizer: Any) -> None:
    alone = held_out_loss(model, tokenizer, TEXTS, context=64, batch_size=1)
    together = held_out_loss(model, tokenizer, TEXTS, context=64, batch_size=50)
    assert together == pytest.approx(alone, abs=1e-5)


def test_only_the_first_documents(model: Any, tokenizer: Any) -> None:
    first = {name: Texts(texts.texts[:3]) for name, texts in TEXTS.items()}
    assert held_out_loss(model, tokenizer, TEXTS, max_documents=3) == pytest.approx(
        held_out_loss(model, tokenizer, first)
    )


def test_the_model_is_left_as_it_was(model: Any, tokenizer: Any) -> None:
    model.train()
    model.lm_head.eval()
    one, two = (held_out_loss(model, tokenizer, TEXTS, context=32) for _ in range(2))
    assert one == two, "dropout is off while measuring"
    assert model.training
    assert model.model.training
    assert not model.lm_head.training
    assert all(p.grad is None for p in model.parameters())


def test_refusals(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="context=1"):
        held_out_loss(model, tokenizer, TEXTS, context=1)
    with pytest.raises(UserError, match="'empty' holds no token to predict"):
        held_out_loss(model, tokenizer, {"empty": Texts(("",))})


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "ckpt").is_dir(), reason="needs ../shared")
def test_the_trained_checkpoint() -> None:
    """Near the figure its training reported, which was taken on twice as many documents."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder: Path = SHARED / "ckpt" / "dense-14m"
    reported = json.loads((folder / "train.json").read_text())["valid_nats_per_token"]
    data = {n: SHARED / "data" / "corpus" / n / "valid.jsonl" for n in reported if n != "mean"}
    measured = held_out_loss(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
        data,
    )
    assert measured["mean"] == pytest.approx(2.957, abs=0.005)
    for name in ("books", "arxiv", "commoncrawl", "simple_english", "stackexchange"):
        assert measured[name] == pytest.approx(reported[name], abs=0.1)
