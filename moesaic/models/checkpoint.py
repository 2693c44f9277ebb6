"""Hugging Face model directories, tensor by tensor: read without loading, write without collecting.

`Checkpoint` opens a directory (safetensors or old .bin, one file or sharded) and hands out one
tensor at a time, mapped from the file, so that a 60 GB model can be looked at on a laptop.
`CheckpointWriter` (in `writer`) is its counterpart.
"""

from __future__ import annotations

import json
import math
import mmap
import pickle
import shutil
import struct
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from moesaic.core.errors import MoesaicError, UserError
from moesaic.models.direct import Arena, Bytes, DirectReader
from moesaic.models.writer import DTYPES, CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "copy_companions"]

# Without it Linux refuses a private mapping larger than RAM; Python before 3.13 does not name it.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_MAX_HEADER = 100_000_000
_COMPANIONS = (
    "generation_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.json",
    "chat_template.jinja",
)


class Checkpoint:
    """A model directory, read tensor by tensor.

    Attributes:
        path: the directory, absolute.
        config: `config.json` as a dict.
        files: the weight files, in order.
        parameters: number of weights; a tied output matrix counts once, rotary tables do not count.

    Raises:
        UserError: the directory, `config.json` or a shard is missing; a file is truncated or no
            checkpoint (its path is named); a .bin holds anything but tensors (it is read with
            ``weights_only=True``).
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser().absolute()
        if not self.path.exists():
            raise UserError(
                f"{path} does not exist. Give the directory of a Hugging Face checkpoint."
            )
        if not self.path.is_dir():
            raise UserError(
                f"{path} is a file. Give the directory that holds config.json and the weights."
            )
        self.config: dict[str, Any] = read_json(
            self.path / "config.json", cure="Is this a Hugging Face checkpoint?"
        )
        self._where: dict[str, _WeightFile] = {}
        opened = {name: _open_weights(self.path / name) for name in _weight_names(self.path)}
        index = _read_index(self.path, set(opened))
        for name, file in opened.items():
            for key in file.names():
                if index is None or index.get(key, name) == name:
                    self._where[key] = file
        missing = sorted(set(index or ()) - set(self._where))
        if missing:
            raise UserError(
                f"{self.path}: the index lists {missing[0]} (and {len(missing) - 1} more), but its "
                "shard does not hold it. Download the checkpoint again."
            )
        self.files = [self.path / name for name in opened]

    def keys(self) -> list[str]:
        """Return the tensor names, sorted."""
        return sorted(self._where)

    def __contains__(self, key: object) -> bool:
        return key in self._where

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of one tensor without reading it."""
        return self._file(key).shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """Return the type of one tensor without reading it."""
        return self._file(key).dtype(key)

    def nbytes(self, key: str) -> int:
        """Return the size of one tensor in bytes."""
        return math.prod(self.shape(key)) * self.dtype(key).itemsize

    def read(self, key: str) -> torch.Tensor:
        """Return one tensor, backed by the mapped file: clone it before changing it in place."""
        return self._file(key).read(key)

    def fetch(self, keys: Sequence[str], arena: Arena) -> dict[str, torch.Tensor]:
        """Read tensors from disk into `arena`, past the page cache; its next use ends their life.

        For passing over a large model once: no memory is used but the arena's. Tensors of a .bin
        are mapped as by `read`.
        """
        rooms = [DirectReader.room(self.nbytes(key)) for key in keys]
        memory = arena.reserve(sum(rooms))
        found: dict[str, torch.Tensor] = {}
        start = 0
        for key, room in zip(keys, rooms, strict=True):
            found[key] = self._file(key).fetch(key, memory[start : start + room])
            start += room
        return found

    def release(self, keys: Iterable[str]) -> None:
        """Let go of the pages that `read` mapped; reading again reads the file again."""
        for key in keys:
            self._file(key).release(key)

    @property
    def parameters(self) -> int:
        """Number of weights; a tied output matrix counts once, rotary tables do not count."""
        skip = (
            {"lm_head.weight"}
            if self.config.get("tie_word_embeddings") and len(self._where) > 1
            else set()
        )
        counted = (
            key
            for key in self._where
            if key not in skip and not key.endswith("rotary_emb.inv_freq")
        )
        return sum(math.prod(self.shape(key)) for key in counted)

    def _file(self, key: str) -> _WeightFile:
        if key not in self._where:
            raise UserError(
                f"{self.path} has no tensor {key}. It holds {len(self._where)}, such as "
                f"{self.keys()[0]}."
            )
        return self._where[key]


