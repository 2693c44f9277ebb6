"""What a weighting is: the fields of a LLaMA-MoE config that say how chosen experts add up."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from moesaic.core.config import Config

__all__ = ["Weighting"]


class Weighting(Config):
    """A way to weigh chosen experts; its typed fields are its settings."""

    @property
    def key(self) -> str:
        """The name the weighting is registered under."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    @abstractmethod
    def fields(self, *, routed: int, selects: int) -> dict[str, Any]:
        """Fields of `LlamaMoEConfig` for `routed` experts of which a token uses `selects`."""
