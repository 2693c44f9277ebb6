"""Conversations to tokens and labels, beside what LLaMA-MoE-v2's own programs made of them."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from moesaic.core.errors import UserError
from moesaic.data.chat import IGNORED, chat_template, encode, read_messages, write_out
from tests.helpers import GOLDEN

V2 = GOLDEN / "llama_moe_v2"
QWEN = (  # thoughts of turns before the last are not written, as in Qwen3
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}{{ raise_exception('no system turns') }}{% endif %}{% endfor %}"
)


def turns(*said: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(said)
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, *({"role": r, "content": s} for r, s in zip(roles, said, strict=False))]


@pytest.fixture(scope="module")
def llama3() -> Any:
    """The tokenizer of the original's tiny model: Llama-3's special tokens and no template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(V2 / "dense")


@pytest.fixture
def bytes_with(tokenizer: Any) -> Any:
    """Function from a template to a byte-level tokenizer with it and ChatML's tokens."""

    def make(template: str) -> Any:
        own = copy.deepcopy(tokenizer)
        own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        own.chat_template = template
        return own

    return make


def test_the_batches_of_the_original(llama3: Any) -> None:
    lines = (V2 / "data.jsonl").read_text().splitlines()
    known = [encode(read_messages(json.loads(line), where="data"), llama3) for line in lines]
    rows = 0
    for batch in torch.load(V2 / "scores/e4/batches.pt", weights_only=True):
        for ids, labels, mask in zip(*(batch[k].tolist() for k in batch), strict=True):
            length = sum(mask)
            assert (ids[:length], labels[:length]) in known
            rows += 1
    assert rows == 8


def test_the_text_of_the_original(llama3: Any) -> None:
    golden = json.loads((V2 / "packing.json").read_text())["template"]
    messages = read_messages({"conversations": golden["conv"]}, where="golden")
    prompt, source = golden["nopad_parse(prompt,source)"]
    ((parts,), (roles,)) = golden["packed_parse_group_list"]
    text, spans = write_out(messages[1:], llama3)  # the original leaves the system's turn out
    assert text == "<|begin_of_text|>" + prompt
    learned = [text[start:stop] for start, stop in spans]
    assert learned == [p for p, role in zip(parts, roles, strict=True) if role == "assistant"]
    cuts = [17, *(cut for span in spans for cut in span)]
    assert [text[a:b] for a, b in zip(cuts[::2], cuts[1::2], strict=False)] == parts[::2]
    assert source == "".join(parts[::2])  # whose length, as a prefix, the original masks
    system, _ = write_out(messages, llama3)
    assert system.replace("<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>", "") == text


def test_every_turn_of_the_assistant_is_learned_and_nothing_else(llama3: Any) -> None:
    ids, labels = encode(turns("w20 w21", "w22", "w23", "w24 w25"), llama3)
    header = [3, 8, 4]  # the assistant's
    assert ids == [1, 3, 7, 4, 20, 21, 5, *header, 22, 5, 3, 7, 4, 23, 5, *header, 24, 25, 5]
    assert [x for x in labels if x != IGNORED] == [22, 5, 24, 25, 5]
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def learned(tokenizer: Any, messages: list[dict[str, str]]) -> list[str]:
    """The runs of labels, as text."""
    runs: list[list[int]] = [[]]
    for label in encode(messages, tokenizer).labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


def test_the_tokenizers_own_template_wins(bytes_with: Any) -> None:
    said = turns("assistant?", " a\n", "user", "two words", system="s")
    assert learned(bytes_with(QWEN), said) == [
        "a<|im_end|>",
        "<think>\n\n</think>\n\ntwo words<|im_end|>",
    ]
    plain = bytes_with(MISTRAL.replace("</s>", "<|endoftext|>"))
    assert learned(plain, said[1:]) == [
        "  a\n<|endoftext|>",
        " two words<|endoftext|>",
    ]
    with pytest.raises(UserError, match="refuses: no system turns"):
        encode(said, plain)
    headers_only = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}{% endfor %}"
    asks = "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    assert learned(bytes_with(headers_only + asks), said) == [" a", " two words"]


def test_what_no_answer_follows_is_dropped_and_an_opening_is_context(bytes_with: Any) -> None:
    own = bytes_with(QWEN)
    assert encode(turns("q"), own) == ([], [])
    assert encode(turns("q", "a", "more"), own) == encode(turns("q", "a"), own)
    opening = [{"role": "assistant", "content": "hello"}, *turns("q", "a")]
    assert learned(own, opening) == ["<think>\n\n</think>\n\na<|im_end|>"]
    assert "hello" in own.decode(encode(opening, own).ids)
    assert learned(own, turns("q", "", "r", "a"))[0] == "<|im_end|>"


def test_templates_that_cannot_be_used(tokenizer: Any, bytes_with: Any) -> None:
    with pytest.raises(UserError, match=r"no chat template.*<\|start_header_id\|>.*jinja"):
        chat_template(tokenizer)
    numbered = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="differently once others follow"):
        encode(turns("q", "a"), bytes_with(numbered))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "x"}, "f:3: no conversation .it holds: text"),
        ({"conversations": "x"}, "f:3: no conversation"),
        ({"conversations": [{"from": "human"}]}, "without 'from' and 'value'"),
        ({"messages": [{"role": "user", "content": None}]}, "without 'role' and 'content'"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "a turn of 'tool'. Known are system"),
    ],
)
def test_what_is_no_conversation(record: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_messages(record, where="f:3")


def test_both_forms_mean_the_same() -> None:
    one = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert read_messages(one, where="") == read_messages({"messages": turns("q", "a")}, where="")
