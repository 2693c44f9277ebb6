"""Read what the original LLaMA-MoE code wrote: split labels and importance scores, one file a
layer.

Its files are pickles, which can run code when opened. The reader here knows numbers, lists, numpy
arrays and torch tensors; a file that asks for anything else is refused before anything is run.
torch's own `weights_only` reader does not know the pickle protocol that these files use.
"""

from __future__ import annotations

import collections
import io
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moesaic.construct.split import NeuronSplit
from moesaic.core.errors import UserError

__all__ = ["import_split", "read_plain", "read_score_folders"]

TEMPLATES = ("layers.{}.mlp.up_proj.weight", "layers.{}.mlp.gate_proj.weight")
_MAGIC = 0x1950A86A20F9469CFC6C  # opens a file of torch before 1.6
_TORCH_TYPES = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


def import_split(
    folder: Path, *, layers: int, width: int, template: str = "auto", shared: int = 0
) -> NeuronSplit:
    """Read the split of a model with `layers` layers of `width` neurons.

    `template` names a layer's file, `{}` standing for its number; "auto" takes the original's
    names. A file holds either an expert number per neuron, or a list of neurons per expert, of
    which the first `shared` are the experts that are always on.

    Raises UserError when files are missing, are not plain lists, arrays or tensors, or do not fit.
    """
    template = _template(folder) if template == "auto" else template
    if template.count("{}") != 1:
        raise UserError(
            f"template={template!r} was given, but a file's name needs its layer. "
            f"Write {{}} where the layer's number is, as in {TEMPLATES[0]}."
        )
    routed, always = [], []
    for layer in range(layers):
        file = folder / template.format(layer)
        groups = _groups(read_plain(file), file, width, shared)
        routed.append(groups[shared:])
        always.append(groups[:shared])
    return NeuronSplit(routed, always, width, {"imported_from": str(folder), "template": template})


def read_score_folders(folder: Path, *, layers: int, hook: str) -> NDArray[np.float32]:
    """Read importance scores with one sub-folder per cluster of text: [L, clusters, F].

    Sub-folders are taken in the order of their numbers (the original sorts 10 before 2). Raises
    UserError when files are missing or of different lengths.
    """
    clusters = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    clusters.sort(key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)] or [-1])
    if not clusters:
        raise UserError(
            f"{folder} holds neither scores.safetensors nor one folder of scores per cluster. "
            "Give one of these."
        )
    rows: list[list[NDArray[np.float32]]] = []
    for layer in range(layers):
        row = []
        for cluster in clusters:
            found = sorted(cluster.glob(f"layers.{layer}.mlp.{hook}_proj.weight.*"))
            if len(found) != 1:
                raise UserError(
                    f"{cluster} holds {len(found)} files of scores for layer {layer}, {hook}_proj. "
                    "Keep exactly one of .grad and .change."
                )
            row.append(np.asarray(read_plain(found[0]), np.float32).ravel())
        rows.append(row)
    if len({len(scores) for row in rows for scores in row}) != 1:
        raise UserError(f"{folder} holds scores of different lengths. Give those of one model.")
    return np.stack([np.stack(row) for row in rows])


