"""RouterInit: the first weights of every layer's router, and how to make them.

Notation: L layers, E routed experts, R shared experts, D hidden size. A router of network `mlp` is
W2 tanh(W1 x) with W1 [E, D] ("0.weight") and W2 [E, E] ("2.weight"); `linear` is W x with W [E, D]
("weight"), to which a closed-form fit may add a "bias" [E]; `glu` is |silu(G x) * (U x)| with G and
U [E, D] ("gate.weight", "up.weight"). Shared experts have a linear router of their own, [R, D].
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from moesaic.construct.dense import DenseModel, open_dense
from moesaic.construct.legacy_v2 import is_original, open_split, read_gates
from moesaic.construct.routers import ROUTERS
from moesaic.construct.split import NeuronSplit
from moesaic.core.config import Config
from moesaic.core.console import track
from moesaic.core.errors import UserError, check_seed
from moesaic.core.files import check_step, output_directory, write_bytes, write_text
from moesaic.core.lineage import write_lineage

__all__ = ["FILE_NAME", "Gate", "RouterInit", "RouterInputs", "RouterMethod", "make_router"]

FILE_NAME = "router.safetensors"
FORMAT = "moesaic.router_init/1"

Gate = Literal["mlp", "linear", "glu"]
_NETWORKS: tuple[Gate, ...] = ("mlp", "linear")
_FIRST: dict[Gate, str] = {"mlp": "0.weight", "linear": "weight", "glu": "gate.weight"}


@dataclass(frozen=True, eq=False)
class RouterInit:
    """Router weights of every layer, float32.

    Raises UserError when layers differ in tensors or shapes, or fit neither network.
    """

    layers: list[dict[str, torch.Tensor]]
    """[layer] {"0.weight": [E, D], "2.weight": [E, E]} or {"weight": [E, D]}."""
    shared: list[torch.Tensor | None]
    """[layer] [R, D], or None where there are no shared experts."""
    meta: dict[str, Any] = field(default_factory=dict)
    """How it was made; plain JSON values."""

    def __post_init__(self) -> None:
        if not self.layers or len(self.shared) != len(self.layers):
            raise UserError(
                f"A router init of {len(self.layers)} layers and {len(self.shared)} shared routers "
                "was given. Give one of each per layer, at least one layer."
            )
        shapes = [{name: tuple(w.shape) for name, w in layer.items()} for layer in self.layers]
        for index, layer in enumerate(shapes):
            if layer != shapes[0]:
                raise UserError(
                    f"Layer {index} of the router init holds {layer}, layer 0 {shapes[0]}. "
                    "Make every layer alike."
                )
        if not _fits(shapes[0]):
            raise UserError(
                f"The router init holds {shapes[0]} per layer. Give weight [E, D] (and bias [E]), "
                "0.weight [E, D] with 2.weight [E, E], or gate.weight with up.weight [E, D]."
            )

    @classmethod
    def from_gates(cls, gates: Iterable[Any], meta: Mapping[str, Any]) -> RouterInit:
        """Linear routers from one [E, D] matrix per layer, without routers of shared experts."""
        layers = [{"weight": torch.as_tensor(gate_ED).float()} for gate_ED in gates]
        return cls(layers, [None for _ in layers], dict(meta))

    def with_shared(self, count: int, dense: DenseModel, seed: int) -> RouterInit:
        """Give every layer a fresh router of `count` shared experts where it has none."""
        if not count or self.shared[0] is not None:
            return self
        generator = torch.Generator().manual_seed(seed)
        std = float(dense.config["initializer_range"])
        shared: list[torch.Tensor | None] = [
            torch.empty(count, self.hidden).normal_(0.0, std, generator=generator)
            for _ in self.layers
        ]
        return RouterInit(self.layers, shared, self.meta)

    @property
    def gate(self) -> Gate:
        """Which network the weights are for."""
        if "gate.weight" in self.layers[0]:
            return "glu"
        return "linear" if "weight" in self.layers[0] else "mlp"

    @property
    def bias(self) -> bool:
        """Whether the linear network has a bias."""
        return "bias" in self.layers[0]

    @property
    def num_experts(self) -> int:
        """E, the number of routed experts."""
        return self._first.shape[0]

    @property
    def hidden(self) -> int:
        """D."""
        return self._first.shape[1]

    @property
    def _first(self) -> torch.Tensor:
        return self.layers[0][_FIRST[self.gate]]

    def save(self, path: Path) -> Path:
        """Write one safetensors file: `layers.{i}.gate_network.*`, `layers.{i}.shared.weight`."""
        tensors = {}
        for index, (layer, shared) in enumerate(zip(self.layers, self.shared, strict=True)):
            for name, weight in layer.items():
                tensors[f"layers.{index}.gate_network.{name}"] = weight.contiguous()
            if shared is not None:
                tensors[f"layers.{index}.shared.weight"] = shared.contiguous()
        header = {"format": FORMAT, "meta": json.dumps(self.meta, sort_keys=True)}
        write_bytes(Path(path), serialise(tensors, metadata=header))
        return Path(path)

    @classmethod
    def load(cls, path: Path) -> RouterInit:
        """Read a router init from its file, or from the directory that `moesaic router` wrote.

        LLaMA-MoE-v2's gate_weights.pt is read too. Raises UserError when the file is missing,
        truncated, or something else.
        """
        if is_original(path):
            meta = {"method": "imported", "imported_from": str(path)}
            return cls.from_gates(read_gates(Path(path)), meta)
        path = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise UserError(
                f"There is no router init at {path}. Make one with `moesaic router`, or name one "
                f"of: {', '.join(ROUTERS.names())}."
            )
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); it may be truncated. Make it again with "
                "`moesaic router`."
            ) from error
        if header.get("format") != FORMAT:
            raise UserError(
                f"{path} is of format {header.get('format', 'unknown')!r}, not {FORMAT!r}. "
                f"Give the {FILE_NAME} that `moesaic router` wrote."
            )
        count = 1 + max((int(name.split(".")[1]) for name in tensors), default=-1)
        starts = [f"layers.{index}.gate_network." for index in range(count)]
        layers = [
            {name[len(s) :]: w for name, w in tensors.items() if name.startswith(s)} for s in starts
        ]
        shared = [tensors.get(f"layers.{index}.shared.weight") for index in range(count)]
        return cls(layers, shared, json.loads(header.get("meta", "{}")))


def _fits(shapes: dict[str, tuple[int, ...]]) -> bool:
    rows = next(iter(shapes.values()), (0,))[0]
    match sorted(shapes):
        case ["weight"]:
            return True
        case ["bias", "weight"]:
            return shapes["bias"] == (shapes["weight"][0],)
        case ["0.weight", "2.weight"]:
            return shapes["2.weight"] == (shapes["0.weight"][0],) * 2
        case ["gate.weight", "up.weight"]:
            return shapes["gate.weight"] == shapes["up.weight"] and rows > 0
    return False


@dataclass
class RouterInputs:
    """What a router init may look at."""

    model: Path
    split: NeuronSplit
    gate: Gate
    top_k: int
    """Routed experts that are chosen for a token, shared ones not counted."""
    data: Any
    seed: int
    contract_layers: int = 0
    """So many layers at each end stay dense; `kaiming` draws nothing for them."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the method wants kept beside the weights (accuracy reached); plain JSON values."""

    @cached_property
    def dense(self) -> DenseModel:
        """The dense model."""
        return open_dense(self.model)

    @cached_property
    def generator(self) -> torch.Generator:
        """The one stream that all random weights are drawn from, layer by layer."""
        return torch.Generator().manual_seed(self.seed)

    @property
    def spread(self) -> float:
        """The config's initializer_range: what the original draws fresh routers with."""
        return float(self.dense.config["initializer_range"])

    def normal(self, *shape: int, std: float | None = None) -> torch.Tensor:
        """Draw a float32 tensor from N(0, std²); std is the initializer_range by default."""
        std = self.spread if std is None else std
        return torch.empty(shape).normal_(0.0, std, generator=self.generator)