def irregular_experts(checkpoint: Checkpoint) -> str:
    """Say which experts' tensors are missing or of another shape than their like, if any.

    Experts are numbered by the last number of a tensor's name; those of one layer are alike.
    """
    kinds: dict[str, dict[str, dict[int, str]]] = {}  # layer -> name with * -> number -> key
    for key in checkpoint.keys():  # noqa: SIM118 - a Checkpoint is no dict
        parts = key.split(".")
        if "experts" not in parts or not any(part.isdigit() for part in parts):
            continue
        at = max(place for place, part in enumerate(parts) if part.isdigit())
        start = parts.index("experts")
        if at > start:
            name = ".".join((*parts[:at], "*", *parts[at + 1 :]))
            kinds.setdefault(".".join(parts[:start]), {}).setdefault(name, {})[int(parts[at])] = key
    missing, odd = [], []
    for names in kinds.values():
        numbers = set().union(*names.values())
        for name, keys in names.items():
            missing += [name.replace("*", str(n)) for n in sorted(numbers - set(keys))]
            shapes = Counter(checkpoint.shape(key) for key in keys.values())
            usual = shapes.most_common(1)[0][0]
            odd += [
                f"{key} {list(checkpoint.shape(key))} where others have {list(usual)}"
                for key in keys.values()
                if checkpoint.shape(key) != usual
            ]
    told = [
        f"{len(found)} {what} ({', '.join(found[:20])})"
        for found, what in ((missing, "missing"), (odd, "of another shape"))
        if found
    ]
    return "; ".join(told)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, generation config, chat template and licence; return their names."""
    copied = []
    for file in sorted(source.iterdir()):
        wanted = file.name in _COMPANIONS or file.name.startswith(
            ("tokenizer", "LICENSE", "NOTICE")
        )
        if file.is_file() and wanted:
            shutil.copyfile(file, target / file.name)
            copied.append(file.name)
    return copied


class _Safetensors:
    """One safetensors file: the header parsed, the body mapped on first use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self._reader: DirectReader | None = None
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if len(start) < 8 or length > size - 8:
                raise _damaged(path, "is truncated or no safetensors file")
            if length > _MAX_HEADER:
                raise _damaged(path, "is no safetensors file")
            try:
                header = json.loads(file.read(length))
                header.pop("__metadata__", None)
                self._entries: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {
                    key: (DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"])
                    for key, entry in header.items()
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise _damaged(
                    path, f"has a header that cannot be read ({type(error).__name__}: {error})"
                ) from error
        self._base = 8 + length
        for key, (dtype, shape, begin, end) in self._entries.items():
            if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
                raise _damaged(path, f"gives {key} a size that does not match its shape")
        needed = self._base + max((end for *_, end in self._entries.values()), default=0)
        if size < needed:
            raise _damaged(path, f"is truncated: {size} bytes, its header needs {needed}")

    def names(self) -> Iterable[str]:
        return self._entries

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entries[key][1]

    def dtype(self, key: str) -> torch.dtype:
        return self._entries[key][0]

    def read(self, key: str) -> torch.Tensor:
        dtype, shape, begin, end = self._entries[key]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        raw = torch.frombuffer(
            self._mapped(), dtype=torch.uint8, count=end - begin, offset=self._base + begin
        )
        if (self._base + begin) % dtype.itemsize:
            raw = (
                raw.clone()
            )  # an old file with a header of odd length: torch needs aligned storage
        return raw.view(dtype).reshape(shape)

    def fetch(self, key: str, into: Bytes) -> torch.Tensor:
        dtype, shape, begin, end = self._entries[key]
        if self._reader is None:
            self._reader = DirectReader(self.path)
        try:
            raw = torch.from_numpy(self._reader.read(self._base + begin, end - begin, into))
        except OSError as error:
            raise MoesaicError(f"{self.path} could not be read: {error.strerror}.") from error
        if (self._base + begin) % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).reshape(shape)

    def release(self, key: str) -> None:
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            *_, begin, end = self._entries[key]
            start = (self._base + begin) // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, self._base + end - start)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            # Private and writable: torch takes it without a warning; nothing reaches the file.
            with self.path.open("rb") as file:
                self._map = mmap.mmap(
                    file.fileno(),
                    0,
                    flags=mmap.MAP_PRIVATE | _NORESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
        return self._map


class _Pickled:
    """One .bin file of torch.save: zip files are mapped, the older format is read whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols; what matters is an error
                loaded = torch.load(
                    path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
                )
        except pickle.UnpicklingError as error:
            if path.stat().st_size == 0 or "persistent" in str(error) or "truncated" in str(error):
                raise _damaged(path, "is truncated or no checkpoint") from error
            raise UserError(
                f"{path} is a pickle of something other than plain tensors, so it is not opened: "
                "it could run code. Convert it to safetensors where you trust it."
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # damaged pickles raise almost anything
            raise _damaged(path, "is truncated or no checkpoint") from error
        if not isinstance(loaded, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor)
            for name, tensor in loaded.items()
        ):
            raise UserError(
                f"{path} holds something other than a dict of plain tensors. "
                "Save the state dict alone."
            )
        self._tensors: dict[str, torch.Tensor] = loaded

    def names(self) -> Iterable[str]:
        return self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def read(self, key: str) -> torch.Tensor:
        return self._tensors[key].detach()

    def fetch(self, key: str, into: Bytes) -> torch.Tensor:
        del into
        return self.read(key)

    def release(self, key: str) -> None:
        del key  # torch has mapped the file; the system drops the pages when it needs room


_WeightFile = _Safetensors | _Pickled


def _open_weights(path: Path) -> _WeightFile:
    if not path.is_file():
        raise UserError(f"{path} is missing: the index names it. Download the checkpoint again.")
    return _Safetensors(path) if path.suffix == ".safetensors" else _Pickled(path)


def _weight_names(directory: Path) -> list[str]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (directory / f"{stem}.index.json").is_file():
            index = read_json(
                directory / f"{stem}.index.json", cure="Download the checkpoint again."
            )
            names = index.get("weight_map")
            if not isinstance(names, dict) or not names:
                raise _damaged(directory / f"{stem}.index.json", "holds no weight_map")
            return sorted(set(names.values()))
        if (directory / stem).is_file():
            return [stem]
    shards = sorted(p.name for p in directory.glob("model-*-of-*.safetensors"))
    if shards:
        raise UserError(
            f"{directory / 'model.safetensors.index.json'} is missing beside {shards[0]}. "
            "Download it again."
        )
    raise UserError(
        f"{directory} holds no model.safetensors and no pytorch_model.bin. "
        "Is this a Hugging Face checkpoint?"
    )


def _read_index(directory: Path, opened: set[str]) -> dict[str, str] | None:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        file = directory / f"{stem}.index.json"
        if file.is_file() and opened != {stem}:
            weight_map: dict[str, str] = read_json(file, cure="Download it again.").get(
                "weight_map", {}
            )
            return weight_map
    return None


def read_json(path: Path, *, cure: str) -> dict[str, Any]:
    """Read a JSON object. Raises UserError for a missing file and for anything else in it."""
    if not path.is_file():
        raise UserError(f"{path} is missing. {cure}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object. {cure}")
    return content


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}. Download it again.")
