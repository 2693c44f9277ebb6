"""Write a checkpoint's tensors straight into safetensors shards, collecting nothing.

The names, types and shapes are known first; from them come the headers, and from then on every
tensor has its place in a file and is written there, in any order and from any thread.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from moesaic.core.errors import MoesaicError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Planned = tuple[str, torch.dtype, Sequence[int]]
"""Name, type and shape of a tensor that will be written."""


class CheckpointWriter:
    """Write a checkpoint's tensors into safetensors shards, in any order, keeping none of them.

    Args:
        directory: an existing directory, usually the partial one of `core.files.output_directory`.
        plan: (name, dtype, shape) of every tensor that will be written.
        max_shard_bytes: a new shard starts where the next tensor would pass this size.

    Use as a context manager: leaving it without an error checks that every planned tensor was
    written, waits for the disk and closes the files. Raises MoesaicError when the disk is full.
    """

    def __init__(
        self,
        directory: Path,
        plan: Sequence[Planned],
        *,
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        self.directory = Path(directory)
        self._places: dict[str, tuple[int, int, torch.dtype, tuple[int, ...]]] = {}
        self._descriptors: list[int] = []
        self._missing = {name for name, _, _ in plan}
        if len(self._missing) != len(plan):
            raise ValueError("a tensor name is planned twice")
        shards = _divide(plan, max_shard_bytes)
        self.total_bytes = sum(_size(item) for item in plan)
        free = shutil.disk_usage(self.directory).free
        if self.total_bytes > free:
            raise MoesaicError(
                f"No space left: {self.directory.parent} has {free / 1e9:.2f} GB free, the "
                f"checkpoint needs {self.total_bytes / 1e9:.2f} GB. Free some space or write "
                "elsewhere."
            )
        self._lock = threading.Lock()
        self._flusher = _Flusher()
        weight_map: dict[str, str] = {}
        try:
            for number, shard in enumerate(shards):
                name = _shard_name(number, len(shards))
                self._start_shard(number, name, shard)
                weight_map.update({tensor: name for tensor, _, _ in shard})
            if len(shards) > 1:
                metadata = {
                    "total_size": self.total_bytes,
                    "total_parameters": sum(math.prod(s) for _, _, s in plan),
                }
                index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
                (self.directory / "model.safetensors.index.json").write_text(
                    json.dumps(index, indent=2) + "\n"
                )
        except OSError as error:
            self._close_files()
            raise _failed(error, self.directory) from error

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one planned tensor. Thread-safe. Raises MoesaicError when the disk refuses."""
        number, offset, dtype, shape = self._places[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name}: planned {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        data = memoryview(flat)
        try:
            _write_at(self._descriptors[number], data, offset)
            self._flusher.wrote(self._descriptors[number], len(data))
        except OSError as error:
            raise _failed(error, self.directory) from error
        with self._lock:
            self._missing.discard(name)

    def close(self) -> None:
        """Wait until everything is on disk. ValueError when a planned tensor is missing."""
        try:
            if self._missing:
                raise ValueError(
                    f"{len(self._missing)} planned tensors were not written, such as "
                    f"{min(self._missing)}"
                )
            self._flusher.finish()
            for descriptor in self._descriptors:
                os.fsync(descriptor)
        except OSError as error:
            raise _failed(error, self.directory) from error
        finally:
            self._close_files()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._close_files()

    def _start_shard(self, number: int, name: str, shard: list[Planned]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        places: list[tuple[str, int, torch.dtype, tuple[int, ...]]] = []
        position = 0
        # Wide types first: then every tensor starts at a multiple of its item size.
        for tensor, dtype, shape in sorted(shard, key=lambda item: -item[1].itemsize):
            end = position + _size((tensor, dtype, shape))
            header[tensor] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            places.append((tensor, position, dtype, tuple(shape)))
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._descriptors.append(descriptor)
        _write_at(descriptor, memoryview(struct.pack("<Q", len(text)) + text), 0)
        os.ftruncate(descriptor, 8 + len(text) + position)
        for tensor, start, dtype, shape in places:
            self._places[tensor] = (number, 8 + len(text) + start, dtype, shape)

    def _close_files(self) -> None:
        self._flusher.stop()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


class _Flusher:
    """Push written data to the disk while the rest is made, so that the last sync is short."""

    STEP = 256_000_000

    def __init__(self) -> None:
        self._pending: dict[int, int] = {}
        self._stopping = False
        self._error: OSError | None = None
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None

    def wrote(self, descriptor: int, count: int) -> None:
        with self._condition:
            if self._error:
                raise self._error
            self._pending[descriptor] = self._pending.get(descriptor, 0) + count
            if self._full():
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="flush", daemon=True)
                    self._thread.start()
                self._condition.notify()

    def stop(self) -> None:
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        self.stop()
        if self._error:
            raise self._error

    def _full(self) -> bool:
        return sum(self._pending.values()) >= self.STEP

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._stopping or self._full())
                if self._stopping:
                    return
                batch, self._pending = list(self._pending), {}
            try:
                for descriptor in batch:
                    os.fsync(descriptor)
            except OSError as error:
                with self._condition:
                    self._error = error
                return


def _divide(plan: Sequence[Planned], limit: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    filled = 0
    for item in plan:
        if shards[-1] and filled + _size(item) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += _size(item)
    return shards


def _size(item: Planned) -> int:
    return math.prod(item[2]) * item[1].itemsize


def _shard_name(number: int, count: int) -> str:
    return (
        "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
    )


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(descriptor, data[: 1 << 30], offset)  # Linux writes at most 2 GiB a call
        data, offset = data[done:], offset + done


def _failed(error: OSError, directory: Path) -> MoesaicError:
    return MoesaicError(
        f"Writing to {directory.parent} failed: {error.strerror}. "
        "Free some space or write elsewhere."
    )
