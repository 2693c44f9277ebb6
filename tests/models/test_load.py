"""`moesaic.load`: every weight accounted for, clear errors, no remote code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moesaic
from moesaic.core.errors import UserError
from moesaic.models.catalog import find, refusal
from tests.models import tiny
from tests.models.golden import FAMILIES, V1, family

RELEASED = FAMILIES / "llama_moe"


@pytest.fixture
def released(tmp_path) -> Path:
    """A checkpoint in the released layout that a test may damage."""
    directory = tmp_path / "model"
    shutil.copytree(RELEASED, directory)
    return directory


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("mixtral")
    fields = {**tiny.SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}
    tiny.build(_class("MixtralForCausalLM"), CONFIG_MAPPING["mixtral"](**fields)).save_pretrained(
        directory
    )
    return directory


def _class(name: str) -> type:
    import transformers

    return getattr(transformers, name)


def _change_config(directory: Path, **fields) -> None:
    file = directory / "config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def _change_weights(directory: Path, change) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", ["llama_moe", "llama_moe_uneven", "llama_moe_seqcls"])
def test_released_models_load_with_our_kernels_and_give_the_original_logits(name, kind):
    directory = FAMILIES / name
    model = moesaic.load(kind(directory), dtype=torch.float32)
    assert (
        type(model).__name__
        == json.loads((directory / "config.json").read_text())["architectures"][0]
    )
    assert model.config._experts_implementation == "moesaic"
    assert not model.training
    inputs, expected = family(name)
    logits = model(input_ids=inputs["input_ids"]).logits
    assert (logits - expected["plain/logits"]).abs().max() < 1e-4


def test_from_pretrained_keywords_pass_through(mixtral):
    model = moesaic.load(
        mixtral,
        dtype=torch.bfloat16,
        attn_implementation="eager",
        experts_implementation="eager",
        output_router_logits=True,
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model.config._experts_implementation == "eager"
    assert model.config.output_router_logits
    assert moesaic.load(mixtral).config._experts_implementation == "moesaic"


def test_bad_fields_are_refused_whatever_way_they_come(mixtral):
    v2 = FAMILIES / "llama_moe_v2"
    for directory, fields, words in (
        (v2, {"balance_loss": "swich"}, "Did you mean 'switch'. Available: constant-original"),
        (v2, {"num_experts_per_tok": 99}, "num_experts_per_tok=99 but the model has"),
        (FAMILIES / "llama_moe", {"load_rule": "foo"}, "'foo'. Available: original, shazeer"),
        (mixtral, {"num_experts_per_tok": 9}, "has 4 experts. Give 1 to 4"),
    ):
        with pytest.raises(UserError, match=words):
            moesaic.load(directory, **fields)
        config = moesaic.load(directory).config
        for name, value in fields.items():
            setattr(config, name, value)
        with pytest.raises(UserError, match=words):
            moesaic.load(directory, config=config)
    with pytest.raises(UserError, match="shazeer"):  # without us between
        AutoModelForCausalLM.from_pretrained(FAMILIES / "llama_moe", load_rule="foo")
    assert moesaic.load(v2, balance_loss="constant-original").config.balance_loss != "switch"


def test_a_dense_model_loads_without_an_experts_implementation(tmp_path):
    tiny.dense(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert type(moesaic.load(tmp_path)).__name__ == "LlamaForCausalLM"


def test_rotary_tables_are_harmless(released):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    _change_weights(released, add)
    moesaic.load(released)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), ["1 missing (model.norm.weight)"]),
        (lambda t: t.update(extra=torch.ones(2)), ["1 unexpected (extra)"]),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(5)}),
            ["1 of another shape", "model.norm.weight [5] for [32]"],
        ),
        (
            lambda t: t.update({"lm_head.wait": t.pop("lm_head.weight")}),
            ["missing (lm_head.weight)", "unexpected (lm_head.wait)"],
        ),
        (
            lambda t: t.pop("model.layers.1.mlp.calculator.experts.weight_up.3"),
            ["model.layers.1.mlp.calculator.experts"],
        ),
    ],
)
def test_weights_that_do_not_fit_are_listed(released, change, words, capfd):
    _change_weights(released, change)
    with pytest.raises(UserError) as error:
        moesaic.load(released)
    assert "\n" not in str(error.value)
    for word in ["do not fit LlamaMoEForCausalLM", *words]:
        assert word in str(error.value), str(error.value)
    assert "LOAD REPORT" not in "".join(capfd.readouterr())  # told once, by us


def test_other_shapes_are_taken_when_asked_for(released):
    _change_weights(released, lambda t: t.update({"model.norm.weight": torch.ones(5)}))
    moesaic.load(released, ignore_mismatched_sizes=True)


def test_many_missing_tensors_are_counted(released):
    _change_config(released, num_hidden_layers=5, size_experts=None)
    with pytest.raises(UserError, match=r"\d+ missing .*and \d+ more"):
        moesaic.load(released)


def _truncate(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, "truncated"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: (d / "config.json").write_text("{"), "no valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "not an object"),
        (lambda d: _change_config(d, architectures=["SomeNet"]), "there is no class SomeNet"),
        (lambda d: _change_config(d, num_selects=99), "num_selects=99"),
        (lambda d: _change_config(d, vocab_size="many"), "cannot be loaded"),
    ],
)
def test_damaged_directories_are_one_line_errors(released, damage, words):
    damage(released)
    with pytest.raises(UserError) as error:
        moesaic.load(released)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mixtrl", "Did you mean 'mixtral'?"),
        ("/nowhere/at/all", "does not exist"),
        ("a/b/c", "does not exist"),
        ("tests/no-such-model", "no local directory"),  # tests/ is here: not asked for on the hub
        (Path("mistralai/Mixtral"), "does not exist"),  # a Path is never looked for on the hub
        ("llamamoe2s", "no public hub id"),
        ("organisation/name", "from the hub"),
        ("mixtral", "mistralai/Mixtral-8x7B-v0.1"),
        ("llamamoesft", "llama-moe/LLaMA-MoE-v1-3_5B-4_16-sft"),
    ],
)
def test_names_that_lead_nowhere(name, words, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(UserError, match=None) as error:
        moesaic.load(name, cache_dir=str(tmp_path))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_directory_wins_over_an_alias(released, monkeypatch):
    monkeypatch.chdir(released.parent)
    released.rename(released.parent / "mixtral")
    assert find("mixtral").directory is not None
    assert moesaic.load("mixtral").config.model_type == "llama_moe"


def test_remote_code_is_never_run(released, monkeypatch):
    _change_config(
        released, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.C"}
    )
    (released / "evil.py").write_text("raise SystemExit('remote code ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    assert type(moesaic.load(released)).__module__.startswith("moesaic.")
    with pytest.raises(UserError, match="never runs remote code"):
        moesaic.load(released, trust_remote_code=True)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["SomeForCausalLM"]}, ["no model_type", "SomeForCausalLM"]),
        ({"model_type": "yuan9"}, ["'yuan9' (no architecture) is known neither"]),
        (
            {"model_type": "some-net", "auto_map": {"AutoModel": "evil.Model"}},
            ["never run", "families/some_net.py", "add-a-family.md"],
        ),
        ({"architectures": ["ANet"], "auto_map": {}}, ["no model_type (and ANet)"]),
    ],
)
def test_models_of_unknown_code_are_refused(released, config, words):
    (released / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is not loaded") as error:
        moesaic.load(released)
    for word in words:
        assert word in refusal(config)
        assert word in str(error.value)


def test_known_models_are_not_refused():
    for model_type in ("mixtral", "deepseek_v2", "jetmoe", "llama_moe", "llama", "nllb-moe"):
        assert refusal({"model_type": model_type}) is None


def test_our_kernels_are_really_called_after_a_dense_model(mixtral, tmp_path, monkeypatch):
    """transformers remembers for a class, and its heirs, that it has no experts to replace."""
    from moesaic.kernels import grouped

    tiny.dense().save_pretrained(tmp_path)
    moesaic.load(tmp_path)
    calls = []
    ours = grouped.experts
    monkeypatch.setattr(grouped, "experts", lambda *a, **k: (calls.append(1), ours(*a, **k))[1])
    for directory in (RELEASED, FAMILIES / "llama_moe_uneven", V1 / "moe_sharing_inter", mixtral):
        calls.clear()
        moesaic.load(directory, dtype=torch.float32)(input_ids=tiny.ids())
        assert len(calls) >= 2, directory  # two layers
        calls.clear()
        model = moesaic.load(directory, dtype=torch.float32, experts_implementation="eager")
        model(input_ids=tiny.ids())
        assert not calls, directory


def test_a_class_name_with_other_capitals_is_found(mixtral, tmp_path):
    """JetMoE and Phi-3.5-MoE publish names that transformers spells otherwise."""
    shutil.copytree(mixtral, tmp_path / "model")
    _change_config(tmp_path / "model", architectures=["MixTralForCausalLM"])
    assert type(moesaic.load(tmp_path / "model")).__name__ == "MixtralForCausalLM"


def test_a_config_without_architectures_is_a_language_model(mixtral, tmp_path):
    shutil.copytree(mixtral, tmp_path / "model")
    _change_config(tmp_path / "model", architectures=None)
    assert type(moesaic.load(tmp_path / "model")).__name__ == "MixtralForCausalLM"


def test_the_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "loading.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    shutil.copytree(RELEASED, tmp_path / "runs" / "moe")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "page", "exec"), {})
    assert "LlamaMoEForCausalLM" in capsys.readouterr().out
