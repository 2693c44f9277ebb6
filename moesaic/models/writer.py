"""Write a checkpoint's tensors straight into safetensors shards, collecting nothing.

The names, types and shapes are known first; from them come the headers, and from then on every
tensor has its place in a file and is written there, in any order and from any thread.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch

from moesaic.core.errors import MoesaicError
from moesaic.models.direct import BLOCK, DirectWriter

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


class _Place(NamedTuple):
    shard: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class CheckpointWriter:
    """Write a checkpoint's tensors into safetensors shards, in any order, keeping none of them.

    Args:
        directory: an existing directory, usually the partial one of `core.files.output_directory`.
        plan: (name, dtype, shape) of every tensor that will be written.
        max_shard_bytes: a new shard starts where the next tensor would pass this size.

    A shard is on disk when its last tensor was written. Use as a context manager: leaving it
    without an error checks that every planned tensor was written. Raises MoesaicError when the
    disk is full.
    """

    def __init__(
        self,
        directory: Path,
        plan: Sequence[Planned],
        *,
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        self.directory = Path(directory)
        self._places: dict[str, _Place] = {}
        self._files: dict[int, DirectWriter] = {}
        self._left: dict[int, set[str]] = {}
        self._missing = {name for name, _, _ in plan}
        if len(self._missing) != len(plan):
            raise ValueError("a tensor name is planned twice")
        shards = _divide(plan, max_shard_bytes)
        self.total_bytes = sum(_size(item) for item in plan)
        free = shutil.disk_usage(self.directory).free
        if self.total_bytes > free:
            raise MoesaicError(
                f"No space left: {self.directory.parent} has {free / 1e6:,.1f} MB free, the "
                f"checkpoint needs {self.total_bytes / 1e6:,.1f} MB. Free some space or write "
                "elsewhere."
            )
        self._lock = threading.Lock()
        weight_map: dict[str, str] = {}
        try:
            for number, shard in enumerate(shards):
                name = _shard_name(number, len(shards))
                self._start_shard(number, name, shard)
                weight_map.update({tensor: name for tensor, _, _ in shard})
            if len(shards) > 1:
                parameters = sum(math.prod(shape) for _, _, shape in plan)
                metadata = {"total_size": self.total_bytes, "total_parameters": parameters}
                index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
                text = json.dumps(index, indent=2) + "\n"
                (self.directory / "model.safetensors.index.json").write_text(text)
        except OSError as error:
            self._close_files()
            raise _failed(error, self.directory) from error

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one planned tensor. Thread-safe. Raises MoesaicError when the disk refuses."""
        place = self._places[name]
        if tuple(tensor.shape) != place.shape or tensor.dtype != place.dtype:
            raise ValueError(
                f"{name}: planned {place.dtype} {place.shape}, got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with self._lock:
            try:
                self._files[place.shard].write(place.offset, data)
                self._missing.discard(name)
                self._left[place.shard].discard(name)
                if not self._left[place.shard]:
                    file = self._files.pop(place.shard)
                    try:
                        file.sync()
                    finally:
                        file.close()
            except OSError as error:
                raise _failed(error, self.directory) from error

    def close(self) -> None:
        """Close the files. Raises ValueError when a planned tensor was never written."""
        try:
            if self._missing:
                raise ValueError(
                    f"{len(self._missing)} planned tensors were not written, such as "
                    f"{min(self._missing)}"
                )
            for file in self._files.values():
                file.sync()
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
        positions: list[int] = []
        position = 0
        # Wide types first: then every tensor starts at a multiple of its item size.
        ordered = sorted(shard, key=lambda item: -item[1].itemsize)
        for tensor, dtype, shape in ordered:
            end = position + _size((tensor, dtype, shape))
            offsets = [position, end]
            header[tensor] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
            positions.append(position)
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        # Spaces up to a whole block: tensors whose size is one, too, then start at one.
        text += b" " * (-(len(text) + 8) % BLOCK)
        start = 8 + len(text)
        file = DirectWriter(self.directory / name, start + position)
        self._files[number] = file
        file.write(0, np.frombuffer(struct.pack("<Q", len(text)) + text, np.uint8))
        self._left[number] = {tensor for tensor, _, _ in ordered}
        for (tensor, dtype, shape), offset in zip(ordered, positions, strict=True):
            self._places[tensor] = _Place(number, start + offset, dtype, tuple(shape))

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}


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


def _failed(error: OSError, directory: Path) -> MoesaicError:
    return MoesaicError(
        f"Writing to {directory.parent} failed: {error.strerror}. "
        "Free some space or write elsewhere."
    )
