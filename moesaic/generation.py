"""Write text with a model: greedy by default, sampled when a temperature is given, streamed.

A thin layer over transformers' `generate` that fixes what a user should not have to know: one
temperature decides between greedy and sampling, a seed makes sampling repeatable without touching
the caller's random state, the text comes out piece by piece, and missing tokenizers, empty prompts
and prompts beyond the model's context are errors that say what to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moesaic.core.errors import UserError, check_seed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Generation:
    """What was written and how: texts, token counts, seconds and the settings used."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    stopped: Literal["end", "length"]
    seconds: float
    settings: dict[str, Any]

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, the reading of the prompt included."""
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with `tokens_per_second`."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def generate(
    model: str | Path | PreTrainedModel,
    prompt: str,
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: Device = "auto",
    dtype: DType = "auto",
    stream: Callable[[str], None] | None = None,
) -> Generation:
    """Continue `prompt` by at most `max_new_tokens` tokens.

    Temperature 0 takes the most likely token every time; above 0 it samples, from the `top_k` most
    likely tokens and from the smallest set with probability `top_p`, where given. The same seed
    gives the same text on the same machine. `stream` receives pieces of text as they are final;
    joined they are the result's `text`. `device` and `dtype` apply when `model` is a directory,
    and a model that is given loaded stays where it is.

    Raises:
        UserError: no tokenizer, an empty prompt, a prompt longer than the model's context, or a
            setting out of range.
    """
    from moesaic.models.tokenizer import load_tokenizer

    settings = _check(max_new_tokens, temperature, top_k, top_p, seed)
    if isinstance(model, (str, Path)):
        source = model
        if tokenizer is None and Path(source).is_dir():
            tokenizer = load_tokenizer(source)  # first: its errors are quicker than loading weights
        model = _load(source, device, dtype)
        tokenizer = load_tokenizer(source) if tokenizer is None else tokenizer
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer)
    if tokenizer is None:
        raise UserError("no tokenizer was given with the loaded model. Pass tokenizer=DIR.")
    ids_1T = _encode(tokenizer, prompt).to(model.device)
    room = _room(model, ids_1T.shape[1])
    budget = min(max_new_tokens, room)
    writer = _Writer(tokenizer, stream)
    start = time.perf_counter()
    new_ids = _run(model, ids_1T, budget, settings, writer)
    writer.finish()
    ends = _end_ids(model, tokenizer)
    return Generation(
        prompt=prompt,
        text=writer.text,
        prompt_tokens=ids_1T.shape[1],
        new_tokens=len(new_ids),
        stopped="end" if new_ids and new_ids[-1] in ends else "length",
        seconds=time.perf_counter() - start,
        settings={**settings, "max_new_tokens": budget},
    )


def _check(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> dict[str, Any]:
    check_seed(seed)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: ask for at least 1 token.")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature}: give 0 (greedy) or a positive number.")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k}: give at least 1, or leave it out.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: give a share above 0 and at most 1, or leave it out.")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise UserError("top_k and top_p choose among samples. Give a temperature above 0 as well.")
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}


def _load(path: str | Path, device: Device, dtype: DType) -> PreTrainedModel:
    import torch

    from moesaic.models.load import load

    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if place == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA GPU here. Use --device cpu.")
    # bfloat16 products on a CPU are slow and coarse; a checkpoint's own type is meant for GPUs.
    chosen = ("float32" if place == "cpu" else "auto") if dtype == "auto" else dtype
    # a device_map.json beside the model counts as long as no device is asked for
    model: Any = load(path, dtype=chosen, device_map="auto" if device == "auto" else None)
    placed: PreTrainedModel = model if hasattr(model, "hf_device_map") else model.to(place)
    return placed


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    import torch

    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not ids:
        # An empty prompt means "begin": the token that opens documents, if there is one.
        opening = tokenizer.bos_token_id
        if opening is None:
            raise UserError("the prompt is empty and the tokenizer has no opening token. Write -p.")
        ids = [opening]
    return torch.tensor([ids])


def _room(model: PreTrainedModel, prompt_tokens: int) -> int:
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        return 2**31
    if prompt_tokens >= context:
        raise UserError(
            f"the prompt has {prompt_tokens} tokens but the model's context is {context}. "
            f"Shorten it to at most {context - 1} tokens."
        )
    return int(context - prompt_tokens)


def _run(
    model: Any, ids_1T: torch.Tensor, budget: int, settings: dict[str, Any], writer: _Writer
) -> list[int]:
    import torch
    from transformers import GenerationConfig

    ends = sorted(_end_ids(model, writer.tokenizer))
    fields: dict[str, Any] = {
        "max_new_tokens": budget,
        "do_sample": settings["temperature"] > 0,
        "eos_token_id": ends or None,
        # Nothing is ever padded here; without a value transformers warns at every call.
        "pad_token_id": ends[0] if ends else 0,
    }
    if fields["do_sample"]:
        fields["temperature"] = settings["temperature"]
        fields["top_k"] = settings["top_k"] or 0  # 0 and 1.0 mean off; the defaults do not
        fields["top_p"] = settings["top_p"] or 1.0
    devices = [model.device] if model.device.type == "cuda" else []
    training = model.training
    model.eval()  # routers add noise in training mode
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(settings["seed"])
            out = model.generate(
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                generation_config=GenerationConfig.from_dict(fields),
                streamer=writer,
                logits_processor=[_refuse_nan],
            )
    finally:
        model.train(training)
    new_ids: list[int] = out[0, ids_1T.shape[1] :].tolist()
    return new_ids


def _refuse_nan(ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
    """A step of generation: pass the logits on. Raises UserError when one is NaN."""
    if bool(logits_BV.isnan().any()):
        raise UserError(
            "the model's output is NaN: its weights hold NaN, or overflow in this number format. "
            "Try --dtype float32; if it stays, repair or replace the checkpoint."
        )
    return logits_BV


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every id that ends a text, by the generation config (a list in chat models) or tokenizer."""
    found: set[int] = set()
    for source in (model.generation_config, tokenizer):
        value: int | Iterable[int] | None = getattr(source, "eos_token_id", None)
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return found


