"""Golden numbers of the original program, and the ways the tests here read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from moesaic.models.randomness import Randomness
from tests.helpers import GOLDEN

FAMILIES = GOLDEN / "families"
V1 = GOLDEN / "llama_moe_v1"


def arrays(name: str) -> dict[str, torch.Tensor]:
    """The arrays of `llama_moe_v1/<name>.npz` that are numbers."""
    with np.load(V1 / f"{name}.npz") as file:
        return {
            key: torch.from_numpy(np.asarray(file[key]))
            for key in file.files
            if file[key].dtype.kind != "U"
        }


def family(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs and expected outputs of `families/<name>`."""
    directory = FAMILIES / name
    return load_file(directory / "inputs.safetensors"), load_file(
        directory / "expected.safetensors"
    )


class Fixed(Randomness):
    """Random numbers that were drawn when the golden numbers were made."""

    def __init__(self, **draws: torch.Tensor) -> None:
        super().__init__()
        self.draws = draws

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        return self.draws["normal"].to(like.device)

    def uniform(self, like: torch.Tensor) -> torch.Tensor:
        return self.draws["uniform"].to(like.device)

    def gumbel(self, like: torch.Tensor) -> torch.Tensor:
        return self.draws["gumbel"].to(like.device)

    def permutation(self, length: int, device: Any) -> torch.Tensor:
        return torch.arange(length, device=device).flip(0)
