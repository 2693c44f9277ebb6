"""Recorded routing on disk: raw arrays, memory-mapped, and a trace.json that says what they are.

    trace.json       format, layers, experts, dtypes, domains, settings; last of all the row count
    experts.bin      [rows, layers, K] uint8 or uint16; the largest value: no choice, or dropped
    weights.bin      [rows, layers, K] float16
    token_ids.bin    [rows] uint32
    document.bin     [rows] uint32, running number of the document in its domain
    position.bin     [rows] uint32, place in the sample: a sample begins at every 0
    domain.bin       [rows] uint16, index into `domains`
    predicted.bin    [rows] uint32, most likely next token                          (optional)
    loss.bin         [rows] float32, nats of the token that follows, NaN for none   (optional)
    logits.bin       [rows, layers, E] float16, before softmax                      (optional)

All arrays are little-endian, in C order. A row is a token. Files grow first and the row count is
written after them, so rows beyond it do not count: whoever was killed goes on from there. A
sequence-to-sequence model's encoder is a trace of its own in the folder `encoder`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from moesaic.core.errors import UserError
from moesaic.core.files import write_text

FILE_NAME = "trace.json"
ENCODER = "encoder"
_FORMAT = 1
_PER_ROW = {"token_ids": "<u4", "document": "<u4", "position": "<u4", "domain": "<u2"}
_OPTIONAL = {"predicted": "<u4", "loss": "<f4"}


@dataclass(frozen=True)
class Shape:
    """What a trace holds of each row: its layers and the sizes of their routing.

    `layers` are decoder layer indices; `num_experts` and `top_k` have one number a layer. Layers
    with a smaller top_k than the largest are filled up with "no choice".
    """

    layers: tuple[int, ...]
    num_experts: tuple[int, ...]
    top_k: tuple[int, ...]
    predictions: bool = True
    logits: bool = False

    @property
    def width(self) -> int:
        """K: places for chosen experts in every layer."""
        return max(self.top_k)

    @property
    def experts_dtype(self) -> np.dtype[Any]:
        """uint8 while 255 can mean "no choice"."""
        return np.dtype("<u1" if max(self.num_experts) <= 255 else "<u2")

    def arrays(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Return dtype and shape of one row of every file."""
        chosen = (len(self.layers), self.width)
        found: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "experts": (self.experts_dtype, chosen),
            "weights": (np.dtype("<f2"), chosen),
            **{name: (np.dtype(kind), ()) for name, kind in _PER_ROW.items()},
        }
        if self.predictions:
            found |= {name: (np.dtype(kind), ()) for name, kind in _OPTIONAL.items()}
        if self.logits:
            found["logits"] = (np.dtype("<f2"), (len(self.layers), max(self.num_experts)))
        return found


