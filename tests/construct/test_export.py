"""LLaMA-MoE back to dense: the inverse of convert, and the mixture it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.construct.convert import convert
from moesaic.construct.export import export
from moesaic.construct.router import RouterInit
from moesaic.construct.split import FILE_NAME, NeuronSplit
from moesaic.core.lineage import read_lineage
from moesaic.models.checkpoint import Checkpoint
from tests.construct.dense_models import edit_config, write_dense
from tests.helpers import assert_user_error, run_cli


def load(path: Path, **config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    import moesaic.models  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **config).eval()


def logits(path: Path, **config: Any) -> torch.Tensor:
    with torch.inference_mode():
        return load(path, **config)(torch.arange(1, 61).view(2, 30)).logits


@pytest.mark.parametrize(
    ("make", "options"),
    [
        ({}, {"experts": 4, "top_k": 2}),
        ({"tie_word_embeddings": True, "dtype": torch.bfloat16}, {"experts": 6, "top_k": 2}),
        ({"family": "Mistral", "shard": "20KB"}, {"experts": 4, "top_k": 2, "shared": 1}),
        ({"head": "ForQuestionAnswering"}, {"experts": 4, "top_k": 2}),
        ({"mlp_bias": True}, {"experts": 4, "shared": 1, "top_k": 2}),
    ],
    ids=["plain", "tied bf16", "mistral shared", "question answering", "mlp bias"],
)
def test_export_undoes_convert_bit_for_bit(
    make: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    dense = write_dense(tmp_path / "dense", **make)
    moe = convert(dense, out=tmp_path / "moe", verify="layers", **options)
    back = Checkpoint(export(moe, out=tmp_path / "back", max_shard_bytes=30_000))
    before = Checkpoint(dense)
    assert back.keys() == before.keys()
    for key in before.keys():  # noqa: SIM118
        assert torch.equal(back.read(key), before.read(key)), key
    assert back.config["model_type"] == "llama"
    assert not [key for key in back.config if "gate" in key or "expert" in key]
    lineage = read_lineage(tmp_path / "back")
    assert lineage["neuron_order"] == "dense"
    assert lineage["parent_lineage"]["step"] == "convert"


def test_without_the_split_the_neurons_follow_the_experts(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    moe = convert(dense, out=tmp_path / "moe", experts=4, top_k=2, verify="off")
    (moe / FILE_NAME).unlink()
    back = export(moe, out=tmp_path / "back")
    rows = [Checkpoint(p).read("model.layers.0.mlp.up_proj.weight") for p in (dense, back)]
    assert not torch.equal(*rows)
    assert torch.equal(*(r[r.sum(1).argsort()] for r in rows))
    torch.testing.assert_close(logits(back), logits(dense), atol=1e-4, rtol=0)


def test_repeated_neurons_stay_repeated(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    order = np.random.default_rng(1).permutation(48)
    layers = [[order[:30], order[10:40]], [order[5:18], order[:47][::-1]]]
    split = NeuronSplit(layers, [[], []], 48)
    moe = convert(dense, out=tmp_path / "moe", split=split, top_k=1)
    back = export(moe, out=tmp_path / "back")
    assert Checkpoint(back).config["intermediate_size"] == 60
    wanted = logits(moe, num_selects=2, multiply_gate_scores=False)
    torch.testing.assert_close(logits(back), wanted, atol=1e-4, rtol=0)
    assert not torch.allclose(logits(back), logits(dense), atol=1e-2)


def with_flat_router(dense: Path, moe: Path, **options: Any) -> Path:
    """A mixture whose router gives every expert the same score."""
    shared = options.get("shared", 0)
    routed = options["experts"] - shared
    router = RouterInit(
        [{"weight": torch.zeros(routed, 32)}] * 2,
        [torch.zeros(shared, 32) if shared else None] * 2,
    )
    return convert(dense, out=moe, router=router, verify="off", **options)


@pytest.mark.parametrize("shared", [0, 2])
def test_uniform_scores_fold_the_scale_in(shared: int, tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    moe = with_flat_router(
        dense,
        tmp_path / "moe",
        experts=6,
        shared=shared,
        top_k=3,
        scale=[3.0, 5.0],
        shared_scale=1.5,
    )
    back = export(moe, out=tmp_path / "back", scores="uniform")
    wanted = logits(moe, num_selects=6 - shared)
    torch.testing.assert_close(logits(back), wanted, atol=1e-4, rtol=0)
    assert not torch.allclose(logits(export(moe, out=tmp_path / "off")), wanted, atol=1e-2)


def test_the_command_says_that_the_scale_is_left_out(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    moe = convert(dense, out=tmp_path / "moe", experts=4, top_k=2, verify="off")
    result = run_cli("export", moe, "-o", tmp_path / "back")
    assert result.exit_code == 0, result.stderr
    assert "score_scale_factor 2.0" in " ".join(result.stderr.split())
    assert result.stdout.splitlines()[-1] == str(tmp_path / "back")
    assert_user_error(run_cli("export", dense, "-o", tmp_path / "x"), "'llama'", "llama_moe")
    edit_config(moe, gate_use_softmax=False)
    command = ("export", moe, "-o", tmp_path / "x", "--scores")
    assert_user_error(run_cli(*command, "uniform"), "raw logits", "off")
    assert_user_error(run_cli(*command, "all"), "scores='all'")
    key = "model.layers.0.mlp.calculator.experts.weight_up.3"
    from safetensors.torch import load_file, save_file

    tensors = load_file(moe / "model.safetensors")
    save_file(
        {k: t for k, t in tensors.items() if "weight_gate.3" not in k}, moe / "model.safetensors"
    )
    assert_user_error(run_cli("export", moe, "-o", tmp_path / "x"), "lacks expert 3 of layer 0")
    tensors[key][0, 0] = float("nan")
    save_file(tensors, moe / "model.safetensors")
    assert_user_error(run_cli("export", moe, "-o", tmp_path / "x"), key, "nan")
    assert not (tmp_path / "x").exists()
