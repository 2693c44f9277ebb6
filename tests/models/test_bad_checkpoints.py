"""Damaged and hostile model directories: one line that says what is wrong, and no code is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, MixtralForCausalLM

import moesaic
from moesaic.core.errors import UserError
from tests.models.golden import FAMILIES


@pytest.fixture
def copy(tmp_path):
    def make(family):
        directory = tmp_path / family
        directory.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(FAMILIES / family / name, directory / name)
        return directory

    return make


def configure(**fields):
    def change(directory):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **fields}))

    return change


def weights(change):
    def rewrite(directory):
        file = directory / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return rewrite


W1 = "model.layers.0.block_sparse_moe.experts.3.w1.weight"


@pytest.mark.parametrize(
    ("family", "damage", "words"),
    [
        ("mixtral", configure(num_local_experts=4), ["6 of another shape", "[8, 32] for [4, 32]"]),
        ("mixtral", configure(num_local_experts=12), ["6 of another shape"]),
        ("deepseek_moe", configure(n_routed_experts=4), ["6 of another shape"]),
        ("mixtral", configure(intermediate_size=24), ["4 of another shape"]),
        ("olmoe", configure(num_hidden_layers=3), ["11 missing", "model.layers.2.mlp.gate.weight"]),
        ("olmoe", configure(num_hidden_layers=1), ["11 unexpected", "model.layers.1.mlp"]),
        ("olmoe", configure(num_experts_per_tok=9), ["num_experts_per_tok=9", "8 experts"]),
        ("mixtral", configure(hidden_size="big"), ["hidden_size", "expected int"]),
        # a file of Mixtral that says it were a LLaMA-MoE-v2 with a residual expert
        (
            "mixtral",
            configure(scale_factor=4.0, intermediate_size_residual=16),
            ["LlamaMoEV2ForCausalLM", "6 missing", "mlp_residual.w1"],
        ),
        ("mixtral", weights(lambda t: t.pop(W1)), [f"1 missing ({W1})"]),
        (
            "mixtral",
            weights(lambda t: t.update({W1: torch.zeros(5, 32)})),
            [f"1 of another shape ({W1} [5, 32] where others have [12, 32])"],
        ),
        (
            "switch_transformers",
            weights(lambda t: t.update(extra=torch.zeros(1))),
            ["1 unexpected (extra)"],
        ),
    ],
)
def test_config_and_weights_that_disagree(copy, family, damage, words):
    directory = copy(family)
    damage(directory)
    with pytest.raises(UserError) as error:
        moesaic.load(directory)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "is truncated"),
        (lambda file: file.write_bytes(b""), "is truncated"),
        (lambda file: file.write_bytes(b"\xff" * 200), "safetensors file"),
        (lambda file: file.unlink(), "is missing"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path, damage, words):
    moesaic.load(FAMILIES / "olmoe").save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    damage(shards[1])
    with pytest.raises(UserError) as error:
        moesaic.load(tmp_path)
    assert words in str(error.value)
    assert shards[1].name in str(error.value)


class Harm:
    """Unpickling it runs a command."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("plain", [True, False], ids=["pickle", "torch.save"])
def test_a_bin_that_would_run_code_is_refused(copy, tmp_path, plain):
    directory, mark = copy("mixtral"), tmp_path / "harm"
    (directory / "model.safetensors").unlink()
    file = directory / "pytorch_model.bin"
    if plain:
        file.write_bytes(pickle.dumps({"lm_head.weight": Harm(mark)}))
    else:
        torch.save({"lm_head.weight": Harm(mark)}, file)
    with pytest.raises(UserError, match=r"pytorch_model\.bin .*it could run code"):
        moesaic.load(directory)
    assert not mark.exists()


def test_a_bin_of_tensors_loads(copy):
    directory = copy("mixtral")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    loaded, plain = moesaic.load(directory), moesaic.load(FAMILIES / "mixtral")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_no_file_of_a_repository_is_run_nor_asked_about(copy, monkeypatch):
    """Code beside the weights, named by auto_map, for a family of ours and one of transformers."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    for family in ("mixtral", "deepseek_moe", "minicpm_moe", "llama_moe_v2"):
        directory = copy(family)
        (directory / "evil.py").write_text("raise SystemExit('remote code ran')")
        configure(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})(directory)
        model = moesaic.load(directory)
        assert type(model).__module__.startswith(("moesaic.", "transformers."))
        model.save_pretrained(directory / "saved")
        assert "auto_map" not in json.loads((directory / "saved" / "config.json").read_text())


def test_dtype_and_quantization_pass_through(monkeypatch):
    assert moesaic.load(FAMILIES / "mixtral", dtype=torch.bfloat16).dtype == torch.bfloat16
    given = {}

    def refuse(cls, *args, **kwargs):
        given.update(kwargs)
        raise ImportError("bitsandbytes is not here")

    monkeypatch.setattr(MixtralForCausalLM, "from_pretrained", classmethod(refuse))
    config = BitsAndBytesConfig(load_in_8bit=True)
    for options in ({"quantization_config": config}, {"load_in_8bit": True}):
        with pytest.raises(UserError, match="bitsandbytes is not here"):
            moesaic.load(FAMILIES / "mixtral", **options)
        assert given["quantization_config"].load_in_8bit
    with pytest.raises(UserError, match="bitsandbytes is not here"):
        moesaic.load(FAMILIES / "mixtral", load_in_4bit=True, dtype=torch.float16)
    assert given["quantization_config"].load_in_4bit
    assert given["dtype"] == torch.float16
    with pytest.raises(UserError, match="Give one of"):
        moesaic.load(FAMILIES / "mixtral", load_in_4bit=True, load_in_8bit=True)
