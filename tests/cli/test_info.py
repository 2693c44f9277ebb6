"""`moesaic info`, `doctor`, `list` and `kernels` through the real command line."""

from __future__ import annotations

import json
import shutil

import pytest

from moesaic.core.lineage import write_lineage
from tests.helpers import GOLDEN, assert_user_error, run_cli

MODEL = GOLDEN / "families" / "llama_moe"
DENSE = GOLDEN / "llama_moe_v1" / "dense"


def test_info_of_a_moe():
    found = run_cli("info", MODEL, "--json").json
    assert found["architecture"] == "LlamaMoEForCausalLM"
    assert found["model_type"] == "llama_moe"
    assert found["anatomy"]["params_total"] == found["weights"]["parameters"] == 34080
    assert len(found["anatomy"]["layers"]) == 2
    assert found["dtype"] == "float32"
    assert found["weights"]["bytes"] == (MODEL / "model.safetensors").stat().st_size
    assert found["config"]["num_selects"] == 2
    shown = run_cli("info", MODEL)
    assert shown.exit_code == 0
    for word in ("2 of 8", "34,080", "19,744", "57.9%", "float32"):
        assert word in shown.stdout, shown.stdout


def test_info_of_a_dense_model_with_a_history(tmp_path):
    shutil.copytree(DENSE, tmp_path / "dense")
    write_lineage(tmp_path / "dense", step="init", parent=None, config={})
    shutil.copytree(DENSE, tmp_path / "child")
    write_lineage(tmp_path / "child", step="train", parent=tmp_path / "dense", config={})
    shown = run_cli("info", tmp_path / "child").stdout
    assert "a dense model" in shown
    assert "train from" in shown
    assert "init" in shown
    found = run_cli("info", tmp_path / "child", "--json").json
    assert found["lineage"]["parent_lineage"]["step"] == "init"


def test_info_needs_only_the_config(tmp_path):
    shutil.copy(MODEL / "config.json", tmp_path)
    found = run_cli("info", tmp_path, "--json").json
    assert found["weights"] is None
    assert found["anatomy"]["params_total"] == 34080
    assert "config.json only" in run_cli("info", tmp_path).stdout


def test_info_tells_why_a_model_is_not_loaded(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    config = {"model_type": "of-nobody", "auto_map": {"AutoModel": "theirs.Model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    result = run_cli("info", tmp_path / "model", "--json")
    assert result.exit_code == 0
    assert "moesaic/models/families/of_nobody.py" in result.json["refused"]
    assert result.json["anatomy"] is None
    assert "34,080" in run_cli("info", tmp_path / "model").stdout


def test_info_says_what_a_lying_file_is_and_what_is_corrected():
    shown = run_cli("info", GOLDEN / "families" / "llama_moe_v2").stdout
    assert "llama_moe_v2; config.json has" in shown
    found = run_cli("info", GOLDEN / "families" / "nllb_moe", "--json").json
    assert set(found["corrected"]) == {"nllb_moe_class", "nllb_moe_dispatch"}
    assert "its two experts" in run_cli("info", GOLDEN / "families" / "nllb_moe").stdout


def test_info_warns_when_files_and_config_disagree(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text()) | {"vocab_size": 7}
    file.write_text(json.dumps(config))
    assert "the files hold 34,080" in run_cli("info", tmp_path / "model").stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Qwen/Qwen9-MoE", ["Qwen/Qwen9-MoE", "hf download"]),
        ("qwen33", ["does not exist", "Did you mean 'qwen3'?"]),
        ("/nowhere", ["does not exist"]),
    ],
)
def test_info_without_a_model(name, words, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert_user_error(run_cli("info", name), *words)


def test_doctor_finds_this_installation_fit():
    found = run_cli("doctor", "--json").json
    assert found["ok"]
    rows = {(row["what"], row["found"].split(":")[0]): row for row in found["checks"]}
    assert ("experts, float32 on cpu", "grouped") in rows
    assert ("experts, bfloat16 on cpu", "loop") in rows
    names = {row["what"] for row in found["checks"]}
    assert {"python", "torch", "transformers", "experts implementations"} <= names
    shown = run_cli("doctor")
    assert shown.exit_code == 0
    assert "transformers" in shown.stdout


def test_doctor_fails_when_a_kernel_is_wrong(monkeypatch):
    from moesaic.kernels import grouped

    right = grouped.experts
    monkeypatch.setattr(grouped, "experts", lambda *a, **k: right(*a, **k) * 1.1)
    result = run_cli("doctor", "--json")
    assert result.exit_code == 1
    assert not result.json["ok"]
    assert "experts, float32 on cpu" in result.stderr


def test_doctor_fails_when_a_package_is_too_old(monkeypatch):
    from moesaic.cli.commands import doctor

    installed = doctor._installed
    monkeypatch.setattr(
        doctor, "_installed", lambda name: "4.40.0" if name == "transformers" else installed(name)
    )
    result = run_cli("doctor", "--json")
    assert result.exit_code == 1
    wrong = [row for row in result.json["checks"] if row["state"] == "wrong"]
    assert [row["what"] for row in wrong] == ["transformers"]
    assert "pip install" in wrong[0]["remark"]


def test_list_knows_every_kind():
    kinds = run_cli("list", "--json").json
    assert {"splits", "routers", "models", "recipes", "presets", "kernels", "gates"} <= set(kinds)
    for kind in kinds:
        entries = run_cli("list", kind, "--json").json
        assert entries, kind
        for name, text in entries.items():
            assert text, (kind, name)
    assert {"random", "cluster", "sharing-inter"} <= set(run_cli("list", "splits", "--json").json)
    assert len(run_cli("list", "models", "--json").json) == 27
    assert "sharing-inner" in run_cli("list", "splits").stdout


def test_list_of_an_unknown_kind():
    assert_user_error(run_cli("list", "splts"), "Unknown kind 'splts'", "Did you mean 'splits'?")


def test_kernels_check_at_a_models_own_shapes(tmp_path):
    found = run_cli("kernels", "check", GOLDEN / "families" / "llama_moe_uneven", "--json").json
    assert found["passed"]
    assert {(row["dtype"], row["backend"]) for row in found["checks"]} == {
        ("float32", "grouped"),
        ("bfloat16", "loop"),  # widths of 20 and 12 are no multiples of 8
    }
    assert {row["shape"]["I"] for row in found["checks"]} == {20, 12}
    shown = run_cli("kernels", "check", MODEL)
    assert shown.exit_code == 0
    assert "ok" in shown.stdout
    assert "no experts" in run_cli("kernels", "check", DENSE).stdout


def test_kernels_check_fails_when_a_kernel_is_wrong(monkeypatch):
    from moesaic.kernels import grouped

    right = grouped.experts
    monkeypatch.setattr(grouped, "experts", lambda *a, **k: right(*a, **k) * 1.1)
    result = run_cli("kernels", "check", MODEL, "--json")
    assert result.exit_code == 1
    assert not result.json["passed"]


def test_kernels_list_names_ours_first():
    assert next(iter(run_cli("kernels", "list", "--json").json)) == "moesaic"
