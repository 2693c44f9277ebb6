"""`device_map.json` beside a model: used, checked before loading, overruled by an argument."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import moesaic
from moesaic.core.errors import UserError
from moesaic.models.anatomy import build
from moesaic.models.catalog import find
from moesaic.models.device_map import check_device_map, read_device_map
from tests.models.golden import FAMILIES
from tests.models.parity import Parity

EXAMPLE = Path(__file__).parents[2] / "docs" / "device_map.grin.json"


@pytest.fixture
def mixtral(tmp_path):
    shutil.copytree(FAMILIES / "mixtral", tmp_path / "model")
    return tmp_path / "model"


def write(directory, **parts):
    (directory / "device_map.json").write_text(json.dumps(parts))


WHOLE = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def test_it_decides_where_parts_go_and_changes_no_number(mixtral, tmp_path):
    write(mixtral, **WHOLE)
    given = Parity("mixtral").inputs()
    plain = moesaic.load(mixtral, dtype=torch.float32, device_map=None)
    placed = moesaic.load(mixtral, dtype=torch.float32, offload_folder=tmp_path / "offload")
    assert not hasattr(plain, "hf_device_map")
    assert placed.hf_device_map == WHOLE
    assert placed.model.layers[1].mlp.gate.weight.device.type == "meta"  # on disk until it is used
    with torch.no_grad():
        torch.testing.assert_close(placed(**given).logits, plain(**given).logits)


def test_auto_means_the_file_and_another_map_means_itself(mixtral, tmp_path):
    write(mixtral, **WHOLE)
    auto = moesaic.load(mixtral, device_map="auto", offload_folder=tmp_path / "offload")
    assert auto.hf_device_map == WHOLE
    assert not hasattr(moesaic.load(mixtral, device_map="cpu"), "hf_device_map")


def test_corrected_models_are_dispatched_corrected(tmp_path):
    """Corrections are in place before accelerate wraps the parts."""
    shutil.copytree(FAMILIES / "nllb_moe", tmp_path / "model")
    encoder = ["embed_tokens", "embed_positions", "layer_norm", *(f"layers.{n}" for n in range(4))]
    parts = {f"model.encoder.{name}": "cpu" for name in encoder}
    parts |= {"model.shared": "cpu", "model.decoder": "cpu", "lm_head": "cpu"}
    write(tmp_path / "model", **{**parts, "model.encoder.layers.1": "disk"})  # a routed layer
    given = Parity("nllb_moe").inputs()
    placed = moesaic.load(tmp_path / "model", dtype=torch.float32, offload_folder=tmp_path / "off")
    assert placed.hf_device_map["model.encoder.layers.1"] == "disk"
    plain = moesaic.load(FAMILIES / "nllb_moe", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(placed(**given).logits, plain(**given).logits)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({**WHOLE, "model.layers.2": "cpu"}, ["no part model.layers.2", "MixtralForCausalLM"]),
        ({**WHOLE, "model.embed_token": "cpu"}, ["Did you mean 'model.embed_tokens'?"]),
        (
            {k: v for k, v in WHOLE.items() if k != "model.layers.1"},
            ["no device to model.layers.1"],
        ),
        ({"model": "cpu"}, ["no device to lm_head"]),
        ({}, ["no device to model (and 1 more)"]),
        ({**WHOLE, "lm_head": 7}, ["lm_head to GPU 7", "this machine has"]),
        ({**WHOLE, "lm_head": "gpu"}, ["lm_head to 'gpu'", "'cpu' or 'disk'"]),
        ({**WHOLE, "lm_head": 1.5}, ["lm_head to 1.5"]),
    ],
)
def test_a_wrong_map_is_one_line_that_says_what(mixtral, parts, words):
    write(mixtral, **parts)
    with pytest.raises(UserError) as error:
        moesaic.load(mixtral)
    assert "\n" not in str(error.value)
    for word in [*words, "device_map.json"]:
        assert word in str(error.value)


@pytest.mark.parametrize(("text", "word"), [("{", "no valid JSON"), ("[1]", "not an object")])
def test_a_map_that_is_no_map(mixtral, text, word):
    (mixtral / "device_map.json").write_text(text)
    with pytest.raises(UserError, match=word):
        moesaic.load(mixtral)


def test_the_example_for_grin_fits_it(tmp_path, monkeypatch):
    """32 layers over 4 GPUs, as in the model-preparation seed."""
    shutil.copy(EXAMPLE, tmp_path / "device_map.json")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    found = read_device_map(tmp_path)
    assert found is not None
    assert [found[f"model.layers.{layer}"] for layer in (0, 7, 8, 31)] == [0, 0, 1, 3]
    check_device_map(found, build(find("grin", config_only=True)), file=EXAMPLE)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match=r"model\.layers\.16 to GPU 2; this machine has 2 GPUs"):
        read_device_map(tmp_path)
