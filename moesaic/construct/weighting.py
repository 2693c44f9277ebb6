"""What a weighting is: the fields of a LLaMA-MoE config that say how chosen experts add up."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from moesaic.core.config import Config
from moesaic.models.selects import Selects

__all__ = ["StartingAtOne", "Weighting", "layer_fields"]


class Weighting(Config):
    """A way to weigh chosen experts; its typed fields are its settings."""

    @property
    def key(self) -> str:
        """The name the weighting is registered under."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    @abstractmethod
    def fields(self, *, routed: int, selects: int) -> dict[str, Any]:
        """Fields of `LlamaMoEConfig` for `routed` experts of which a token uses `selects`."""


class StartingAtOne(Weighting):
    """Weights that are 1 at conversion: all experts on are the dense model. The gate has its name.

    No noise: it would undo a fitted router.
    """

    def fields(self, *, routed: int, selects: int) -> dict[str, Any]:
        """Fields of the config."""
        return {
            "gate_weighting": self.key,
            "multiply_gate_scores": True,
            "score_scale_factor": 1.0,
            "gate_add_noise": False,
        }


def layer_fields(weighting: Weighting, *, routed: int, selects: Selects) -> dict[str, Any]:
    """Fields for numbers that may differ by layer: a list [L] where the layers' values do."""
    if isinstance(selects, int):
        return weighting.fields(routed=routed, selects=selects)
    found = [weighting.fields(routed=routed, selects=number) for number in selects]
    values = {name: [fields[name] for fields in found] for name in found[0]}
    return {name: row[0] if row.count(row[0]) == len(row) else row for name, row in values.items()}
