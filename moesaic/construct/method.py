"""What every split is made of: the inputs it may look at, and the base class of a method.

Notation: L layers, E experts (shared ones included), R shared experts, F neurons of a dense layer,
D hidden size.
"""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesaic.construct.splits import SPLITS
from moesaic.core.config import Config
from moesaic.core.errors import UserError

if TYPE_CHECKING:
    from moesaic.construct.dense import DenseModel

__all__ = [
    "LayerSplit",
    "Projection",
    "SplitInputs",
    "SplitMethod",
    "check_division",
    "read_model_config",
    "resolve_method",
]

Projection = Literal["up", "gate"]


class LayerSplit(NamedTuple):
    """The neurons of one layer: [expert] ids of the routed and of the shared experts."""

    experts: list[NDArray[np.int64]]
    shared: list[NDArray[np.int64]]
    always: int | None = None
    """So many of `experts`, the first, are to be chosen for every token (`construct.pinned`)."""


@dataclass
class SplitInputs:
    """What a split may look at: the dense model, the data, and the numbers asked for."""

    model: Path
    config: Mapping[str, Any]
    experts: int
    shared: int
    data: Any
    seed: int
    facts: dict[str, Any] = field(default_factory=dict)
    """What the method wants kept with the split (objective reached, tokens read); JSON values."""
    arrays: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Arrays worth keeping beside the split, such as importance scores."""

    @property
    def layers(self) -> int:
        """L."""
        return int(self.config["num_hidden_layers"])

    @property
    def width(self) -> int:
        """F."""
        return int(self.config["intermediate_size"])

    @property
    def expert_width(self) -> int:
        """F / E."""
        return self.width // self.experts

    @cached_property
    def dense(self) -> "DenseModel":
        """The dense model, checked, its tensors read one by one."""
        from moesaic.construct.dense import open_dense

        return open_dense(self.model)

    def rows(self, layer: int, projection: Projection) -> NDArray[np.float32]:
        """The rows of one projection of a layer, one per neuron: float32 [F, D], a copy.

        Raises UserError when one is NaN or infinite.
        """
        import torch

        gate, up, _ = self.dense.ffn(layer)
        name = gate if projection == "gate" else up
        rows: NDArray[np.float32] = self.dense.read(name).to(torch.float32, copy=True).numpy()
        self.dense.checkpoint.release([name])
        return rows

    def check_experts(self) -> None:
        """Raise UserError unless there are experts, and fewer shared than all."""
        if self.experts < 1 or not 0 <= self.shared < self.experts:
            raise UserError(
                f"experts={self.experts} with shared={self.shared} was given. experts counts "
                "all experts, shared ones included; give at least 1 expert and "
                "fewer shared than experts."
            )

    def check_division(self) -> None:
        """Raise UserError unless the neurons divide by the experts."""
        check_division(self.experts, self.width)


def check_division(experts: int, width: int) -> None:
    """Raise UserError unless `experts` divides a layer's `width` neurons; names what would."""
    if width % experts:
        below = max(e for e in range(1, min(experts, width + 1)) if width % e == 0)
        above = next((e for e in range(experts + 1, width + 1) if width % e == 0), None)
        near = f"{below}" if above is None else f"{below} or {above}"
        raise UserError(
            f"experts={experts} does not divide the {width} neurons of a layer. "
            f"Use a divisor, such as {near}."
        )


class SplitMethod(Config):
    """A way to divide neurons; its typed fields are its settings."""

    makes_shared: ClassVar[bool] = False
    """Whether the method can make shared experts."""
    needs_data: ClassVar[bool] = False
    """Whether the method reads text."""
    equal_parts: ClassVar[bool] = True
    """Whether the method needs the neurons to divide by the experts."""

    @property
    def key(self) -> str:
        """The name the method is registered under."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    def check(self, inputs: SplitInputs) -> None:
        """Raise UserError, with the cure, when the method cannot do what was asked."""
        inputs.check_experts()
        if self.equal_parts:
            inputs.check_division()
        if inputs.shared and not self.makes_shared:
            able = [name for name in SPLITS.names() if SPLITS.get(name).makes_shared]
            raise UserError(
                f"shared={inputs.shared} was asked of the split {self.key}, which makes no "
                f"shared experts. Use shared=0 or one of: {', '.join(able)}."
            )
        if inputs.data is not None and not self.needs_data:
            from moesaic.data import open_domains

            open_domains(inputs.data)  # not read, but the lineage names it: it must be there
        if self.needs_data and inputs.data is None:
            raise UserError(
                f"The split {self.key} looks at text, but no data was given. "
                "Give data: a .jsonl or .txt file, a folder, or the name of a dataset."
            )

    @abstractmethod
    def divide(self, inputs: SplitInputs) -> Iterator[LayerSplit]:
        """Yield the split of every layer in order."""


def resolve_method(method: str | Mapping[str, Any] | SplitMethod) -> SplitMethod:
    """The method that a name, a mapping `{"method": name, field: value}` or an object stands for.

    Raises UserError for an unknown name or field, with the nearest one.
    """
    chosen = SPLITS.resolve(method)
    assert isinstance(chosen, SplitMethod)
    return chosen


def read_model_config(model: Path) -> dict[str, Any]:
    """The config.json of a dense model of a known family, a directory or the file itself.

    Raises UserError when it is missing or of another kind.
    """
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"There is no config.json in {model}. Give the directory of a Hugging Face model."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"{path} is not readable JSON ({error}). Give the directory of a Hugging Face model."
        ) from error
    kind = config.get("model_type")
    from moesaic.construct.dense_families import FAMILIES  # it brings torch

    if kind not in FAMILIES:
        raise UserError(
            f"{model} is a model of type {kind!r}; its layers cannot be split. Give a dense "
            f"model of one of the families {', '.join(sorted(FAMILIES))}."
        )
    missing = [
        key
        for key in ("num_hidden_layers", "intermediate_size", "hidden_size")
        if key not in config
    ]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}. Give the complete config.json of the model."
        )
    return dict(config)
