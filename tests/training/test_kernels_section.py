"""The section `kernels` of a training run: its keys have an effect or are refused."""

import json

import pytest

from moesaic.core.errors import UserError
from moesaic.kernels import grouped, options, select
from moesaic.kernels.options import Launch
from moesaic.training.loop import plan, read_config, train
from tests.training import models


@pytest.fixture
def mixtral(settings, checkpoint):
    """Settings of a run on a small Mixtral."""
    model = str(checkpoint(models.mixtral))
    return lambda **extra: {**settings(steps=2), "model": model, **extra}


@pytest.mark.parametrize(
    "extra",
    [{"kernels": {"moe_kernels": True, "moe_kernel_models": ["mixtral"]}}, {"moe_kernels": True}],
    ids=["section", "top level, as in the seed"],
)
def test_our_kernels_run(extra, mixtral, tmp_path, monkeypatch):
    calls = []
    ours = grouped.experts
    monkeypatch.setattr(grouped, "experts", lambda *a, **k: (calls.append(1), ours(*a, **k))[1])
    out = train(mixtral(**extra), out=tmp_path / "run")
    assert calls
    assert "moe_kernels: true" in (out / "train.yaml").read_text()


def test_false_leaves_them_out(mixtral, tmp_path, monkeypatch):
    monkeypatch.setattr(grouped, "experts", None)  # a call would fail
    train(mixtral(kernels={"moe_kernels": False}), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"kernels": {"moe_group_size": 128}}, "moe_group_size has no effect here.*need a GPU"),
        ({"moe_persistent_kernel": True}, "moe_persistent_kernel has no effect here"),
        ({"kernels": {"moe_kernel_models": ["qwen3_moe"]}}, "leaves out 'mixtral'"),
        ({"kernels": {}, "experts": "eager"}, "Leave one out"),
        ({"kernels": {}, "moe_kernels": True}, "not both"),
        ({"kernels": {"moe_kernel": True}}, "moe_kernels"),
    ],
)
def test_what_has_no_effect_is_refused(extra, words, mixtral, tmp_path):
    given = mixtral(**extra)
    with pytest.raises(UserError, match=words):
        train(given, out=tmp_path / "run")
    with pytest.raises(UserError, match=words):
        plan(read_config(given))
    assert not (tmp_path / "run").exists()


def test_a_dense_model_is_refused(settings, checkpoint, tmp_path):
    given = {**settings(steps=2), "model": str(checkpoint(models.dense)), "kernels": {}}
    with pytest.raises(UserError, match="without experts"):
        train(given, out=tmp_path / "run")


def test_launch_parameters_hold_for_their_run_only(mixtral, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "_current", Launch())
    with monkeypatch.context() as patch:
        patch.setattr(select, "why_not_fused", lambda module, **where: None)
        patch.setattr(select, "why_not_persistent", lambda device, tile_rows: None)
        seen = []
        ours = grouped.experts
        patch.setattr(
            grouped, "experts", lambda *a, **k: (seen.append(options.current()), ours(*a, **k))[1]
        )
        given = mixtral(kernels={"moe_group_size": 64, "moe_persistent_kernel": False})
        out = train(given, out=tmp_path / "run")
        assert set(seen) == {Launch(block_m=64, persistent=False)}
    train(mixtral(), out=tmp_path / "plain")
    assert options.current() == Launch()
    assert json.loads((out / "config.json").read_text())["model_type"] == "mixtral"
