"""Yuan2.0-M32 against the original program's golden numbers, and what it adds."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import moesaic
from moesaic.core.errors import UserError
from moesaic.models.balance import balance_loss
from moesaic.models.families.yuan2_moe import (
    ParallelAttentionRouter,
    YuanConfig,
    YuanForCausalLM,
    YuanForSequenceClassification,
)
from tests.models.golden import FAMILIES, family
from tests.models.parity import CLOSE, IMPLEMENTATIONS, Parity

BALANCE = {"router_aux_loss_coef": 0.1}
FIXTURES = [Parity("yuan2_moe", balance=BALANCE), Parity("yuan2_moe_nonorm", balance=BALANCE)]
END = 5
both = pytest.mark.parametrize("fixture", FIXTURES, ids=str)


def tiny(**fields):
    """A config of two layers of four heads, 24 wide of which 8 are rotated."""
    small = {
        "vocab_size": 96,
        "hidden_size": 32,
        "attention_projection_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": END,
        "bos_token_id": END,
        "eos_token_id": END,
        "eod_token": END,
        "initializer_range": 0.2,
        "moe_config": {"moe_num_experts": 6, "moe_top_k": 2, "ffn_hidden_size": 20},
    }
    return YuanConfig(**{**small, **fields})


def build(cls=YuanForCausalLM, **fields):
    """A model whose every parameter differs, the filter's biases too."""
    torch.manual_seed(0)
    model = cls(tiny(**fields)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


def tokens(batch=2, length=14, *, seed=0):
    """Random ids without the end of a document."""
    return torch.randint(6, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


@both
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parity(fixture, implementation):
    fixture.check_cases(implementation)
    fixture.check_generation(implementation)


@both
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_300_tokens(fixture, attention):
    """Angles in bfloat16: above 256 several positions share one."""
    inputs, expected = family(fixture.name)
    model = fixture.load(fixture.directory, attn_implementation=attention)
    with torch.no_grad():
        logits = model(inputs["long_input_ids"]).logits
    torch.testing.assert_close(logits[:, -20:], expected["long/logits_last20"], **CLOSE)


@both
def test_saved_as_released(fixture, tmp_path):
    fixture.check_round_trip(tmp_path)


@both
def test_training(fixture):
    fixture.check_experts_interface()
    fixture.check_training_step()
    fixture.check_gradient_checkpointing()


def test_tied_unless_told():
    """Neither released config names it; the files have no lm_head."""
    tied = moesaic.load(FAMILIES / "yuan2_moe_nonorm")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = moesaic.load(FAMILIES / "yuan2_moe")
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_any_chunks_through_the_cache():
    """The filter sees the inputs before a chunk, one or two of them, and zeros before the first."""
    model, ids = build(), tokens()
    with torch.no_grad():
        whole = model(ids).logits
        for sizes in ([14], [1] * 14, [1, 5, 1, 7], [2, 1, 1, 10]):
            cache, parts = DynamicCache(config=model.config), []
            for part in ids.split(sizes, dim=1):
                parts.append(model(part, past_key_values=cache, use_cache=True).logits)
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_changes_nothing(attention):
    """On either side, whole and in chunks whose border lies in the padding or beside it."""
    model, ids = build(attn_implementation=attention), tokens()
    with torch.no_grad():
        alone = model(ids[1:, :9]).logits[0]
        for left in (True, False):
            place = slice(5, 14) if left else slice(0, 9)
            padded, mask = torch.full_like(ids, 7), torch.zeros_like(ids)
            padded[0], mask[0] = ids[0], 1
            padded[1, place], mask[1, place] = ids[1, :9], 1
            whole = model(padded, attention_mask=mask).logits
            torch.testing.assert_close(whole[1, place], alone, **CLOSE)
            for border in (3, 4, 5, 6, 7):
                cache, parts = DynamicCache(config=model.config), []
                for start, end in ((0, border), (border, 14)):
                    part = model(
                        padded[:, start:end],
                        attention_mask=mask[:, :end],
                        past_key_values=cache,
                        use_cache=True,
                    )
                    parts.append(part.logits)
                found = torch.cat(parts, dim=1)
                torch.testing.assert_close(found[1, place], alone, **CLOSE)
                torch.testing.assert_close(found[0], whole[0], **CLOSE)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_padding(beams, cache):
    """Beams carry the filter's inputs with them; a static cache holds them too."""
    model, ids = build(), tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "num_beams": beams}
    recomputed = model.generate(ids, attention_mask=mask, use_cache=False, **given)
    kept = model.generate(ids, attention_mask=mask, cache_implementation=cache, **given)
    assert torch.equal(kept, recomputed)
    alone = model.generate(ids[1:2, 4:], attention_mask=mask[1:2, 4:], **given)
    assert torch.equal(kept[1, 4:], alone[0])


def test_router_attends_among_experts():
    """Each logit is a mixture of the values; written out expert by expert."""
    router = ParallelAttentionRouter(tiny())
    torch.manual_seed(0)
    x = torch.randn(7, 32)
    logits, weights, ids = router(x)
    query, key, value = (part(x) for part in (router.query, router.key, router.value))
    for expert in range(6):
        mix = (query[:, expert, None] * key).softmax(-1)
        torch.testing.assert_close(logits[:, expert], (mix * value).sum(-1))
    top, order = logits.softmax(-1).topk(2)
    assert torch.equal(ids, order)
    torch.testing.assert_close(weights, top / top.sum(-1, keepdim=True))


def test_documents_are_hidden_from_later_ones():
    """In one layer; in the next, the filter carries some of a document over its end."""
    ids = tokens(1, 16)
    ids[0, 8] = END
    other = ids.clone()
    other[0, 1] = 90 if ids[0, 1] != 90 else 91
    for fields, hidden in (
        ({"reset_attention_mask": True}, True),
        ({"reset_attention_mask": True, "reset_position_ids": False}, False),
        ({}, False),
    ):
        model = build(num_hidden_layers=1, **fields)
        with torch.no_grad():
            first, second = (model(x, use_cache=False).logits for x in (ids, other))
        assert not torch.allclose(first[0, 8], second[0, 8], atol=1e-3)  # an end sees what it ends
        assert torch.equal(first[0, 9:], second[0, 9:]) == hidden
        if hidden:
            with pytest.raises(UserError, match="use_cache=False"):
                model.generate(ids, max_new_tokens=3, do_sample=False)


def test_loss_of_the_model():
    """Cross entropy alone as released; with a coefficient, the balance loss of real tokens too."""
    model, ids = build(output_router_logits=True), tokens()
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, labels=labels)
        model.config.router_aux_loss_coef = 0.5
        balanced = model(ids, attention_mask=mask, labels=labels)
    wanted = torch.nn.functional.cross_entropy(
        plain.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(plain.loss, wanted)
    real = mask.flatten().bool()
    logits = [layer[real] for layer in plain.router_logits]
    torch.testing.assert_close(plain.aux_loss, balance_loss(logits, None, top_k=2))
    torch.testing.assert_close(balanced.loss, wanted + 0.5 * plain.aux_loss)


def test_sequence_classification(tmp_path):
    model, ids = build(YuanForSequenceClassification, num_labels=3), tokens()
    ids[1, 10:] = END
    mask = (ids != END).long()
    with torch.no_grad():
        scores = model(ids, attention_mask=mask).logits
        hidden = model.model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(scores, model.score(hidden[torch.arange(2), [13, 9]]))
    model.save_pretrained(tmp_path)
    again = moesaic.load(tmp_path)
    assert type(again) is YuanForSequenceClassification
    with torch.no_grad():
        assert torch.equal(again(ids, attention_mask=mask).logits, scores)


def test_full_size():
    """The released config's 39.943 B parameters, embeddings tied."""
    with torch.device("meta"):
        model = YuanForCausalLM(YuanConfig(attention_projection_size=4096))
    model.tie_weights()
    assert round(model.num_parameters() / 1e9, 3) == 39.943
    routers = [m for m in model.modules() if isinstance(m, ParallelAttentionRouter)]
    assert len(routers) == 24


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_shareqk": True}, "use_shareqk"),
        ({"use_loss_mask": True}, "use_loss_mask"),
        ({"causal_mask": False}, "causal_mask"),
        ({"moe_config": {"gated_linear_unit": False}}, "gated_linear_unit"),
        ({"moe_config": {"moe_num_experts": 4, "moe_top_k": 5}}, "moe_top_k=5"),
        ({"attention_projection_size": 30}, "attention_projection_size=30"),
        ({"attention_projection_size": 16}, "attention_projection_size=16"),
    ],
)
def test_wrong_configs(fields, words):
    with pytest.raises(UserError, match=words):
        tiny(**fields)


def test_wrong_inputs():
    model, ids = build(), tokens()
    with pytest.raises(UserError, match="2 \\[batch"):
        model(ids, attention_mask=torch.ones(2, 1, 14, 14))
    with pytest.raises(UserError, match="config=model"):
        model(ids, past_key_values=DynamicCache())
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(UserError, match="1 columns for 1 tokens after 14"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)
    with pytest.raises(UserError, match="exactly one"):
        model()


def test_bfloat16():
    exact = moesaic.load(FAMILIES / "yuan2_moe", dtype=torch.float32)
    model = moesaic.load(FAMILIES / "yuan2_moe", dtype=torch.bfloat16)
    ids = family("yuan2_moe")[0]["input_ids"]
    with torch.no_grad():
        found, wanted = model(ids).logits, exact(ids).logits
    rows = (found.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert rows.median() < 0.05  # of a tiny model whose choices may flip
