"""All experts on are the dense model: every family by every split, and in every layout it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moesaic
from moesaic.construct.convert import convert
from moesaic.construct.export_layout import export_layout
from moesaic.construct.layouts import LAYOUTS, supports
from moesaic.construct.pipeline import Recipe, run
from moesaic.construct.router import RouterInit
from moesaic.construct.split import NeuronSplit
from moesaic.construct.splits import SPLITS
from moesaic.core.lineage import read_lineage
from moesaic.models.checkpoint import Checkpoint
from tests.construct.dense_family_models import FAMILIES, LLAMA3_ROPE, write_family
from tests.construct.dense_models import write_text_tokenizer

IDS = torch.arange(1, 49).view(2, 24) % 29
TEXT = {"tokens": 512, "context": 32}
SETTINGS: dict[str, dict[str, Any]] = {
    "cmoe": TEXT,
    "coactivation": TEXT,
    "energy": TEXT,
    "expertweaver": TEXT,
    "gradient": TEXT,
    "gradient-plus": TEXT,
    "static": TEXT,
}
# These give experts neurons in common, or read what another program wrote.
NOT_WHOLE = {"imported", "sharing-inner", "sharing-inter"}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def made(folder: Path, kind: str) -> tuple[Path, Path]:
    """A tiny dense model of a family with a tokenizer, and a text."""
    # fields with which more layouts have the family's attention
    wide: dict[str, Any] = {
        "llama": {"head_dim": 8},
        "mistral": {"rope_parameters": LLAMA3_ROPE, "sliding_window": None},
    }
    dense = write_family(folder / "dense", kind, **wide.get(kind, {}))
    write_text_tokenizer(dense)
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return dense, text


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("product", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_split_and_every_layout(kind: str, product: bool, tmp_path: Path) -> None:
    """With routers of zero every weight is equal; scaled by E, the experts add up to the MLP.

    A layout sees weights, not how they were divided, so each gets one split unless `product`.
    """
    dense, text = made(tmp_path, kind)
    wanted = logits(moesaic.load(dense, dtype=torch.float32))
    silent = RouterInit([{"weight": torch.zeros(4, 32)}] * 3, [None] * 3)
    options: dict[str, Any] = {"router": silent, "experts": 4, "top_k": 4, "scale": 4.0}
    tried = set()
    for turn, split in enumerate(sorted(set(SPLITS.names()) - NOT_WHOLE)):
        folder = tmp_path / split
        moe = convert(
            dense,
            out=folder / "moe",
            split={"method": split, **SETTINGS.get(split, {})},
            data=text,
            verify="layers",
            **options,
        )
        record = read_lineage(moe)
        assert record is not None
        assert record["exact"] is True, split  # whatever its router and weights
        found = logits(moesaic.load(moe, dtype=torch.float32))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0, msg=split)
        able = [layout for layout in LAYOUTS if supports(Checkpoint(moe).config, layout)]
        for layout in able if product else able[turn : turn + 1]:
            tried.add(layout)
            out = export_layout(moe, out=folder / layout, layout=layout)
            found = logits(moesaic.load(out, dtype=torch.float32))
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0, msg=f"{split} {layout}")
    assert tried == set(able)
    assert bool(able) is (kind in ("llama", "mistral", "qwen2", "qwen3", "olmo2", "deepseek_v3"))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_a_router_keeps_its_bias(kind: str, tmp_path: Path) -> None:
    """A bias alone chooses the expert, whatever the expert's number."""
    dense, _ = made(tmp_path, kind)
    width = Checkpoint(dense).config["intermediate_size"]

    def model(name: str, order: list[int], biased: int) -> Any:
        labels = [np.array(order)[np.arange(width) % 4]] * 3
        file = NeuronSplit.from_labels(labels, experts=4).save(tmp_path / f"{name}.safetensors")
        layer = {"weight": torch.zeros(4, 32), "bias": 3.0 * torch.eye(4)[biased]}
        router = RouterInit([layer] * 3, [None] * 3)
        out = convert(dense, out=tmp_path / name, split=str(file), router=router, top_k=1)
        return moesaic.load(out, dtype=torch.float32)

    first = model("first", [0, 1, 2, 3], biased=0)
    config = first.config.to_dict()
    assert config["gate_bias" if kind == "llama" else "router_bias"] is True
    found = logits(first)
    moved = logits(model("moved", [2, 1, 0, 3], biased=2))
    torch.testing.assert_close(moved, found, atol=1e-5, rtol=0)
    assert not torch.allclose(logits(model("other", [0, 1, 2, 3], biased=2)), found, atol=1e-2)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_construction_starts_from_the_dense_model(kind: str, tmp_path: Path) -> None:
    """Exact before the refit, nearer to the dense model after each stage, the same with a cache."""
    dense, text = made(tmp_path, kind)
    recipe = Recipe(experts=4, top_k=2, data=str(text), tokens=1024, context=32, refine="layerwise")
    figures = run(dense, recipe, folder=tmp_path)
    for layer in figures.layers:
        assert layer.facts["all_on"] < 1e-4
        errors = layer.facts["output_error"]
        assert 0 < errors["refit"] < errors["split"] < 1
        refined = layer.facts["refine"]
        assert refined["loss_after"] <= refined["loss_before"]
    everything: Any = {"num_experts_per_tok": 4}
    if Checkpoint(tmp_path / "split").config["model_type"] == "llama_moe":
        everything = {"num_selects": 4}
    found = logits(moesaic.load(tmp_path / "split", dtype=torch.float32, **everything))
    wanted = logits(moesaic.load(dense, dtype=torch.float32))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    # float64: what is compared is the cache, not how far rounding goes in random weights
    model: Any = moesaic.load(tmp_path / "refine", dtype=torch.float64)
    whole = logits(model)
    assert float((whole - wanted).abs().max()) > 1e-3
    cache, steps = None, []
    with torch.inference_mode():
        for step in range(IDS.shape[1]):
            out = model(IDS[:, step : step + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=0)
