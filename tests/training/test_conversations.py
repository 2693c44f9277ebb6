"""Training on conversations: kept apart in a row, only answers learned, resumable."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moesaic.core.errors import UserError
from moesaic.data.chat import IGNORED, Conversation, encode, read_messages
from moesaic.data.segments import pack
from moesaic.models.families.llama_moe_v2 import LlamaMoEV2Config, LlamaMoEV2ForCausalLM
from moesaic.models.load import load
from moesaic.models.tokenizer import load_tokenizer
from moesaic.training import setup
from moesaic.training.loop import plan, read_config, train
from moesaic.training.state import states
from moesaic.training.step import accumulate, build_pass
from tests.helpers import GOLDEN
from tests.training import models
from tests.training.test_loop import Stop, course, log, stop_after, weights


def llama_moe_v2(seed: int = 0, **fields):
    torch.manual_seed(seed)
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, **fields}
    model = LlamaMoEV2ForCausalLM(LlamaMoEV2Config(**{**models._SHAPE, **options}))
    models.spread_routers(model)
    return model


def attention_experts(**fields):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_experts": 2}
    options = {"use_attn_moe": True, "top_k_attn": 1, "scale_factor_attn": 2.0}
    return llama_moe_v2(**heads, **options, **fields)


FAMILIES = [
    models.dense,
    models.llama_moe,
    models.mixtral,
    models.deepseek_v3,
    llama_moe_v2,
    attention_experts,
]
SIZES = [5, 1, 9, 3]


def talks(seed: int = 0) -> list[Conversation]:
    """Random conversations of SIZES, of which the second half is learned."""
    rng = random.Random(seed)
    found = []
    for size in SIZES:
        ids = [rng.randrange(3, 64) for _ in range(size)]
        found.append(Conversation(ids, [IGNORED] * (size // 2) + ids[size // 2 :]))
    return found


def row(conversations: list[Conversation], length: int) -> dict[str, torch.Tensor]:
    packed = pack(conversations, length=length)
    names = ("ids", "labels", "position")
    return {name: torch.from_numpy(getattr(packed, name))[None] for name in names}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", FAMILIES)
def test_a_packed_row_says_what_its_conversations_say_alone(build, attention):
    model = build(attn_implementation=attention).eval()
    conversations = talks()
    packed = row(conversations, length=24)

    @torch.no_grad()
    def logits(ids_BT, **positions):
        return model(input_ids=ids_BT, use_cache=False, **positions).logits[0]

    expected = torch.cat([logits(torch.tensor([c.ids])) for c in conversations])
    together = logits(packed["ids"], position_ids=packed["position"])
    mixed = logits(packed["ids"])
    assert float((together[: len(expected)] - expected).abs().max()) < 2e-6
    assert float((mixed[: len(expected)] - expected).abs().max()) > 1e-4  # so this could fail
    setup.check_apart(model)


def test_a_model_that_mixes_conversations_is_refused(monkeypatch):
    model = models.mixtral()
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, position_ids=None, **rest: forward(self, **rest)
    )
    with pytest.raises(UserError, match="MixtralForCausalLM does not keep conversations apart"):
        setup.check_apart(model)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", ["jamba", "openmoe", "yuan2_moe"])
def test_families_with_a_memory_of_their_own_are_refused(family):
    with pytest.raises(UserError, match="does not keep conversations apart"):
        setup.check_apart(load(GOLDEN / "families" / family, dtype=torch.float32))


@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_are_those_of_the_answers_alone(passes):
    model = models.mixtral(router_aux_loss_coef=0.0)
    rows = [row(talks(seed), length=20) for seed in range(4)]
    given = {
        key: torch.cat([one[name] for one in rows]).view(passes, 4 // passes, 20)
        for key, name in (("ids", "ids"), ("position_ABT", "position"), ("labels_ABT", "labels"))
    }
    result = accumulate(build_pass(model), given.pop("ids"), **given)
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total, count = torch.zeros(()), 0
    for conversation in (c for seed in range(4) for c in talks(seed)):
        logits_TV = model(input_ids=torch.tensor([conversation.ids])).logits[0]
        labels_T = torch.tensor(conversation.labels)
        total = total + F.cross_entropy(logits_TV[:-1], labels_T[1:], reduction="sum")
        count += int((labels_T[1:] != IGNORED).sum())
    (total / count).backward()
    assert float(result.values["loss"]) == pytest.approx(float(total.detach()) / count, rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert float((got[name] - parameter.grad).abs().max()) < 1e-6, name


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}> {{ m.content }}{{ eos_token }}{% else %}{{ m.content }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture
def chat(settings, tmp_path):
    """Function to the mapping of a run on sums, each asked and answered."""
    rng = random.Random(0)
    for split, count in (("train", 200), ("valid", 12)):
        lines = []
        for _ in range(count):
            a, b = rng.randrange(10), rng.randrange(10)
            turns = [f"{a} plus {b} is ?", f"{a + b} .", "and so ?", "the old king"]
            senders = ("human", "gpt", "human", "gpt")
            turns = [{"from": f, "value": v} for f, v in zip(senders, turns, strict=True)]
            lines.append(json.dumps({"conversations": turns[: rng.choice((2, 4))]}) + "\n")
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))

    def make(build=models.llama_moe, **changes):
        base = settings(build, **changes)
        model = shutil.copytree(base["model"], tmp_path / build.__name__, dirs_exist_ok=True)
        (model / "chat_template.jinja").write_text(TEMPLATE)
        data = {"train": str(tmp_path / "train.jsonl"), "valid": str(tmp_path / "valid.jsonl")}
        data = {**base["data"], **data, "block_size": 64, "conversations": True}
        return {**base, "model": str(model), "data": data}

    return make


def test_a_run_learns_the_answers(chat, tmp_path):
    config = chat(steps=30, optimizer={"lr": 1e-2})
    out = train(config, out=tmp_path / "run")
    losses = [line["loss"] for line in log(out)]
    assert losses[-1] < 0.5 * losses[0]
    held_out = log(out, "evaluate")
    assert held_out[-1]["loss"]["mean"] < 0.5 * held_out[0]["loss"]["mean"]
    # The first loss is that of the answers under the model that was given.
    tokenizer = load_tokenizer(config["model"])
    model = setup.load_model(read_config(config), torch.device("cpu"), "fp32").eval()
    losses, answers = [], []
    for line in (tmp_path / "valid.jsonl").read_text().splitlines():
        ids, labels = encode(read_messages(json.loads(line), where=""), tokenizer)
        answers.append(tokenizer.decode([label for label in labels if label != IGNORED]))
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([ids])).logits[0]
        targets_T = torch.tensor(labels)[1:]
        kept_T = targets_T != IGNORED
        losses += F.cross_entropy(logits_TV[:-1][kept_T], targets_T[kept_T], reduction="none")
    assert held_out[0]["loss"]["mean"] == pytest.approx(float(np.mean(losses)), rel=1e-5)
    assert all(answer.startswith(" ") and answer.endswith("<|endoftext|>") for answer in answers)
    assert "?" not in "".join(answers)


def test_an_interrupted_run_goes_on_bit_for_bit(chat, tmp_path, monkeypatch):
    config = chat(models.mixtral)
    whole = train(config, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(Stop):
            train(config, out=tmp_path / "cut")
    assert list(states(tmp_path / "cut")) == [3, 6]
    cut = train(config, out=tmp_path / "cut")
    assert course(cut) == course(whole)
    assert all(torch.equal(weights(whole)[name], w) for name, w in weights(cut).items())


def test_a_dry_run_counts_rows_and_refuses_text(chat, settings, tmp_path):
    config = chat()
    found = plan(read_config(config))["domains"]["train"]
    assert found["tokens"] % 64 == 0
    assert found["epochs"] == pytest.approx(12 * 4 * 64 / found["tokens"], abs=1e-3)
    text = settings(models.llama_moe)
    shutil.copytree(text["model"], tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(TEMPLATE)
    text |= {"model": str(tmp_path / "model"), "data": {**text["data"], "conversations": True}}
    with pytest.raises(UserError, match=r"sums.jsonl:1: no conversation \(it holds: text\)"):
        plan(read_config(text))