class RouterMethod(Config):
    """A way to make the first weights of the routers; its typed fields are its settings."""

    needs_data: ClassVar[bool] = False
    """Whether the method reads text."""
    reads_split: ClassVar[bool] = True
    """Whether the method looks at which neurons the experts hold."""
    networks: ClassVar[tuple[Gate, ...]] = _NETWORKS
    """The router networks it can make weights for."""

    @property
    def key(self) -> str:
        """The name the method is registered under."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    def check(self, inputs: RouterInputs) -> None:
        """Raise UserError, with the cure, when the method cannot do what was asked."""
        if inputs.gate not in self.networks:
            raise UserError(
                f"The router init {self.key} makes no router of network {inputs.gate}. "
                f"Use the gate {' or '.join(self.networks)}."
            )
        if self.needs_data and inputs.data is None:
            raise UserError(
                f"The router init {self.key} looks at text, but no data was given. "
                "Give data: a .jsonl or .txt file, a folder, or the name of a dataset."
            )

    @abstractmethod
    def build(self, inputs: RouterInputs) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the router weights of every layer in order, in the form of `RouterInit.layers`."""


def init_router(
    model: Path | str,
    *,
    split: NeuronSplit,
    method: str | Mapping[str, Any] | RouterMethod = "random",
    gate: Gate = "mlp",
    top_k: int = 1,
    data: Any = None,
    seed: int = 0,
    contract_layers: int = 0,
) -> RouterInit:
    """Make the first router weights for a dense model and its split.

    `method` is a name of `moesaic list routers`, a mapping `{"method": name, field: value}`, or an
    object. `top_k` counts routed experts; only `select` with the `topk` target looks at it. `data`
    is needed by methods that look at activations.

    Raises UserError when the split was made for another model, or the method cannot do it.
    """
    chosen = resolve_router(method)
    check_seed(seed)
    if not 1 <= top_k <= split.num_experts:
        raise UserError(
            f"top_k={top_k} but the split has {split.num_experts} routed experts. "
            f"Give 1 to {split.num_experts}."
        )
    inputs = RouterInputs(Path(model), split, gate, top_k, data, seed, contract_layers)
    if (split.layers, split.width) != (inputs.dense.layers, inputs.dense.width):
        raise UserError(
            f"The split is for {split.layers} layers of {split.width} neurons, {model} has "
            f"{inputs.dense.layers} layers of {inputs.dense.width}. Make a split of this model."
        )
    chosen.check(inputs)
    title = f"router init ({chosen.key})"
    layers = list(track(chosen.build(inputs), title, total=split.layers))
    shared = [
        inputs.normal(split.num_shared, inputs.dense.hidden) if split.num_shared else None
        for _ in layers
    ]
    meta = {
        "method": chosen.key,
        "settings": chosen.model_dump(mode="json"),
        "gate": gate,
        "top_k": top_k,
        "seed": seed,
        "model": str(model),
        "split": split.meta,
        "data": None if data is None else str(data),
        **inputs.facts,
    }
    return RouterInit(layers, shared, meta)


