"""The imported split: what the original LLaMA-MoE code wrote, one file a layer."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from moesaic.construct.method import LayerSplit, SplitInputs, SplitMethod
from moesaic.construct.splits import SPLITS
from moesaic.core.errors import UserError


@SPLITS.register
class Imported(SplitMethod):
    """A folder of split files that the original LLaMA-MoE code wrote, in either of its formats."""

    makes_shared: ClassVar[bool] = True
    equal_parts: ClassVar[bool] = False

    folder: Path
    """The folder with one file a layer."""
    template: str = "auto"
    """A file's name with {} for the layer; "auto" knows layers.{}.mlp.up_proj.weight and gate."""

    def divide(self, inputs: SplitInputs) -> Iterator[LayerSplit]:
        """Yield the split of every layer in order."""
        from moesaic.construct.legacy import import_split

        read = import_split(
            self.folder,
            layers=inputs.layers,
            width=inputs.width,
            template=self.template,
            shared=inputs.shared,
        )
        found = read.num_experts + read.num_shared
        if found != inputs.experts:
            raise UserError(
                f"{self.folder} holds {found} experts a layer, but experts={inputs.experts} was "
                f"given. Give experts={found}."
            )
        inputs.facts["template"] = read.meta["template"]
        yield from map(LayerSplit, read.experts, read.shared)
