"""Compute of routed experts: a reference that is the meaning, and fast code tested against it.

This room knows tensors and the attributes of transformers' experts modules, never configs or model
classes. `register()` makes `experts_implementation="moesaic"` known to transformers;
`fuse_routers(model)` lets a model's routers choose in one kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from moesaic.kernels.fuse import Fused

NAME = "moesaic"


def register() -> None:
    """Register our experts function with transformers as "moesaic"; again changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from moesaic.kernels.select import experts_forward

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def fuse_routers(model: torch.nn.Module, *, device: torch.device | None = None) -> Fused:
    """Let the routers of `model` choose in one kernel: see `kernels.fuse.fuse_routers`."""
    from moesaic.kernels.fuse import fuse_routers as fuse

    return fuse(model, device=device)


def unfuse_routers(model: torch.nn.Module) -> list[str]:
    """Give the routers of `model` their own code again; return their paths."""
    from moesaic.kernels.fuse import unfuse_routers as unfuse

    return unfuse(model)


def implementations() -> dict[str, str]:
    """Map every experts implementation that transformers knows to a line on what it is."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    register()
    known = {
        NAME: "ours: fused Triton kernels on a GPU, else grouped matmul that keeps only x and h",
        "eager": "transformers: the model class's own loop over experts",
        "grouped_mm": "transformers: grouped matmul, the default of transformers",
        "batched_mm": "transformers: gathers the weights of every routed row, for a few tokens",
        "deepgemm": "transformers: DeepGEMM from the hub, inference only",
        "sonicmoe": "transformers: SonicMoE from the hub, Hopper GPUs",
    }
    names = {"eager", *ALL_EXPERTS_FUNCTIONS.keys()}
    return {name: known.get(name, "registered elsewhere") for name in sorted(names, key=_order)}


def _order(name: str) -> tuple[bool, str]:
    return name != NAME, name