class _Writer:
    """Turns ids into text as they come: a piece is given out once later ids cannot change it.

    Implements the `put` and `end` of transformers' streamers. Each new id is decoded together with
    the few before it, because its text may depend on them (a space, the bytes of one character);
    text that ends in an unfinished character is held back.
    """

    LOOK_BACK = 8

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stream: Callable[[str], None] | None
    ) -> None:
        self.tokenizer = tokenizer
        self.text = ""
        self._stream = stream
        self._ids: list[int] | None = None
        self._from = 0  # decode from here
        self._done = 0  # ids before this are given out

    def put(self, value: torch.Tensor) -> None:
        ids = value.flatten().tolist()
        if self._ids is None:  # transformers hands over the prompt first
            self._ids = ids
            self._done = len(ids)
            self._from = max(0, len(ids) - self.LOOK_BACK)
            return
        self._ids.extend(ids)
        self._give(final=False)

    def end(self) -> None:
        pass

    def finish(self) -> None:
        self._give(final=True)

    def _give(self, *, final: bool) -> None:
        ids = self._ids or []
        known = self._decode(ids[self._from : self._done])
        text = self._decode(ids[self._from :])
        # U+FFFD at the end: bytes of a character whose rest has not come yet.
        if len(text) <= len(known) or (text.endswith("\N{REPLACEMENT CHARACTER}") and not final):
            return
        piece = text[len(known) :]
        self._from, self._done = self._done, len(ids)
        self.text += piece
        if self._stream is not None:
            self._stream(piece)

    def _decode(self, ids: list[int]) -> str:
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
