"""The fused experts layer on GPUs, in Triton: `layer` is the whole, the other files its kernels."""

from __future__ import annotations

import torch

from moesaic.kernels.reference import Activation

TAKES_SENTINELS = True
"""Whether ids outside [0, E), which expert parallelism gives to other ranks' rows, are left out."""
_OLDEST = (8, 0)
_DTYPES = (torch.bfloat16, torch.float16)
_MULTIPLE = 8  # of elements: 16 bytes, what one copy moves


def why_not(
    x_TD: torch.Tensor, gate_up_EJD: torch.Tensor, down_EDI: torch.Tensor, ids_TK: torch.Tensor
) -> str | None:
    """Say in a few words why the fused kernels do not take these tensors, or return None."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(x_TD.device)
    if capability < _OLDEST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, not 8.0 or more"
    if x_TD.dtype not in _DTYPES:
        return (
            f"the products are in {str(x_TD.dtype).removeprefix('torch.')}, not bfloat16 or float16"
        )
    if not x_TD.dtype == gate_up_EJD.dtype == down_EDI.dtype:
        return "input and weights have different dtypes"
    hidden, width = down_EDI.shape[1:]
    if hidden % _MULTIPLE or width % _MULTIPLE:
        return f"the widths {hidden} and {width} are not both multiples of {_MULTIPLE}"
    if x_TD.shape[0] == 0:
        return "there are no tokens"
    for weight in (gate_up_EJD, down_EDI):
        if not weight.is_contiguous():
            return "the weights are not contiguous"
        # A traced tensor has no address: parameters of a compiled model are taken to be aligned.
        if not torch.compiler.is_compiling() and weight.data_ptr() % 16:
            return "the weights are not aligned to 16 bytes"
    return None


def why_not_persistent(device: torch.device, tile_rows: int | None) -> str | None:
    """Say why one program computes one tile on `device`, whatever is asked, or return None.

    `tile_rows` as in `options.Launch.block_m`.
    """
    from moesaic.kernels.triton.metadata import TILE_ROWS
    from moesaic.kernels.triton.multiply import hopper

    if not hopper(device):
        return "only the kernels for Hopper GPUs can be persistent"
    if tile_rows not in (None, TILE_ROWS):
        return f"tiles of {tile_rows} rows take one program each, only those of {TILE_ROWS} share"
    return None


def experts(
    x_TD: torch.Tensor,
    gate_up_EJD: torch.Tensor,
    down_EDI: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    activation: Activation = "silu",
    sentinels: bool = False,
) -> torch.Tensor:
    """Compute what `reference.experts` computes, on tensors that `why_not` has nothing against.

    `sentinels`: ids outside [0, E) are rows of other ranks, which add nothing.
    """
    from moesaic.kernels.triton.layer import compute

    tensors = (x_TD, gate_up_EJD, down_EDI, ids_TK, weights_TK)
    return compute(*tensors, activation=activation, sentinels=sentinels)
