"""NeuronSplit: which neurons of each dense layer go to which expert, and how to make one.

Notation: L layers, E experts (shared ones included), R shared experts, F neurons of a dense layer,
I neurons of one expert. Neuron j of a layer is row j of its gate and up projection and column j of
its down projection.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from moesaic.construct.method import SplitInputs, SplitMethod, read_model_config, resolve_method
from moesaic.core.console import note, track
from moesaic.core.errors import UserError, check_seed
from moesaic.core.files import check_step, output_directory, write_bytes, write_text
from moesaic.core.lineage import write_lineage

__all__ = ["FILE_NAME", "NeuronSplit", "make_split", "split"]

FILE_NAME = "split.safetensors"
FORMAT = "moesaic.neuron_split/1"


@dataclass(frozen=True, eq=False)
class NeuronSplit:
    """A division of the neurons of every layer among routed experts and shared experts.

    Experts may differ in width, may have neurons in common, and need not hold every neuron; `exact`
    and `coverage` say which. The order inside an expert is the order its weights are stored in.

    Raises UserError when layers differ in their number of experts, an expert is empty, holds a
    neuron twice or names a neuron outside 0..width-1.
    """

    experts: list[list[NDArray[np.int64]]]
    """[layer][routed expert] neuron ids."""
    shared: list[list[NDArray[np.int64]]]
    """[layer][shared expert] ids of neurons that are always on; empty lists when there are none."""
    width: int
    """F, the number of neurons of a dense layer."""
    meta: dict[str, Any] = field(default_factory=dict)
    """How it was made: method, its settings, seed, source; plain JSON values."""

    def __post_init__(self) -> None:
        for name in ("experts", "shared"):
            layers = [[as_ids(ids, name) for ids in layer] for layer in getattr(self, name)]
            object.__setattr__(self, name, layers)
        if not self.experts:
            raise UserError(
                "A split of 0 layers was given. Give the neuron ids of at least one layer."
            )
        if len(self.shared) != len(self.experts):
            raise UserError(
                f"The split has {len(self.experts)} layers of experts but {len(self.shared)} of "
                "shared experts. Give one list per layer in both; "
                "an empty list means no shared expert."
            )
        for name, groups in (("experts", self.experts), ("shared experts", self.shared)):
            counts = {len(layer) for layer in groups}
            if len(counts) > 1:
                raise UserError(
                    f"Layers with {sorted(counts)} {name} were given, but every layer needs the "
                    "same number. Make the split again with one number of experts."
                )
        if not self.experts[0]:
            raise UserError(
                "A split without routed experts was given. Lower shared or raise experts."
            )
        for index in range(len(self.experts)):
            for kind, ids_list in (
                ("expert", self.experts[index]),
                ("shared expert", self.shared[index]),
            ):
                for number, ids in enumerate(ids_list):
                    check_ids(ids, self.width, f"layer {index}, {kind} {number}")

    @property
    def layers(self) -> int:
        """L, the number of dense feed-forward layers."""
        return len(self.experts)

    @property
    def num_experts(self) -> int:
        """The number of routed experts of a layer, shared ones not counted."""
        return len(self.experts[0])

    @property
    def num_shared(self) -> int:
        """R, the number of shared experts of a layer."""
        return len(self.shared[0])

    @property
    def exact(self) -> bool:
        """Whether every neuron of every layer is held exactly once, shared experts included."""
        return all(bool((self.copies(layer) == 1).all()) for layer in range(self.layers))

    def copies(self, layer: int) -> NDArray[np.int64]:
        """How many experts of a layer, shared ones included, hold each neuron: int64 [F]."""
        every = self.experts[layer] + self.shared[layer]
        return np.bincount(np.concatenate(every), minlength=self.width)

    def coverage(self) -> list[float]:
        """The share of neurons that at least one expert holds, per layer, in 0..1."""
        return [float((self.copies(layer) > 0).mean()) for layer in range(self.layers)]

    def sizes(self) -> list[list[int]]:
        """Width of every routed expert, [layer][expert]."""
        return [[len(ids) for ids in layer] for layer in self.experts]

    def labels(self, layer: int) -> NDArray[np.int64]:
        """Expert id per neuron, int64 [F], shared experts counted after the routed ones.

        Raises UserError when the split is not exact: a neuron then has no id or several.
        """
        if not bool((self.copies(layer) == 1).all()):
            raise UserError(
                f"Layer {layer} of this split repeats or drops neurons, so a neuron has no "
                "single expert id. Use `experts` and `shared`, which list the neurons of each."
            )
        labels = np.empty(self.width, np.int64)
        for number, ids in enumerate(self.experts[layer] + self.shared[layer]):
            labels[ids] = number
        return labels

    def save(self, path: Path) -> Path:
        """Write one safetensors file, int32: `layers.{i}.experts.{e}`, `layers.{i}.shared.{r}`."""
        tensors = {}
        for index in range(self.layers):
            for name, groups in (("experts", self.experts[index]), ("shared", self.shared[index])):
                for number, ids in enumerate(groups):
                    tensors[f"layers.{index}.{name}.{number}"] = ids.astype(np.int32)
        header = {
            "format": FORMAT,
            "width": str(self.width),
            "layers": str(self.layers),
            "experts": str(self.num_experts),
            "shared": str(self.num_shared),
            "meta": json.dumps(self.meta, sort_keys=True),
        }
        write_bytes(Path(path), serialise(tensors, metadata=header))
        return Path(path)

    @classmethod
    def load(cls, path: Path) -> "NeuronSplit":
        """Read a split from its file, or from the directory that `moesaic split` wrote.

        Raises UserError when the file is missing, truncated, or something else than a split.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        if not path.is_file():
            raise UserError(
                f"There is no split at {path}. Make one with `moesaic split MODEL -o DIR "
                "--method random --experts 8`."
            )
        try:
            with safe_open(path, framework="numpy") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise UserError(
                        f"{path} is a safetensors file of format "
                        f"{header.get('format', 'unknown')!r}, not {FORMAT!r}. "
                        "Give the split.safetensors that `moesaic split` wrote."
                    )
                counts = {
                    name: range(int(header[name])) for name in ("layers", "experts", "shared")
                }
                layers: dict[str, list[list[NDArray[np.int64]]]] = {
                    name: [
                        [
                            file.get_tensor(f"layers.{i}.{name}.{n}").astype(np.int64)
                            for n in counts[name]
                        ]
                        for i in counts["layers"]
                    ]
                    for name in ("experts", "shared")
                }
                width, meta = int(header["width"]), json.loads(header["meta"])
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path} cannot be read as a split ({error}); it may be truncated. Make it "
                "again with `moesaic split`."
            ) from error
        return cls(layers["experts"], layers["shared"], width, meta)

    @classmethod
    def from_labels(
        cls,
        labels: Sequence[NDArray[np.integer[Any]]],
        *,
        experts: int,
        meta: Mapping[str, Any] | None = None,
    ) -> "NeuronSplit":
        """Make a split from one expert id per neuron, [L][F]; ids ascend inside an expert."""
        layers = [
            [np.flatnonzero(np.asarray(row) == expert) for expert in range(experts)]
            for row in labels
        ]
        return cls(layers, [[] for _ in layers], len(labels[0]), dict(meta or {}))


