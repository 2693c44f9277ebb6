"""What a user may say about the fused kernels, and the launch parameters that follow from it.

The keys are those of the axolotl plugin that the seed names. There they were read and dropped; here
each one changes a launch parameter that `select` reports, or is refused with the reason:

* `moe_kernels`: run the experts through `experts_implementation="moesaic"`;
* `moe_group_size`: rows of one expert that one program multiplies at a time. The plugin's kernel
  padded every expert's rows to this number, which made it the M tile of its grouped GEMM; ours pads
  nothing, and keeps the tile;
* `moe_persistent_kernel`: one program per multiprocessor that walks over the tiles in an order that
  suits the L2 cache, instead of one program per tile;
* `moe_kernel_models`: the model types that the options are meant for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from moesaic.core.config import Config
from moesaic.core.errors import UserError, nearest

if TYPE_CHECKING:
    import torch

SEED_KEYS = ("moe_kernels", "moe_group_size", "moe_persistent_kernel", "moe_kernel_models")
_LAUNCH_KEYS = ("moe_group_size", "moe_persistent_kernel")


class KernelsConfig(Config):
    """How the routed experts are computed; what is left out is chosen by measurement."""

    moe_kernels: bool = True
    """Run the experts through our kernels; false: through transformers' grouped matmul."""
    moe_group_size: Literal[16, 32, 64, 128, 256] | None = None
    """Rows of an expert in one tile of the fused kernels; None: tuned to the shape and the GPU."""
    moe_persistent_kernel: bool | None = None
    """One program per multiprocessor (true) or one per tile (false); None: the faster one."""
    moe_kernel_models: list[str] | None = None
    """Model types these options are for (`mixtral`, `qwen2_moe`); another is an error."""
    fuse_routers: bool = False
    """Let routers choose in one kernel on a GPU (scores, top-k and weights, and their gradient)."""

    @model_validator(mode="after")
    def _options_have_effect(self) -> KernelsConfig:
        given = [key for key in SEED_KEYS[1:] if getattr(self, key) is not None]
        if not self.moe_kernels and given:
            raise ValueError(
                f"{given[0]} has no effect with moe_kernels: false. Leave it out, or set "
                "moe_kernels: true."
            )
        return self

    @property
    def implementation(self) -> str:
        """The experts implementation to load a model with."""
        return "moesaic" if self.moe_kernels else "grouped_mm"

    @property
    def launch(self) -> Launch:
        """The launch parameters that follow."""
        return Launch(
            block_m=self.moe_group_size,
            persistent=Launch.persistent
            if self.moe_persistent_kernel is None
            else self.moe_persistent_kernel,
        )


@dataclass(frozen=True)
class Launch:
    """Launch parameters of the fused kernels.

    `block_m`: rows of one expert in a tile (None: tuned). `persistent`: one program per
    multiprocessor, where the kernels can be (see `select.why_not_persistent`).
    """

    block_m: int | None = None
    persistent: bool = True

    def __str__(self) -> str:
        rows = "tuned tiles" if self.block_m is None else f"tiles of {self.block_m} rows"
        how = "persistent" if self.persistent else "one program a tile"
        return f"{rows}, {how}"


# A plain global: the backward pass runs in threads of autograd, which see no context variables.
_current = Launch()


def current() -> Launch:
    """Return the launch parameters in force."""
    return _current


def reset() -> None:
    """Put the defaults in force again."""
    global _current
    _current = Launch()


@contextlib.contextmanager
def using(launch: Launch) -> Iterator[Launch]:
    """Put other launch parameters in force inside the block, for tests and measurements."""
    global _current
    before, _current = _current, launch
    try:
        yield launch
    finally:
        _current = before


def configure(
    config: KernelsConfig,
    *,
    model_type: str | None = None,
    known_types: Collection[str] = (),
    experts: Iterable[Any],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Launch:
    """Put `config` in force for this process and return the launch parameters.

    Args:
        config: what the user said.
        model_type: of the model to run, for `moe_kernel_models`.
        known_types: every model type there is; another in that list is an error.
        experts: the model's experts modules: an option that none of them can use is refused.
        device: where they will run, if they are not there yet.
        dtype: of their products, if not that of their weights.

    Raises UserError for an option that would have no effect, with the reason.
    """
    from moesaic.kernels.select import why_not_fused, why_not_persistent

    global _current
    experts = list(experts)
    if config.moe_kernel_models is not None:
        _check_models(config.moe_kernel_models, model_type, known_types)
    if not experts:
        raise UserError("kernels: has no effect on a model without experts. Leave it out.")
    given = [key for key in _LAUNCH_KEYS if getattr(config, key) is not None]
    if given:
        reasons = [why_not_fused(module, device=device, dtype=dtype) for module in experts]
        if None not in reasons:
            raise UserError(
                f"kernels.{given[0]} has no effect here: {reasons[0]}. Leave it out, or run where "
                "the fused kernels do."
            )
    if config.moe_persistent_kernel is not None:
        where = device or next(experts[0].parameters()).device
        refused = why_not_persistent(where, config.moe_group_size)
        if refused is not None:
            raise UserError(
                f"kernels.moe_persistent_kernel has no effect here: {refused}. Leave it out."
            )
    _current = config.launch
    return _current


def _check_models(names: list[str], model_type: str | None, known: Collection[str]) -> None:
    wanted = [name.lower().replace("-", "_") for name in names]
    for name in wanted:
        if known and name not in known:
            raise UserError(
                f"kernels.moe_kernel_models: no model type '{name}'.{nearest(name, list(known))} "
                "Give model types as config.json names them."
            )
    if model_type is not None and model_type not in wanted:
        raise UserError(
            f"kernels.moe_kernel_models leaves out '{model_type}', the type of this model, so the "
            f"options have no effect. Add it to: {', '.join(wanted) or 'an empty list'}."
        )