class Trace:
    """A trace directory, opened for reading; arrays are memory-mapped (see the module's docstring).

    Raises UserError when `directory` holds no trace, or files that are shorter or longer than
    trace.json says.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory).expanduser()
        facts = read_facts(self.directory)
        self.info: dict[str, Any] = facts
        """All of trace.json."""
        self.shape = shape_of(facts)
        self.rows: int = facts["rows"]
        self.complete: bool = facts["complete"]
        """False while it is being recorded, or after an interruption."""
        self.domains: tuple[str, ...] = tuple(facts["domains"])
        self.sample_length: int | None = facts.get("sample_length")
        """Longest sample; the last one of a domain may be shorter."""
        self._arrays = {
            name: self._map(name, dtype, row) for name, (dtype, row) in self.shape.arrays().items()
        }

    @property
    def experts(self) -> np.ndarray:
        """Chosen experts [rows, layers, K], highest score first; `nothing` where there is none."""
        return self._arrays["experts"]

    @property
    def weights(self) -> np.ndarray:
        """Gate weights [rows, layers, K] float16."""
        return self._arrays["weights"]

    @property
    def token_ids(self) -> np.ndarray:
        """The model's input [rows]."""
        return self._arrays["token_ids"]

    @property
    def document(self) -> np.ndarray:
        """Running number of each row's document in its domain [rows]."""
        return self._arrays["document"]

    @property
    def position(self) -> np.ndarray:
        """Place of each row in its sample [rows]."""
        return self._arrays["position"]

    @property
    def domain(self) -> np.ndarray:
        """Index into `domains` [rows]."""
        return self._arrays["domain"]

    @property
    def logits(self) -> np.ndarray | None:
        """Router logits [rows, layers, E] float16, or None."""
        return self._arrays.get("logits")

    @property
    def predicted(self) -> np.ndarray | None:
        """Most likely next token [rows], or None."""
        return self._arrays.get("predicted")

    @property
    def loss(self) -> np.ndarray | None:
        """Nats of the token that follows [rows] float32, NaN where there is none; or None."""
        return self._arrays.get("loss")

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layer index of each place on the second axis of `experts`."""
        return self.shape.layers

    @property
    def num_experts(self) -> int:
        """E, the most of any layer."""
        return max(self.shape.num_experts)

    @property
    def top_k(self) -> int:
        """K, the most of any layer."""
        return self.shape.width

    @property
    def nothing(self) -> int:
        """The value in `experts` that stands for no choice, or one dropped by capacity."""
        return nothing(self.shape.experts_dtype)

    @property
    def encoder(self) -> Trace | None:
        """The trace of a sequence-to-sequence model's encoder."""
        folder = self.directory / ENCODER
        return Trace(folder) if (folder / FILE_NAME).is_file() else None

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        state = "" if self.complete else ", incomplete"
        return (
            f"Trace({self.directory}: {self.rows} rows, {len(self.layers)} layers, "
            f"{self.top_k} of {self.num_experts} experts{state})"
        )

    def chosen(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return chosen experts of rows `start` to `stop`, int16 [rows, layers, K]; -1 for none."""
        raw = self.experts[start:stop]
        found = raw.astype(np.int16)
        found[raw == self.nothing] = -1
        return found

    def samples(self) -> np.ndarray:
        """Return the samples' borders, int64 [samples + 1]: sample i is rows b[i] to b[i + 1]."""
        starts = np.flatnonzero(self.position == 0)
        return np.append(starts, self.rows).astype(np.int64)

    def _map(self, name: str, dtype: np.dtype[Any], row: tuple[int, ...]) -> np.ndarray:
        path = self.directory / f"{name}.bin"
        wanted = self.rows * dtype.itemsize * int(np.prod(row, dtype=np.int64))
        held = path.stat().st_size if path.is_file() else -1
        if held < 0:
            raise UserError(f"{path} is missing. Record the trace again.")
        if held < wanted or (self.complete and held > wanted):
            raise UserError(
                f"{path} holds {held:,} bytes, but {self.rows:,} rows take {wanted:,}: the file "
                "was truncated or changed. Copy it again, or record the trace again."
            )
        if self.rows == 0:
            return np.empty((0, *row), dtype)
        return np.memmap(path, dtype, mode="r", shape=(self.rows, *row))


class TraceWriter:
    """Append rows to a trace; `commit` makes them count.

    Opening a directory that holds an unfinished trace goes on after its last committed row (or
    after `rows`, if that is less); what was written beyond it is cut off. A finished trace is left
    alone: `complete` is True and nothing can be appended. Raises UserError when the trace there has
    another shape or other `facts["settings"]`.
    """

    def __init__(
        self,
        directory: Path | str,
        shape: Shape,
        facts: Mapping[str, Any],
        *,
        rows: int | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.shape = shape
        self.rows = 0
        self.complete = False
        self._facts = {"format": _FORMAT, **_shape_facts(shape), **facts}
        if (self.directory / FILE_NAME).is_file():
            self._resume()
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
        if rows is not None:
            self.rows, self.complete = min(rows, self.rows), False
        self._files: dict[str, IO[bytes]] = {}
        self._pending = self.rows
        if self.complete:
            return
        for name, (dtype, row) in shape.arrays().items():
            path = self.directory / f"{name}.bin"
            size = self.rows * dtype.itemsize * int(np.prod(row, dtype=np.int64))
            file = path.open("r+b" if path.exists() else "w+b")
            file.truncate(size)
            file.seek(size)
            self._files[name] = file
        self._write_facts()

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Append rows: an array [rows, ...] for every file, of any dtype that fits."""
        rows = len(arrays["experts"])
        for name, (dtype, row) in self.shape.arrays().items():
            array = np.ascontiguousarray(arrays[name], dtype)
            if array.shape != (rows, *row):
                raise ValueError(f"{name}: {array.shape} given, {(rows, *row)} wanted")
            self._files[name].write(array.data)
        self._pending += rows

    def commit(self, **facts: Any) -> None:
        """Make everything appended so far count; `facts` go into trace.json."""
        self._facts |= facts
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.rows = self._pending
        self._write_facts()

    def finish(self, **facts: Any) -> None:
        """Commit and mark the trace complete; `facts` are added to trace.json."""
        self.complete = True
        self.commit(**facts)
        self.close()

    def close(self) -> None:
        """Close the files; what was not committed does not count."""
        for file in self._files.values():
            file.close()

    def _resume(self) -> None:
        found = read_facts(self.directory)
        for key in ("layers", "num_experts", "top_k", "predictions", "logits", "settings"):
            if found.get(key) != json.loads(json.dumps(self._facts.get(key))):
                raise UserError(
                    f"{self.directory} holds a trace made with other settings: {key} is "
                    f"{_short(found.get(key))}, and would be {_short(self._facts.get(key))}. "
                    "Give the same arguments to go on, or choose another -o."
                )
        Trace(self.directory)  # raises where a file is shorter than its rows
        self.rows, self.complete = found["rows"], found["complete"]

    def _write_facts(self) -> None:
        facts = {**self._facts, "complete": self.complete, "rows": self.rows}
        write_text(self.directory / FILE_NAME, json.dumps(facts, indent=1) + "\n")


def read_facts(directory: Path | str) -> dict[str, Any]:
    """Read trace.json. Raises UserError when it is missing, damaged or of a newer format."""
    path = Path(directory) / FILE_NAME
    if not path.is_file():
        there = "no such folder" if not path.parent.is_dir() else f"it holds no {FILE_NAME}"
        raise UserError(
            f"{directory} is no trace: {there}. Make one with `moesaic route record MODEL -o DIR`."
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] > _FORMAT:
            raise UserError(
                f"{path}: format {facts['format']} is newer than this version of moesaic reads. "
                "Upgrade moesaic."
            )
        shape_of(facts)
        _ = facts["rows"], facts["complete"], facts["domains"]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error!r}). Record the trace again.") from error
    return dict(facts)


def shape_of(facts: Mapping[str, Any]) -> Shape:
    """Read the shape from trace.json."""
    return Shape(
        layers=tuple(facts["layers"]),
        num_experts=tuple(facts["num_experts"]),
        top_k=tuple(facts["top_k"]),
        predictions=bool(facts["predictions"]),
        logits=bool(facts["logits"]),
    )


def nothing(dtype: np.dtype[Any]) -> int:
    """Return the value that stands for no choice."""
    return int(np.iinfo(dtype).max)


def _shape_facts(shape: Shape) -> dict[str, Any]:
    files = {
        name: {"dtype": dtype.str if dtype.itemsize > 1 else dtype.name, "row": list(row)}
        for name, (dtype, row) in shape.arrays().items()
    }
    sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(shape).items()}
    return {**sizes, "nothing": nothing(shape.experts_dtype), "files": files}


def _short(value: object) -> str:
    text = json.dumps(value) if isinstance(value, (Mapping, Sequence)) else str(value)
    return text if len(text) <= 200 else text[:197] + "..."
