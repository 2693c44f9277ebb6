"""Run a model over text and keep how it routed: `moesaic.record`, `moesaic route record`.

Batches run one after the other; what the routers chose is packed where it was made, copied to the
host beside the next forward pass and appended to a `Trace`. After a kill the same call goes on
where the trace ends, with the same batches, and gives the same files bit for bit.

Notation: rows = tokens that count, L recorded layers, K places for chosen experts, E experts.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from moesaic.core.console import note, progress
from moesaic.core.errors import UserError, check_seed
from moesaic.core.files import check_folder
from moesaic.core.lineage import write_lineage
from moesaic.data.sources import Data, open_domains
from moesaic.models.anatomy import anatomy
from moesaic.models.tokenizer import load_tokenizer
from moesaic.routing.blocks import Sample, delimiters
from moesaic.routing.feed import Feed, Side, feed_for, padded
from moesaic.routing.reader import Text, ahead
from moesaic.routing.recording import Recording, Routes, recording
from moesaic.routing.sites import Choice
from moesaic.routing.trace import ENCODER, FILE_NAME, Shape, Trace, TraceWriter, read_facts

COMMIT_SECONDS = 5.0
"""Time after which rows are made to count: what a kill can cost."""
TOKENS_AT_ONCE = 8192
"""Size of a batch unless one is given."""
_WHOLE_BATCH = ("openmoe", "nllb-moe")
"""Families whose capacity is shared by everything in a batch: their samples run one by one."""
_IN_FLIGHT = 2
_LOGITS_AT_ONCE = 1 << 26

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


def record(
    model: str | Path | PreTrainedModel,
    *,
    data: Data,
    tokens: int,
    out: str | Path,
    tokenizer: Any = None,
    sample_length: int = 512,
    batch: int | None = None,
    seed: int | None = None,
    logits: bool = False,
    predictions: bool = True,
    language: str | None = None,
    device: Device = "auto",
    dtype: DType = "auto",
    **load: Any,
) -> Trace:
    """Record how `model` routes `tokens` tokens of `data`, the same number of each domain.

    Text is cut into samples of `sample_length` (see `blocks`), its documents in their order or
    shuffled with `seed`, and every sample is read from its beginning by one forward pass. A domain
    that holds less gives all it has. An unfinished trace in `out` that was made by the same call
    is continued; a finished one is returned as it is.

    `model` is a path, hub id or alias, loaded with `moesaic.load` and the keywords `load` (on GPUs,
    by default, if there are any), or a model, which stays where it is. `tokenizer` is its
    tokenizer, or where one lies; by default the one beside the model. `batch` samples run at once;
    by default about 8,192 tokens, and one sample for families whose expert capacity is shared by a
    batch. `logits` also keeps the router logits, float16 [rows, L, E]; `predictions` the most
    likely next token and the loss of every row. `language` is NLLB's code of the language of the
    text, such as eng_Latn.

    Raises:
        UserError: a dense model, no tokenizer, no text, samples longer than the model's context,
            numbers out of range, or a directory that holds something else.
    """
    _check(tokens, sample_length, batch, seed)
    directory = check_folder(out).absolute()
    _check_directory(directory)
    domains = open_domains(data)
    name = str(getattr(model, "name_or_path", "") if isinstance(model, PreTrainedModel) else model)
    if name and Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser().resolve())
    loaded, tokenizer = open_model(model, tokenizer, name, device, dtype, load)
    if language is not None:
        if loaded.config.model_type != "nllb-moe":
            raise UserError(
                f"language={language} is for NLLB; {type(loaded).__name__} has no language codes. "
                "Leave it out."
            )
        tokenizer.src_lang = language
    _check_length(loaded, tokenizer, sample_length)
    if batch is None:
        together = loaded.config.model_type not in _WHOLE_BATCH
        batch = max(1, TOKENS_AT_ONCE // sample_length) if together else 1
    feed = feed_for(loaded, tokenizer)
    settings = {
        "model": name,
        "architecture": type(loaded).__name__,
        "parameters": loaded.num_parameters(),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "data": {domain: source.fingerprint() for domain, source in domains.items()},
        "tokens": tokens,
        "sample_length": sample_length,
        "batch": batch,
        "seed": seed,
        "language": language,
    }
    facts = {
        "model": name,
        "architecture": settings["architecture"],
        "model_type": loaded.config.model_type,
        "domains": list(domains),
        "sample_length": sample_length,
        "vocab_size": loaded.config.get_text_config().vocab_size,
        "settings": settings,
    }
    with contextlib.suppress(UserError):  # what cannot be described can still be recorded
        facts["anatomy"] = anatomy(loaded).to_dict()
    around = delimiters(tokenizer, language_code=loaded.config.model_type == "nllb-moe")
    text = Text(domains, tokenizer, around, tokens=tokens, length=sample_length, seed=seed)
    next(text.samples())  # faults of the data come before any output
    training = loaded.training
    loaded.eval()  # routers add noise in training mode
    try:
        # on a CPU the model itself leaves no processor to another process
        apart = _input_device(loaded).type != "cpu"
        with ahead(text, skip=_samples_in(directory), apart=apart) as stream:
            run = _Run(loaded, feed, directory, facts, predictions=predictions, logits=logits)
            if run.complete:
                note(f"{directory} holds this trace already.")
                return Trace(directory)
            run.go(stream, tokens=tokens, batch=batch)
    finally:
        loaded.train(training)
    parent = name or None
    write_lineage(directory, step="route record", parent=parent, config=settings, seed=seed)
    return Trace(directory)


def _check(tokens: int, sample_length: int, batch: int | None, seed: int | None) -> None:
    if seed is not None:
        check_seed(seed)
    for name, value, least in (
        ("tokens", tokens, 1),
        ("sample_length", sample_length, 2),
        ("batch", batch, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{name}={value}: give at least {least}.")


def _check_directory(directory: Path) -> None:
    if directory.is_dir() and any(directory.iterdir()) and not (directory / FILE_NAME).is_file():
        raise UserError(f"{directory} is not empty and holds no trace. Choose another -o.")


def open_model(
    model: str | Path | PreTrainedModel,
    tokenizer: Any,
    name: str,
    device: Device,
    dtype: DType,
    load: dict[str, Any],
) -> tuple[Any, Any]:
    if tokenizer is None:
        if not name:
            raise UserError("no tokenizer was given with the loaded model. Pass tokenizer=DIR.")
        tokenizer = name
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(_directory(tokenizer))
    if isinstance(model, PreTrainedModel):
        return model, tokenizer
    from moesaic.models.load import load as load_model

    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if place == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA GPU here. Use device=cpu.")
    # a device_map.json beside the model counts as long as no device is asked for
    load.setdefault("device_map", "auto" if device == "auto" else place)
    # bfloat16 products on a CPU are slow and coarse; a checkpoint's own type is meant for GPUs.
    chosen = ("float32" if place == "cpu" else "auto") if dtype == "auto" else dtype
    return load_model(model, dtype=chosen, **load), tokenizer


def _directory(name: str | Path) -> str | Path:
    """Return where an alias of the catalog lies; other names as they are."""
    from moesaic.models.catalog import find

    if Path(name).expanduser().is_dir():
        return name
    source = find(name)
    return source.directory or source.location


def _check_length(model: Any, tokenizer: Any, length: int) -> None:
    limits = [getattr(tokenizer, "model_max_length", None)]
    if not model.config.is_encoder_decoder:
        limits.append(getattr(model.config.get_text_config(), "max_position_embeddings", None))
    known = [limit for limit in limits if limit]
    if known and length > min(known):
        raise UserError(
            f"sample_length={length}, but the model reads {min(known)} tokens at most. Lower it."
        )


@dataclass(eq=False)
class _Batch:
    """A batch whose results are on their way to the host."""

    samples: list[Sample]
    sides: dict[str, Side]
    arrays: dict[str, dict[str, torch.Tensor]]
    arrived: list[Any]
    """CUDA events."""


class _Run:
    """One recording: the model, its feed and the trace that is written."""

    def __init__(
        self,
        model: Any,
        feed: Feed,
        directory: Path,
        facts: Mapping[str, Any],
        *,
        predictions: bool,
        logits: bool,
    ) -> None:
        self.model, self.feed, self.directory, self.facts = model, feed, directory, facts
        self.predictions, self.logits = predictions, logits
        self.device = _input_device(model)
        self.accepted = inspect.signature(type(model).forward).parameters
        self.writers: dict[str, TraceWriter] = {}
        self.shapes = self._measure()
        self._open_writers()

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to do."""
        return self.writers["decoder"].complete

    def go(self, stream: Iterator[Sample], *, tokens: int, batch: int) -> None:
        """Run the samples of `stream`, which the trace does not hold yet."""
        waiting: deque[_Batch] = deque()
        committed = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            bar = stack.enter_context(progress("recording", tokens - self.read))
            stack.enter_context(torch.no_grad())
            rec = stack.enter_context(recording(self.model, logits=self.logits))
            while taken := list(itertools.islice(stream, batch)):
                waiting.append(self._forward(taken, rec))
                while len(waiting) >= _IN_FLIGHT:
                    bar.advance(self._append(waiting.popleft()))
                if time.monotonic() - committed > COMMIT_SECONDS:
                    self._commit()
                    committed = time.monotonic()
            while waiting:
                bar.advance(self._append(waiting.popleft()))
            self._finish(tokens)

    # ------------------------------------------------------------------ the model

    def _measure(self) -> dict[str, Shape]:
        """Find the layers and their sizes from a pass over two tokens."""
        ids = np.zeros(2, np.int64)
        with torch.no_grad(), recording(self.model) as rec:
            output = self._call(self.feed.sides([Sample(0, ids, ids)]))
            if self.predictions and getattr(output, "logits", None) is None:
                note(f"{type(self.model).__name__} predicts no tokens: no predictions are kept.")
                self.predictions = False
            found = {"decoder": rec.drain(), "encoder": rec.encoder.drain()}
        if not found["decoder"]:
            raise UserError(f"{type(self.model).__name__} has no routed feed-forward layer.")
        return {stack: self._shape(stack, choices) for stack, choices in found.items() if choices}

    def _shape(self, stack: str, choices: Mapping[int, Choice]) -> Shape:
        experts = [0 if c.logits is None else c.logits.shape[-1] for c in choices.values()]
        if not all(experts):
            raise UserError(
                f"{type(self.model).__name__}: how many experts there are is nowhere to be read. "
                "Please report this model."
            )
        return Shape(
            layers=tuple(choices),
            num_experts=tuple(experts),
            top_k=tuple(choice.ids.shape[1] for choice in choices.values()),
            predictions=self.predictions and stack == "decoder",
            logits=self.logits,
        )

    def _call(self, sides: Mapping[str, Side]) -> Any:
        """Run the model on a batch; no mask where nothing is padded."""
        arguments: dict[str, Any] = {"use_cache": False}
        if not self.predictions and "logits_to_keep" in self.accepted:
            arguments["logits_to_keep"] = 1
        names = {"decoder": ("input_ids", "attention_mask")}
        if "encoder" in sides:
            names = {
                "encoder": ("input_ids", "attention_mask"),
                "decoder": ("decoder_input_ids", "decoder_attention_mask"),
            }
        for stack, (ids_name, mask_name) in names.items():
            side = sides[stack]
            arguments[ids_name] = self._sent(padded(side.ids, self.feed.pad))
            if len(set(side.lengths)) > 1:
                ones = [np.ones(length, np.int64) for length in side.lengths]
                arguments[mask_name] = self._sent(padded(ones, 0))
        return self.model(**arguments)

    def _forward(self, taken: list[Sample], rec: Recording) -> _Batch:
        sides = self.feed.sides(taken)
        output = self._call(sides)
        routes: dict[str, Routes] = {"decoder": rec, "encoder": rec.encoder}
        packed: dict[str, dict[str, torch.Tensor]] = {}
        for stack, shape in self.shapes.items():
            packed[stack] = _packed(routes[stack].drain(), shape)
            if shape.predictions:
                targets = self._sent(padded(sides[stack].targets, -100))
                packed[stack] |= _predictions(output.logits, targets)
            keep = self._kept(sides[stack].lengths)
            if keep is not None:
                packed[stack] = {
                    name: array.index_select(0, keep.to(array.device, non_blocking=True))
                    for name, array in packed[stack].items()
                }
        arrays, arrived = _to_host(packed)
        return _Batch(taken, sides, arrays, arrived)

    def _kept(self, lengths: list[int]) -> torch.Tensor | None:
        """Rows that are not padding; None for all."""
        longest = max(lengths)
        if min(lengths) == longest:
            return None
        return torch.cat(
            [torch.arange(length) + index * longest for index, length in enumerate(lengths)]
        )

    def _sent(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    # ------------------------------------------------------------------ the trace

    def _open_writers(self) -> None:
        """Open the decoder's trace and, as far as the decoder's goes, the encoder's."""
        found = {"samples": 0, "read": 0, "encoder_rows": 0}
        if (self.directory / FILE_NAME).is_file():
            found |= read_facts(self.directory)
        self.read = int(found["read"])
        self.done = _samples_in(self.directory)
        self.writers["decoder"] = TraceWriter(
            self.directory, self.shapes["decoder"], {**_how_far(found), **self.facts}
        )
        if "encoder" in self.shapes and not self.complete:
            self.writers["encoder"] = TraceWriter(
                self.directory / ENCODER,
                self.shapes["encoder"],
                self.facts,
                rows=int(found["encoder_rows"]),
            )

    def _append(self, batch: _Batch) -> int:
        """Take a batch into the files; return how many tokens it read."""
        for event in batch.arrived:
            event.synchronize()
        domain = [sample.domain for sample in batch.samples]
        for stack, writer in self.writers.items():
            side = batch.sides[stack]
            lengths = side.lengths
            arrays = {name: array.numpy() for name, array in batch.arrays[stack].items()}
            if writer.shape.experts_dtype.itemsize > 1:
                arrays["experts"] = arrays["experts"].view(np.uint16)  # -1 is the largest value
            arrays["token_ids"] = np.concatenate(side.ids)
            arrays["document"] = np.concatenate(side.document)
            arrays["position"] = np.concatenate([np.arange(length) for length in lengths])
            arrays["domain"] = np.repeat(domain, lengths)
            writer.append(arrays)
        self.done += len(batch.samples)
        tokens = sum(map(len, batch.samples))
        self.read += tokens
        return tokens

    def _commit(self, *, final: bool = False) -> None:
        """Encoder first: the decoder's trace.json says how far both go."""
        facts: dict[str, Any] = {"samples": self.done, "read": self.read}
        if "encoder" in self.writers:
            encoder = self.writers["encoder"]
            encoder.finish() if final else encoder.commit()
            facts["encoder_rows"] = encoder.rows
        decoder = self.writers["decoder"]
        decoder.finish(**facts) if final else decoder.commit(**facts)

    def _finish(self, tokens: int) -> None:
        if self.read < tokens:
            note(f"the data holds {self.read:,} tokens of the {tokens:,} asked for: all are taken.")
        self._commit(final=True)

    def _close(self) -> None:
        for writer in self.writers.values():
            writer.close()


def _input_device(model: Any) -> torch.device:
    """Where token ids go; weights that accelerate keeps elsewhere are on no device (meta)."""
    device: torch.device = model.get_input_embeddings().weight.device
    if device.type != "meta":
        return device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _samples_in(directory: Path) -> int:
    """Return how many samples the trace there holds; 0 where there is none."""
    return int(read_facts(directory).get("samples", 0)) if (directory / FILE_NAME).is_file() else 0


def _how_far(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return how far an unfinished trace goes."""
    return {name: found[name] for name in ("samples", "read", "encoder_rows")}


def _packed(choices: Mapping[int, Choice], shape: Shape) -> dict[str, torch.Tensor]:
    """Put the layers together: experts [rows, L, K], weights and perhaps logits, as on disk.

    -1 becomes the largest value of the unsigned type: two's complement.
    """
    kind = torch.uint8 if shape.experts_dtype.itemsize == 1 else torch.int16
    per_layer = [choices[layer] for layer in shape.layers]
    device = per_layer[-1].ids.device

    def stacked(parts: list[torch.Tensor], width: int, fill: float) -> torch.Tensor:
        parts = [
            part
            if part.shape[1] == width
            else functional.pad(part, (0, width - part.shape[1]), value=fill)
            for part in parts
        ]
        return torch.stack([part.to(device, non_blocking=True) for part in parts], dim=1)

    packed = {
        "experts": stacked([c.ids for c in per_layer], shape.width, -1).to(kind),
        "weights": stacked([c.weights for c in per_layer], shape.width, 0).half(),
    }
    if shape.logits:
        found = [c.logits for c in per_layer if c.logits is not None]
        packed["logits"] = stacked(found, max(shape.num_experts), -torch.inf).half()
    return packed


def _predictions(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the most likely token and the loss of every row; a few rows at a time, in float32."""
    logits_RV = logits_BTV.flatten(0, 1)
    targets_R = targets_BT.to(logits_RV.device).flatten()
    rows = max(1, _LOGITS_AT_ONCE // logits_RV.shape[1])
    loss_R = torch.cat(
        [
            functional.cross_entropy(logits.float(), targets, reduction="none")
            for logits, targets in zip(logits_RV.split(rows), targets_R.split(rows), strict=True)
        ]
    ).masked_fill_(targets_R < 0, torch.nan)
    return {"predicted": logits_RV.argmax(dim=-1).to(torch.int32), "loss": loss_R}


def _to_host(
    packed: Mapping[str, Mapping[str, torch.Tensor]],
) -> tuple[dict[str, dict[str, torch.Tensor]], list[Any]]:
    """Start copying to the host, beside whatever the device does next; events say when it is done.

    Pinned memory and a stream of its own: the next forward pass is not held up.
    """
    arrays: dict[str, dict[str, torch.Tensor]] = {}
    events: dict[torch.device, Any] = {}
    for stack, tensors in packed.items():
        arrays[stack] = {}
        for name, tensor in tensors.items():
            if tensor.device.type != "cuda":
                arrays[stack][name] = tensor.cpu()
                continue
            side = _side_stream(tensor.device)
            if tensor.device not in events:
                side.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(side):
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                events[tensor.device] = side.record_event()
            tensor.record_stream(side)
            arrays[stack][name] = host
    return arrays, list(events.values())


_STREAMS: dict[torch.device, Any] = {}


def _side_stream(device: torch.device) -> Any:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
