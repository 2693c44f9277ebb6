"""The seed's keys reach the kernels as launch parameters, or are refused with the reason."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import moesaic.kernels.triton as fused
from moesaic.core.config import parse
from moesaic.core.errors import UserError
from moesaic.kernels import options, select
from moesaic.kernels.options import KernelsConfig, Launch, configure
from moesaic.kernels.triton import multiply
from tests.kernels.families import tiny


@pytest.fixture
def experts(monkeypatch):
    """Experts that the fused kernels take; what is put in force is taken back."""
    monkeypatch.setattr(options, "_current", Launch())
    monkeypatch.setattr(select, "_why_no_triton", lambda device: None)
    monkeypatch.setattr(select, "_triton", _Takes)
    return [tiny("mixtral").model.layers[0].mlp.experts]


class _Takes:
    hopper = True

    @classmethod
    def why_not_persistent(cls, device, tile_rows):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(multiply, "hopper", lambda device: cls.hopper)
            return fused.why_not_persistent(device, tile_rows)

    @staticmethod
    def why_not(x_TD, gate_up_EJD, down_EDI, ids_TK):
        if {x_TD.dtype, gate_up_EJD.dtype, down_EDI.dtype} != {torch.bfloat16}:
            return "they take bfloat16"
        return None if gate_up_EJD.shape == (6, 48, 32) else "unknown shapes"


def test_the_seeds_section_becomes_launch_parameters(experts):
    config = parse(
        KernelsConfig,
        {"moe_kernels": True, "moe_group_size": 128, "moe_persistent_kernel": False},
        source="test",
    )
    assert configure(config, experts=experts, dtype=torch.bfloat16) == options.current()
    assert options.current() == Launch(block_m=128, persistent=False)
    assert str(options.current()) == "tiles of 128 rows, one program a tile"
    assert config.implementation == "moesaic"


def test_nothing_said_is_tuned(experts):
    configure(KernelsConfig(moe_group_size=32), experts=experts, dtype=torch.bfloat16)
    assert configure(KernelsConfig(), experts=experts) == Launch()
    assert str(Launch()) == "tuned tiles, persistent"


def test_launch_parameters_are_put_back():
    before = options.current()
    with options.using(Launch(block_m=16)) as launch:
        assert options.current() is launch
    assert options.current() is before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"moe_group_size": 100}, "moe_group_size"),
        ({"moe_groupsize": 128}, "moe_group_size"),
        ({"moe_kernels": False, "moe_group_size": 128}, "moe_group_size has no effect"),
        ({"moe_kernels": False, "moe_persistent_kernel": True}, "no effect with moe_kernels"),
        ({"moe_kernels": False, "moe_kernel_models": ["mixtral"]}, "no effect with moe_kernels"),
    ],
)
def test_contradictions_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        parse(KernelsConfig, given, source="test")


def test_model_types(experts):
    chosen = KernelsConfig(moe_kernel_models=["mixtral", "deepseek-v3"])
    configure(chosen, model_type="mixtral", experts=experts)
    configure(chosen, model_type="deepseek_v3", experts=experts)
    with pytest.raises(UserError, match="leaves out 'qwen2_moe'"):
        configure(chosen, model_type="qwen2_moe", experts=experts)
    unknown = KernelsConfig(moe_kernel_models=["mixtrall"])
    known = ["mixtral", "qwen2_moe"]
    with pytest.raises(UserError, match=r"no model type 'mixtrall'.*mixtral"):
        configure(unknown, model_type="mixtral", known_types=known, experts=experts)


@pytest.mark.parametrize("given", [{"moe_group_size": 128}, {"moe_persistent_kernel": True}])
def test_launch_options_without_fused_kernels_are_refused(given, monkeypatch):
    monkeypatch.setattr(options, "_current", Launch())
    experts = [tiny("mixtral").model.layers[0].mlp.experts]
    (key,) = given
    with pytest.raises(UserError, match=rf"kernels\.{key} has no effect here: .*need a GPU"):
        configure(KernelsConfig(**given), experts=experts)
    unusual = [tiny("gpt_oss").model.layers[0].mlp.experts]
    with pytest.raises(UserError, match="biases"):
        configure(KernelsConfig(**given), experts=unusual)
    assert options.current() == Launch()


@pytest.mark.parametrize("wanted", [True, False])
def test_tiles_that_have_a_program_each_cannot_be_persistent(wanted, experts, monkeypatch):
    asked = {"moe_persistent_kernel": wanted, "moe_group_size": 64}
    with pytest.raises(UserError, match="moe_persistent_kernel has no effect here: tiles of 64"):
        configure(KernelsConfig(**asked), experts=experts, dtype=torch.bfloat16)
    for rows in (None, 128):
        asked["moe_group_size"] = rows
        launch = configure(KernelsConfig(**asked), experts=experts, dtype=torch.bfloat16)
        assert launch == Launch(block_m=rows, persistent=wanted)
    monkeypatch.setattr(_Takes, "hopper", False)
    with pytest.raises(
        UserError, match=r"moe_persistent_kernel has no effect here: only .* Hopper"
    ):
        configure(KernelsConfig(**asked), experts=experts, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("launch", "hopper", "words"),
    [
        (Launch(), True, "tuned tiles, persistent."),
        (Launch(block_m=128, persistent=False), True, "tiles of 128 rows, one program a tile."),
        (Launch(block_m=64), True, "tiles of 64 rows, one program a tile."),
        (Launch(), False, "tuned tiles, one program a tile."),
    ],
)
def test_what_is_said_is_what_runs(launch, hopper, words, experts, monkeypatch):
    said = []
    monkeypatch.setattr(select, "_said", {})
    monkeypatch.setattr(select, "note", said.append)
    monkeypatch.setattr(_Takes, "hopper", hopper)
    with options.using(launch):
        select._say_fused("Experts", torch.device("cpu"))
    assert said == [f"Experts: fused Triton kernels, {words}"]


def test_the_type_that_counts_is_that_of_the_products(experts):
    asked = KernelsConfig(moe_group_size=16)
    with pytest.raises(UserError, match="they take bfloat16"):
        configure(asked, experts=experts)
    assert configure(asked, experts=experts, dtype=torch.bfloat16).block_m == 16


def test_a_dense_model_has_nothing_to_configure():
    with pytest.raises(UserError, match="without experts"):
        configure(KernelsConfig(), experts=[])
