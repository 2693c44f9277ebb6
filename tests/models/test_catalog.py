"""The catalog's 27 models: known by alias and hub id, built at full size, sizes as published."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moesaic
from moesaic.core.errors import UserError
from moesaic.models import families
from moesaic.models.catalog import aliases, catalog, find, refusal
from moesaic.models.checkpoint import Checkpoint
from tests.helpers import assert_user_error, run_cli
from tests.models.golden import FAMILIES
from tests.models.parity import Parity

NUM_LAYERS = {  # routed layers, experts, chosen, shared: from the published config.json
    "llamamoe": (32, 16, 4, 0),
    "llamamoe2": (32, 8, 2, 0),
    "llamamoe2s": (32, 7, 1, None),
    "powermoe": (32, 40, 8, 0),
    "olmoe": (16, 64, 8, 0),
    "switch": (12, 128, 1, 0),
    "jetmoe": (48, 8, 2, 0),
    "jetmoechat": (48, 8, 2, 0),
    "openmoe": (4, 32, 2, 0),
    "minicpm": (40, 8, 2, 0),
    "qwen": (24, 60, 4, 1),
    "qwen2": (28, 64, 8, 1),
    "qwen3": (48, 128, 8, 0),
    "deepseek2": (26, 64, 6, 2),
    "deepseek": (27, 64, 6, 2),
    "xverse": (28, 64, 6, 2),
    "yuan": (24, 32, 2, 0),
    "phi": (32, 16, 2, 0),
    "grin": (32, 16, 2, 0),
    "mixtral": (32, 8, 2, 0),
    "jamba": (16, 16, 2, 0),
    "nllb": (12, 128, 2, 0),
}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No file was downloaded, and there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "moesaic.models.catalog._fetch_config", lambda *_: (_ for _ in ()).throw(UserError("no"))
    )


def test_there_are_27_models_and_a_second_name():
    assert len(catalog()) == 27
    assert set(aliases()) - set(catalog()) == {"llamamoesft"}
    assert [alias for alias, entry in catalog().items() if entry.hub is None] == ["llamamoe2s"]


@pytest.mark.parametrize("alias", sorted(catalog()))
def test_every_model_is_built_at_full_size(alias, offline):
    """On the meta device: no memory. The published totals to two decimals, in billions."""
    entry = catalog()[alias]
    source = find(alias, config_only=True)
    assert source.catalogued
    assert refusal(source.config) is None
    assert source.fields["model_type"] == entry.family
    assert entry.family in CONFIG_MAPPING
    anatomy = moesaic.anatomy(alias)
    assert round(anatomy.params_total / 1e9, 2) == pytest.approx(entry.total, abs=0.0051)
    assert round(anatomy.params_active / 1e9, 2) == entry.active
    if alias in NUM_LAYERS:
        layers, experts, top_k, shared = NUM_LAYERS[alias]
        assert len(anatomy.layers) == layers
        for layer in anatomy.layers:
            assert (layer.num_experts, layer.top_k) == (experts, top_k)
            assert layer.router
            assert shared is None or layer.num_shared == shared


def test_models_of_one_shape_share_it():
    shapes = {alias: entry.config for alias, entry in catalog().items()}
    assert shapes["olmoe"] == shapes["olmoesft"] == shapes["olmoedpo"] == shapes["olmoeins"]
    assert shapes["jetmoe"] == shapes["jetmoesft"] != shapes["jetmoechat"]
    assert moesaic.anatomy("jetmoe") == moesaic.anatomy("jetmoechat")  # other names, same model


def test_info_of_an_alias_needs_no_network(offline):
    found = run_cli("info", "olmoe", "--json")
    assert found.exit_code == 0, found.stderr
    assert found.json["alias"] == "olmoe"
    assert found.json["catalogued"] is True
    assert found.json["anatomy"]["params_total"] == 6_919_161_856
    assert len(found.json["anatomy"]["layers"]) == 16
    shown = run_cli("info", "allenai/OLMoE-1B-7B-0125").stdout
    assert "8 of 64" in shown
    assert "6,919,161,856" in shown
    assert "catalog" in shown


def test_a_model_without_a_hub_id_is_described_but_not_loaded(offline):
    assert moesaic.anatomy("llamamoe2s").model_type == "llama_moe_v2"
    with pytest.raises(UserError, match="no public hub id"):
        moesaic.load("llamamoe2s")


def test_list_models_says_by_whose_class():
    listed = run_cli("list", "models", "--json").json
    assert set(listed) == set(catalog())
    assert "allenai/OLMoE-1B-7B-0125 (olmoe), 6.92 B parameters, 1.28 B active" in listed["olmoe"]
    assert "not loaded" not in "".join(listed.values())
    for alias, entry in catalog().items():
        ours = entry.family in families.families()
        assert ("moesaic's class" in listed[alias]) is ours, alias
        assert ("transformers' class" in listed[alias]) is not ours, alias
    for alias, words in {
        "nllb": "its two experts",
        "switch": "over an expert's capacity",
        "phi": "long ones are used",
        "jetmoechat": "GPT-style names",
    }.items():
        assert words in listed[alias]


def test_an_unknown_alias_names_the_nearest():
    assert_user_error(run_cli("info", "mixtrl"), "Did you mean 'mixtral'?")


@pytest.mark.parametrize("directory", sorted(FAMILIES.iterdir()), ids=lambda d: d.name)
def test_anatomy_counts_what_the_released_files_hold(directory):
    """Every golden checkpoint, in its original format."""
    assert moesaic.anatomy(directory).params_total == Checkpoint(directory).parameters


@pytest.mark.parametrize(
    ("alias", "fixture"),
    [
        ("olmoe", "olmoe"),
        ("nllb", "nllb_moe"),
        ("jetmoechat", "jetmoe_chat"),
        ("llamamoe2", "llama_moe_v2"),
        ("minicpm", "minicpm_moe"),
        ("grin", "grin_moe"),
        ("llamamoesft", "llama_moe"),
    ],
)
def test_a_downloaded_model_is_loaded_by_alias_and_by_hub_id(alias, fixture, tmp_path, monkeypatch):
    """From a cache as the hub's client writes it; what the file says of itself may be a lie."""
    hub = aliases()[alias].hub
    repository = tmp_path / f"models--{hub.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(FAMILIES / fixture, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.chdir(tmp_path)
    given = Parity(fixture).inputs()
    wanted = moesaic.load(FAMILIES / fixture, dtype=torch.float32)
    for name in (alias, hub):
        model = moesaic.load(name, cache_dir=tmp_path, local_files_only=True, dtype=torch.float32)
        assert type(model) is type(wanted)
        with torch.no_grad():
            assert torch.equal(model(**given).logits, wanted(**given).logits)