def as_ids(values: Any, name: str) -> NDArray[np.int64]:
    """Neuron ids as an int64 vector; UserError for anything that is not a list of whole numbers."""
    ids = np.asarray(values)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise UserError(
            f"The {name} of a split hold an array of shape {list(ids.shape)} and type {ids.dtype}. "
            "Give each expert as a flat list of neuron numbers."
        )
    return ids.astype(np.int64)


def check_ids(ids: NDArray[np.int64], width: int, where: str) -> None:
    """Raise UserError unless the ids are distinct numbers in 0..width-1, at least one."""
    if not len(ids):
        raise UserError(
            f"{where} of the split holds no neuron. Give every expert at least one neuron."
        )
    if ids.min() < 0 or ids.max() >= width:
        raise UserError(
            f"{where} of the split holds neuron {int(ids.min() if ids.min() < 0 else ids.max())}, "
            f"but neurons run from 0 to {width - 1}. Was the split made for another model?"
        )
    if len(np.unique(ids)) != len(ids):
        raise UserError(
            f"{where} of the split holds a neuron twice. List each neuron once per expert."
        )


def split(
    model: Path | str,
    *,
    method: str | Mapping[str, Any] | SplitMethod = "random",
    experts: int,
    shared: int = 0,
    data: Any = None,
    seed: int = 0,
) -> NeuronSplit:
    """Divide the neurons of a dense LLaMA among experts.

    `model` is a Hugging Face directory; `random` needs only its config.json. `method` is a name of
    `moesaic list splits`, a mapping `{"method": name, field: value}`, or a method object such as
    `Cluster(metric="cos")`. `experts` counts all experts, `shared` of them always on. `data` is a
    file, folder, mapping or dataset name; the methods that look at activations or gradients need
    it.

    Raises UserError when the width does not divide by `experts`, the method cannot do what was
    asked (shared experts, missing data), or the model is not a dense LLaMA.
    """
    return divide(model, method, experts, shared, data, seed)[0]


