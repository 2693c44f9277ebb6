import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.construct.scratch import InitConfig, empty_model, init, model_config, read_preset
from moesaic.core.errors import UserError
from moesaic.recipes import recipes
from tests.helpers import assert_user_error, run_cli

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

# Counted by hand from the shapes for llama-4m; those of the seed are in its own documents (1.517,
# 1.322 and 3.248 B).
COUNTS = {
    "llama-4m": 3_935_424,
    "mixtral-1b": 1_013_613_568,
    "mixtral-1b-seed": 1_516_930_048,
    "qwen2-moe-1b": 1_020_363_776,
    "qwen2-moe-1b-seed": 1_322_353_664,
    "deepseek-v3-1b": 1_121_004_544,
    "deepseek-v3-1b-seed": 3_248_129_024,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
}


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", sorted(recipes("init")))
def test_every_preset_builds_with_the_documented_count(name):
    model = empty_model(model_config(read_preset(name)))
    count = sum(p.numel() for p in model.parameters())
    assert count == COUNTS.get(name, count)


def test_llama_4m_is_what_its_shapes_say_and_fits_in_8_mb():
    attention = 2 * 192 * 192 + 2 * 192 * 64
    layer = attention + 3 * 192 * 512 + 2 * 192
    assert COUNTS["llama-4m"] == 4096 * 192 + 8 * layer + 192
    assert 2 * COUNTS["llama-4m"] < 8_000_000


def test_qwen2_and_deepseek_presets_have_the_widths_of_the_kernel_table():
    config = model_config(read_preset("qwen2-moe-1b"))
    assert (config.hidden_size, config.moe_intermediate_size) == (1024, 640)
    config = model_config(read_preset("deepseek-v3-1b"))
    assert (config.moe_intermediate_size, config.n_shared_experts) == (512, 2)
    assert model_config(read_preset("mixtral-1b")).intermediate_size == 2304


def test_init_writes_a_seeded_model_that_loads(tmp_path):
    wanted = InitConfig(model_type="llama", config=TINY, seed=3)
    torch.manual_seed(5)
    init(wanted, out=tmp_path / "a")
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1)), "the caller's generator must not move"
    init(wanted, out=tmp_path / "b")
    init(wanted, out=tmp_path / "c", seed=4)
    a, b, c = (AutoModelForCausalLM.from_pretrained(tmp_path / x).state_dict() for x in "abc")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)
    lineage = json.loads((tmp_path / "a" / "moesaic.json").read_text())
    assert lineage["step"] == "init"
    assert lineage["seed"] == 3


def test_rope_theta_arrives_where_the_model_reads_it():
    config = model_config(InitConfig(model_type="llama", config=TINY | {"rope_theta": 5e5}))
    assert config.rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_sizze": 16}, "hidden_sizze.*no such field.*did you mean 'hidden_size'"),
        ({"num_hidden_layer": 2}, "did you mean 'num_hidden_layers'"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"experts": 4}, "no such field"),
        ({"hidden_size": 15}, "15"),
        ({"hidden_act": "sulu"}, "sulu"),
        ({"vocab_size": -1}, "-1"),
    ],
)
def test_wrong_fields_are_refused(fields, words):
    with pytest.raises(UserError, match="(?i)" + words):
        empty_model(model_config(InitConfig(model_type="llama", config=TINY | fields)))


def test_a_field_that_the_class_does_not_keep_is_an_error(monkeypatch):
    from transformers import LlamaConfig

    original = LlamaConfig.__post_init__

    def forgetful(self, **kwargs):
        original(self, **kwargs)
        self.hidden_act = "silu"

    monkeypatch.setattr(LlamaConfig, "__post_init__", forgetful)
    with pytest.raises(UserError, match="hidden_act: asked for 'gelu', LlamaConfig made it 'silu'"):
        model_config(InitConfig(model_type="llama", config=TINY | {"hidden_act": "gelu"}))


def test_yaml_floats_without_a_dot_are_numbers(tmp_path):
    path = write(
        tmp_path / "m.yaml", "model_type: llama\nconfig: {rms_norm_eps: 1e-5, rope_theta: 1e6}\n"
    )
    config = model_config(read_preset(path))
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters["rope_theta"] == 1e6


def test_command_line(tmp_path):
    from moesaic.data.tokenizer import train_tokenizer

    folder = train_tokenizer(
        write(tmp_path / "t.txt", "some words " * 9), out=tmp_path / "tok", vocabulary=300
    )
    out = tmp_path / "m"
    arguments = ["llama-moe-tiny", "--set", "config.vocab_size=300", "--tokenizer", folder]
    result = run_cli("init", *arguments, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    report = result.json
    assert report["architecture"] == "LlamaMoEForCausalLM"
    assert 0 < report["active_parameters"] < report["parameters"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == report["parameters"]
    assert len(AutoTokenizer.from_pretrained(out)) <= 300

    again = run_cli("init", *arguments, "-o", out)
    assert_user_error(again, "not empty")
    small = ["--set", "config.vocab_size=20", "--tokenizer", folder]
    assert_user_error(run_cli("init", "llama-4m", *small, "-o", tmp_path / "x"), "vocab_size")
    assert_user_error(run_cli("init", "lama-4m", "-o", tmp_path / "x"), "did you mean 'llama-4m'")
    bad = write(tmp_path / "bad.yaml", "model_type: llamma\n")
    assert_user_error(run_cli("init", bad, "-o", tmp_path / "x"), "llamma", "did you mean 'llama'")
    bad = write(tmp_path / "bad2.yaml", "model_type: bert\nconfigs: {}\n")
    assert_user_error(run_cli("init", bad, "-o", tmp_path / "x"), "did you mean 'config'")
    assert not (tmp_path / "x").exists()


def test_saving_shows_no_bar_and_others_may_read(tmp_path, capfd):
    import os
    import stat

    mask = os.umask(0o022)
    try:
        init(InitConfig(model_type="llama", config=TINY), out=tmp_path / "a")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a" / "model.safetensors").stat().st_mode) == 0o644
    assert capfd.readouterr().err == ""