def read_plain(path: Path) -> Any:
    """Read a pickle or torch file of numbers, lists, arrays and tensors; tensors become arrays.

    Raises UserError when the file is missing, damaged, or holds anything else.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Is it complete?") from error
    try:
        return _plain(_read(data))
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    # Damaged pickles raise almost anything.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} is not a readable file of labels or scores ({reason}). Is it complete?"
        ) from error


def _read(data: bytes) -> Any:
    stream = io.BytesIO(data)
    if data.startswith(b"PK"):
        with zipfile.ZipFile(stream) as archive:
            name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            folder = name.removesuffix(".pkl")
            reader = _PlainReader(
                io.BytesIO(archive.read(name)), lambda key: archive.read(f"{folder}/{key}")
            )
            return reader.load()
    value = _PlainReader(stream).load()
    if not isinstance(value, int) or value != _MAGIC:
        return value
    return [_PlainReader(stream).load() for _ in ("protocol", "machine", "content")][-1]


class _PlainReader(pickle.Unpickler):
    """A pickle reader that knows plain values only."""

    def __init__(self, file: IO[bytes], storage: Callable[[str], bytes] | None = None) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TORCH_TYPES:
            return _TORCH_TYPES[name]
        allowed = _ALLOWED.get((module.replace("numpy._core", "numpy.core"), name))
        if allowed is None:
            raise UserError(
                f"asks for {module}.{name}: it is a pickle of something else than plain lists, "
                "arrays or tensors, and is not opened. Give the files that the original wrote."
            )
        return allowed

    def persistent_load(self, pid: Any) -> NDArray[Any]:
        if self._storage is None:
            raise UserError(
                "holds tensors in the format of torch before 1.6. Save it again with torch.save."
            )
        _, kind, key, _, count = pid
        return np.frombuffer(self._storage(str(key)), np.dtype(kind), count=count)


def _tensor(
    storage: NDArray[Any], offset: int, size: Iterable[int], stride: Iterable[int], *_: Any
) -> NDArray[Any]:
    shape, steps = tuple(size), tuple(stride)
    last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    if min(shape, default=1) > 0 and (
        offset < 0 or min(steps, default=0) < 0 or last >= len(storage)
    ):
        raise ValueError("a tensor reaches beyond its storage")
    steps = tuple(step * storage.itemsize for step in steps)
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy()


class _Type:
    """Stands for a numpy type in a pickle: a real one would take any state that a file gives it."""

    def __init__(self, name: str, *_: Any) -> None:
        self.dtype = np.dtype(name)
        if self.dtype.kind not in "iufb":
            raise ValueError(f"values of type {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for a numpy array in a pickle, until `_plain`."""

    def __init__(self, *_: Any) -> None:
        self.value: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self.value = _from_buffer(data, kind, shape, "F" if fortran else "C")


def _from_buffer(data: bytes, kind: _Type, shape: tuple[int, ...], order: str) -> NDArray[Any]:
    return np.frombuffer(data, kind.dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(kind: _Type, data: bytes) -> Any:
    return np.frombuffer(data, kind.dtype, count=1)[0]


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.value if isinstance(value, _Array) else value


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode(encoding)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): "ndarray",
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}


def _template(folder: Path) -> str:
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Give the folder of the original's split.")
    found = [template for template in TEMPLATES if (folder / template.format(0)).exists()]
    if len(found) == 1:
        return found[0]
    problem = "both" if found else "neither"
    raise UserError(
        f"{folder} holds {problem} of {' and '.join(t.format(0) for t in TEMPLATES)}. "
        "Name the files with template, {} standing for the layer."
    )


def _groups(value: Any, file: Path, width: int, shared: int) -> list[NDArray[np.int64]]:
    """The neurons of each expert, from either format."""
    if not isinstance(value, list | tuple | np.ndarray) or not len(value):
        raise UserError(
            f"{file} holds a {type(value).__name__}, not labels. Give an expert number per neuron "
            "or a list of neurons per expert."
        )
    if np.ndim(value[0]):
        return [_whole(group, file) for group in value]
    labels_F = _whole(value, file)
    if len(labels_F) != width or labels_F.min() < 0 or labels_F.max() >= width:
        raise UserError(
            f"{file} holds {len(labels_F)} labels from {labels_F.min()} to {labels_F.max()}, but a "
            f"layer of the model has {width} neurons and experts count from 0. Was it made for "
            "another model?"
        )
    if shared:
        raise UserError(
            f"{file} holds an expert number per neuron, so no expert is shared. Give shared=0."
        )
    return [np.flatnonzero(labels_F == expert) for expert in range(int(labels_F.max()) + 1)]


def _whole(values: Any, file: Path) -> NDArray[np.int64]:
    numbers = np.asarray(values)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iuf" or (numbers % 1).any():
        raise UserError(
            f"{file} holds something else than whole numbers. Give the original's files."
        )
    return numbers.astype(np.int64)