def make_split(
    model: Path | str,
    *,
    out: Path,
    method: str | Mapping[str, Any] | SplitMethod = "random",
    experts: int,
    shared: int = 0,
    data: Any = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Make a split and write its directory; says so when neurons repeat or vanish.

    The directory holds split.safetensors, split.json (resolved settings and figures), moesaic.json,
    scores.safetensors where the method scored neurons, and router.safetensors where it clustered
    text by a router's gates (`moesaic router` wrote the same kind of file). Raises as `split` does.
    """
    out = check_step(out, overwrite=overwrite, inputs=[model, method, data])
    with output_directory(out, overwrite=overwrite) as partial:
        made, arrays = divide(model, method, experts, shared, data, seed)
        made.save(partial / FILE_NAME)
        gates_LED = arrays.pop("gates", None)
        if gates_LED is not None:
            from moesaic.construct.router import FILE_NAME as ROUTER_FILE
            from moesaic.construct.router import RouterInit

            RouterInit.from_gates(gates_LED, made.meta).save(partial / ROUTER_FILE)
        if arrays:
            write_bytes(partial / "scores.safetensors", serialise(arrays))
        write_text(partial / "split.json", json.dumps(made.meta, indent=2) + "\n")
        held = made.coverage()
        facts = {"exact": made.exact, "coverage": held}
        write_lineage(
            partial, step="split", parent=str(model), config=made.meta, seed=seed, **facts
        )
    if not made.exact:
        note(
            f"split {made.meta['method']}: neurons repeat or vanish; the experts hold "
            f"{min(held):.1%} to {max(held):.1%} of a layer's neurons, so all experts together "
            "are not the dense model"
        )
    return out


def divide(
    model: Path | str,
    method: str | Mapping[str, Any] | SplitMethod,
    experts: int,
    shared: int,
    data: Any,
    seed: int,
) -> tuple[NeuronSplit, dict[str, NDArray[np.float32]]]:
    """What `split` does; also returns the arrays that the method wants kept."""
    chosen = resolve_method(method)
    check_seed(seed)
    inputs = SplitInputs(Path(model), read_model_config(Path(model)), experts, shared, data, seed)
    chosen.check(inputs)
    layers = list(track(chosen.divide(inputs), f"splitting ({chosen.key})", total=inputs.layers))
    meta = {
        "method": chosen.key,
        "settings": chosen.model_dump(mode="json"),
        "experts": experts,
        "shared": shared,
        "seed": seed,
        "model": str(model),
        "data": None if data is None else str(data),
        **inputs.facts,
    }
    made = NeuronSplit(
        [layer.experts for layer in layers],
        [layer.shared for layer in layers],
        inputs.width,
        meta,
    )
    return made, inputs.arrays