def make_router(
    model: Path | str,
    *,
    out: Path | str,
    split: NeuronSplit | Path | str | None = None,
    experts: int | None = None,
    method: str | Mapping[str, Any] | RouterMethod = "random",
    gate: Gate = "mlp",
    top_k: int = 1,
    data: Any = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Make router weights and write their directory: router.safetensors, router.json, moesaic.json.

    `split` is a NeuronSplit, its file, the directory that `moesaic split` wrote, or the original's
    neuron_indices.pt. Methods that do not look at it (`hidden-clusters`, `kaiming`) do with the
    number of routed `experts` instead. Raises UserError where neither is given.
    """
    if (split is None) == (experts is None):
        raise UserError("Give either a split or the number of routed experts.")
    out = check_step(out, overwrite=overwrite, inputs=[model, split, method, data])
    with output_directory(out, overwrite=overwrite) as partial:
        if split is None:
            assert experts is not None
            division = _any_split(Path(model), experts, resolve_router(method))
        else:
            division = _made_split(split, Path(model))
        made = init_router(
            model, split=division, method=method, gate=gate, top_k=top_k, data=data, seed=seed
        )
        made.save(partial / FILE_NAME)
        write_text(partial / "router.json", json.dumps(made.meta, indent=2) + "\n")
        write_lineage(partial, step="router", parent=str(model), config=made.meta, seed=seed)
    return out


def _made_split(split: NeuronSplit | Path | str, model: Path) -> NeuronSplit:
    if isinstance(split, NeuronSplit):
        return split
    width = open_dense(model).width if is_original(Path(split)) else 0  # ours know their own
    return open_split(Path(split), width=width)


def _any_split(model: Path, experts: int, method: RouterMethod) -> NeuronSplit:
    """A split with so many experts, for a method that does not look at it."""
    if method.reads_split:
        raise UserError(
            f"The router init {method.key} looks at the experts' neurons. Give a split instead of "
            "experts."
        )
    dense = open_dense(model)
    if not 1 <= experts <= dense.width:
        raise UserError(f"experts={experts} was given. Give 1 to {dense.width}.")
    blocks = np.array_split(np.arange(dense.width), experts)
    layers = range(dense.layers)
    meta = {"method": "any", "experts": experts}
    return NeuronSplit([blocks for _ in layers], [[] for _ in layers], dense.width, meta)


def resolve_router(method: str | Mapping[str, Any] | RouterMethod) -> RouterMethod:
    """Return the method object that a name, a mapping with the key `method`, or an object means."""
    chosen: RouterMethod = ROUTERS.resolve(method)
    return chosen
