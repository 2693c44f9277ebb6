"""The comparison of a mixture with its dense model, against plain formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from moesaic.core.errors import MoesaicError
from moesaic.measure.exactness import (
    FeedForward,
    feed_forward,
    fixed_tokens,
    is_exact,
    layer_difference,
    logit_difference,
)
from tests.construct.dense_models import write_dense


def weights(width: int, hidden: int, dtype: torch.dtype = torch.float32) -> FeedForward:
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    return FeedForward(*((torch.randn(shape) * 0.3).to(dtype) for shape in shapes))


@pytest.mark.parametrize("width", [1, 511, 512, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feed_forward_in_blocks_is_the_plain_formula(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up, down, *_ = dense = weights(width, 20, dtype)
    x_TD = fixed_tokens(20, tokens=7)
    wanted = (functional.silu(x_TD @ gate.float().T) * (x_TD @ up.float().T)) @ down.float().T
    made = feed_forward(x_TD, dense, functional.silu)
    torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4)


def test_layer_difference_is_what_one_expert_lacks() -> None:
    torch.manual_seed(1)
    gate, up, down, *_ = dense = weights(30, 16)
    x_TD = fixed_tokens(16)
    parts = [torch.arange(0, 30, 2), torch.arange(1, 30, 2)]
    experts = [FeedForward(gate[ids], up[ids], down[:, ids]) for ids in parts]
    same, largest = layer_difference(dense, experts, activation=functional.silu, x_TD=x_TD)
    assert is_exact(same, largest)
    assert largest == pytest.approx(float(feed_forward(x_TD, dense, functional.silu).abs().max()))
    lacking, _ = layer_difference(dense, experts[:1], activation=functional.silu, x_TD=x_TD)
    wanted = float(feed_forward(x_TD, experts[1], functional.silu).abs().max())
    assert lacking == pytest.approx(wanted, rel=1e-4)
    assert not is_exact(lacking, largest)


def test_the_tokens_are_always_the_same_and_normal() -> None:
    assert torch.equal(fixed_tokens(64), fixed_tokens(64))
    assert fixed_tokens(64).shape == (256, 64)
    assert float(fixed_tokens(64).std()) == pytest.approx(1.0, abs=0.02)


def test_models_that_do_not_load_completely_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from moesaic.construct.convert import convert

    dense = write_dense(tmp_path / "dense")
    moe = convert(dense, out=tmp_path / "moe", experts=4, top_k=2, verify="off")
    same, largest = logit_difference(dense, moe)
    assert is_exact(same, largest)
    file = moe / "model.safetensors"
    tensors = load_file(file)
    changed = dict(tensors)
    changed["model.layers.1.mlp.calculator.experts.weight_up.2"] = torch.zeros(12, 32)
    save_file(changed, file)
    assert not is_exact(*logit_difference(dense, moe))
    save_file({k: t for k, t in tensors.items() if k != "model.norm.weight"}, file)
    with pytest.raises(MoesaicError, match="missing keys"):
        logit_difference(dense, moe)
