"""Conversations written out as token ids, of which only what the assistant says is learned.

A conversation is a JSON object in either of two forms:

    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

(ShareGPT and OpenHermes; OpenAI). The tokenizer's own chat template writes it out, or Llama-3's
where the tokenizer has none. A turn of the assistant is learned from the end of the template's
prompt for it to the token that ends the turn. What follows its last turn is dropped, a turn of its
own that opens the conversation is context. A special token that is spelled out in a message is that
token, as everywhere with chat templates.

LLaMA-MoE-v2's programs differ: they leave out the system's turns, and one of the two masks a prefix
as long as all user turns together, which with several turns is not where those are (spec
llama-moe-v2, sections 9 and 12).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moesaic.core.errors import UserError

IGNORED = -100
"""Label of a token that is not learned."""

LLAMA3 = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
"""The chat format of Llama-3 as a template; messages are written as they are."""

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_FORMS = {"conversations": ("from", "value"), "messages": ("role", "content")}

Message = dict[str, str]
"""A turn: `role` (system, user or assistant) and `content`."""


class Conversation(NamedTuple):
    """Token ids, and labels of the same length: the id itself, or IGNORED."""

    ids: list[int]
    labels: list[int]


def read_messages(record: Mapping[str, Any], *, where: str) -> list[Message]:
    """Return the turns of a conversation's JSON object, in either form.

    Raises UserError, naming `where`, for an object that is no conversation and an unknown role.
    """
    form = next((key for key in _FORMS if key in record), None)
    turns = record.get(form) if form else None
    if form is None or not isinstance(turns, Sequence) or isinstance(turns, str):
        keys = ", ".join(map(str, record)) or "nothing"
        raise UserError(
            f"{where}: no conversation (it holds: {keys[:200]}). Write "
            '{"conversations": [{"from": "human", "value": "..."}, ...]} on every line.'
        )
    speaker, said = _FORMS[form]
    messages = []
    for turn in turns:
        name = turn.get(speaker) if isinstance(turn, Mapping) else None
        text = turn.get(said) if isinstance(turn, Mapping) else None
        if not isinstance(text, str) or not isinstance(name, str):
            raise UserError(
                f"{where}: a turn without '{speaker}' and '{said}'. Every turn has both."
            )
        if name not in _ROLES:
            raise UserError(
                f"{where}: a turn of '{name}'. Known are {', '.join(_ROLES)}; leave others out."
            )
        messages.append({"role": _ROLES[name], "content": text})
    return messages


def chat_template(tokenizer: Any) -> str:
    """Return the tokenizer's chat template, else LLAMA3 where the tokenizer has its tokens.

    Raises UserError where there is neither.
    """
    template = tokenizer.chat_template
    if isinstance(template, Mapping):  # several by name
        template = template.get("default")
    if template:
        return str(template)
    known = tokenizer.get_vocab()
    missing = [token for token in re.findall(r"<\|\w+\|>", LLAMA3) if token not in known]
    if missing:
        raise UserError(
            f"the tokenizer has no chat template, and Llama-3's needs the token {missing[0]}. Put "
            "a chat_template.jinja beside the tokenizer."
        )
    return LLAMA3


def write_out(messages: Sequence[Message], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation and the spans [start, stop) of characters to learn.

    Without a turn of the assistant that answers something there is no span. Raises UserError for
    what the template refuses, and for a template that changes what was written before a turn.
    """
    answers = [i for i, turn in enumerate(messages) if i and turn["role"] == "assistant"]
    if not answers:
        return "", []
    template = chat_template(tokenizer)
    messages = list(messages[: answers[-1] + 1])
    text = _render(messages, tokenizer, template, prompt=False)
    spans = []
    for i in answers:
        before = _render(messages[:i], tokenizer, template, prompt=True)
        said = messages[i]["content"].strip()
        at = text.find(said, len(before))
        if at < 0 or not text.startswith(before):
            raise UserError(
                "the tokenizer's chat template writes a turn differently once others follow, so "
                "what the assistant says cannot be told apart. Put a plainer chat_template.jinja "
                "beside the tokenizer."
            )
        spans.append((len(before), at + len(said)))
    # The token that ends the last turn ends every turn; after the others a header may follow.
    special = "|".join(map(re.escape, sorted(tokenizer.get_added_vocab(), key=len, reverse=True)))
    last = re.compile(rf"\s*({special})").match(text, spans[-1][1]) if special else None
    if last is not None:
        closing = re.compile(rf"\s*{re.escape(last[1])}")
        ends = [closing.match(text, stop) for _, stop in spans]
        spans = [(a, end.end() if end else b) for (a, b), end in zip(spans, ends, strict=True)]
    return text, spans


def encode(messages: Sequence[Message], tokenizer: Any) -> Conversation:
    """Return a conversation's ids and labels, empty without an answer of the assistant.

    A token that holds a part of an answer is learned, also where it begins in the prompt.
    `tokenizer` is a fast transformers tokenizer. Raises UserError as `write_out` does.
    """
    text, spans = write_out(messages, tokenizer)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, labels = list(found["input_ids"]), []
    spans = [*spans, (len(text) + 1, len(text) + 1)]
    span = 0
    for token, (start, stop) in zip(ids, found["offset_mapping"], strict=True):
        while start >= spans[span][1]:
            span += 1
        labels.append(token if stop > spans[span][0] else IGNORED)
    return Conversation(ids, labels)


def _render(messages: Sequence[Message], tokenizer: Any, template: str, *, prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except TemplateError as error:
        raise UserError(f"the tokenizer's chat template refuses: {error}") from None
    return text
