"""Dense in, LLaMA-MoE out: golden tensors, equality with all experts on, configs, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.construct.convert import convert
from moesaic.construct.router import RouterInit
from moesaic.construct.split import NeuronSplit
from moesaic.core.errors import MoesaicError, UserError
from moesaic.core.lineage import read_lineage
from moesaic.models.checkpoint import Checkpoint
from tests.construct.dense_models import edit_config, to_bin, write_dense, write_text_tokenizer
from tests.helpers import GOLDEN, SHARED, assert_user_error, run_cli

V1 = GOLDEN / "llama_moe_v1"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense") / "model")


def load(path: Path, **config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    import moesaic.models  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **config).eval()


def golden_split(name: str) -> NeuronSplit:
    if name == "moe_random":
        labels = np.load(V1 / "split_random.npz")["labels"]
        return NeuronSplit.from_labels(list(labels), experts=4)
    with np.load(V1 / "split_gradient.npz") as arrays:
        if name == "moe_sharing_inner":
            lists = [arrays[f"{scores}.max.sharing_inner.size16"] for scores in "ba"]
            return NeuronSplit([list(rows) for rows in lists], [[], []], 64)
        lists = [arrays[f"{scores}.max.sharing_inter.moe3.res1.noshare"] for scores in "ba"]
    return NeuronSplit([list(rows[1:]) for rows in lists], [[rows[0]] for rows in lists], 64)


def golden_router(name: str) -> RouterInit:
    checkpoint = Checkpoint(V1 / name)
    inner = "moe_layer." if name == "moe_sharing_inter" else ""
    starts = [f"model.layers.{layer}.mlp." for layer in range(2)]
    layers = [
        {w: checkpoint.read(f"{s}{inner}gate.gate_network.{w}").float() for w in names}
        for s in starts
        for names in [("0.weight", "2.weight")]
    ]
    shared = [f"{s}residual_block.gate.gate_network.weight" for s in starts]
    return RouterInit(
        layers, [checkpoint.read(k).float() if k in checkpoint else None for k in shared]
    )


@pytest.mark.parametrize("name", ["moe_random", "moe_sharing_inner", "moe_sharing_inter"])
def test_golden_split_and_gates_give_the_golden_tensors_and_outputs(
    name: str, tmp_path: Path
) -> None:
    golden = Checkpoint(V1 / name)
    wanted = golden.config
    path = convert(
        V1 / "dense",
        out=tmp_path / "moe",
        split=golden_split(name),
        router=golden_router(name),
        top_k=wanted["num_selects"] + wanted.get("num_experts_residual", 0),
        scale=wanted["score_scale_factor"],
        shared_scale=wanted.get("score_scale_factor_residual"),
        verify="layers",
    )
    made = Checkpoint(path)
    assert made.keys() == golden.keys()
    for key in golden.keys():  # noqa: SIM118
        assert made.dtype(key) == torch.float32  # the source's type; the golden files are fp16
        assert torch.equal(made.read(key).half(), golden.read(key)), key
    ours = {"torch_dtype", "dtype", "transformers_version", "gates", "pretraining_tp"}
    rope = {"rope_theta", "rope_scaling"}
    for key in wanted.keys() - ours - rope:
        assert made.config[key] == wanted[key], key
    with np.load(V1 / f"{name}_io.npz") as io, torch.inference_mode():
        out = load(path)(input_ids=torch.from_numpy(io["input_ids"]))
        torch.testing.assert_close(out.logits, torch.from_numpy(io["logits"]), atol=1e-4, rtol=0)
    assert read_lineage(path)["exact"] is (name != "moe_sharing_inner")


def all_on(path: Path) -> dict[str, Any]:
    config = Checkpoint(path).config
    return {"num_selects": config["num_experts"], "multiply_gate_scores": False} | (
        {"multiply_gate_scores_residual": False} if "num_experts_residual" in config else {}
    )


def outputs(path: Path, **config: Any) -> torch.Tensor:
    ids = torch.arange(1, 61).view(2, 30)
    with torch.inference_mode():
        return load(path, **config)(input_ids=ids).logits


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 5e5},
    "linear": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {  # differs from the default only in texts longer than max_position_embeddings
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "max_position_embeddings": 16,
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "proportional": {
        "rope_parameters": {
            "rope_type": "proportional",
            "rope_theta": 1e4,
            "factor": 2.0,
            "partial_rotary_factor": 0.5,
        }
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_type_is_kept(rope: str, tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if rope not in ("default", *ROPE_INIT_FUNCTIONS):
        pytest.skip(f"this transformers has no rope type {rope}")
    source = write_dense(tmp_path / "dense")
    edit_config(source, **{"rope_parameters": None, **ROPES[rope]})
    path = convert(source, out=tmp_path / "moe", experts=4, top_k=2)
    wanted = outputs(source)
    assert not torch.allclose(wanted, outputs(write_dense(tmp_path / "plain")), atol=1e-3)
    torch.testing.assert_close(outputs(path, **all_on(path)), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "make",
    [
        {"attention_bias": True, "num_key_value_heads": 1, "head_dim": 16},
        {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-2},
        {"family": "Mistral", "shard": "20KB"},
        {"dtype": torch.bfloat16, "shard": "20KB", "pad_token_id": 3},
        {"mlp_bias": True},
    ],
    ids=["bias", "tied", "mistral", "bf16", "mlp bias"],
)
def test_dense_variants_equal_their_mixture_with_all_experts_on(
    make: dict[str, Any], tmp_path: Path
) -> None:
    source = write_dense(tmp_path / "dense", **make)
    if "shard" in make:
        to_bin(source)
        assert len(list(source.glob("*.bin"))) > 1
    path = convert(source, out=tmp_path / "moe", experts=6, shared=2, top_k=3, seed=5)
    before, after = Checkpoint(source), Checkpoint(path)
    kept = [key for key in before.keys() if ".mlp." not in key and key in after]  # noqa: SIM118
    assert len(kept) >= 14
    for key in kept:
        assert torch.equal(before.read(key), after.read(key))
    wanted = {make.get("dtype", torch.float32)}
    assert {after.dtype(key) for key in after.keys()} == wanted  # noqa: SIM118
    torch.testing.assert_close(outputs(path, **all_on(path)), outputs(source), atol=1e-4, rtol=1e-4)
    assert after.config["pad_token_id"] == make.get("pad_token_id")


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForQuestionAnswering"])
def test_other_heads_are_compared_with_their_dense_model(head: str, tmp_path: Path) -> None:
    source = write_dense(tmp_path / "dense", head=head, pad_token_id=0, num_labels=3)
    path = convert(source, out=tmp_path / "moe", experts=4, top_k=1)
    lineage = read_lineage(path)
    assert lineage["config"]["verify"] == "full"
    assert lineage["exact"] is True
    assert Checkpoint(path).config["architectures"] == [f"LlamaMoE{head}"]


def test_the_output_does_not_depend_on_shards_and_is_reproducible(
    dense: Path, tmp_path: Path
) -> None:
    made = [
        convert(dense, out=tmp_path / name, experts=4, top_k=2, seed=seed, max_shard_bytes=size)
        for name, seed, size in [("a", 3, 10**9), ("b", 3, 5000), ("c", 4, 10**9)]
    ]
    a, b, c = map(Checkpoint, made)
    assert len(a.files) == 1 < len(b.files)
    assert a.keys() == b.keys() == c.keys()
    assert all(torch.equal(a.read(key), b.read(key)) for key in a.keys())  # noqa: SIM118
    for part in ("experts.weight_gate.0", "gate_network.0.weight"):
        key = next(key for key in a.keys() if part in key)  # noqa: SIM118
        assert not torch.equal(a.read(key), c.read(key))


def test_a_split_that_repeats_neurons_says_so(dense: Path, tmp_path: Path) -> None:
    ids = np.arange(36)
    split = NeuronSplit([[ids[:24], ids[12:36]]] * 2, [[], []], 48)
    result = run_cli("convert", dense, "-o", tmp_path / "cli", "--experts", 2, "--top-k", 1,
                     "--split", split.save(tmp_path / "s.safetensors"))  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "75.0% of the neurons are covered" in " ".join(result.stderr.split())
    lineage = read_lineage(tmp_path / "cli")
    assert lineage["exact"] is False
    assert lineage["neurons_covered"] == 0.75
    wanted = (outputs(tmp_path / "cli", **all_on(tmp_path / "cli")) - outputs(dense)).abs().max()
    assert lineage["difference"] > 1e-2
    assert wanted > 1e-2


def test_uneven_experts_keep_their_order_and_widths(dense: Path, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(48)
    split = NeuronSplit([[order[:5], order[5:30], order[30:]]] * 2, [[], []], 48)
    path = convert(dense, out=tmp_path / "moe", split=split, top_k=2)
    before, after = Checkpoint(dense), Checkpoint(path)
    assert after.config["size_experts"] == [[5, 25, 18]] * 2
    down = after.read("model.layers.1.mlp.calculator.experts.weight_down.1")
    wanted = before.read("model.layers.1.mlp.down_proj.weight")[:, order[5:30]]
    assert torch.equal(down, wanted)
    assert read_lineage(path)["exact"] is True


def test_a_wrong_arrangement_is_caught(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesaic.construct import stream

    right = stream.rearrange

    def wrong(source: Any, experts: Any, out: Any) -> None:
        right(source, experts, out)
        out[0][2].mul_(1.01)

    monkeypatch.setattr(stream, "rearrange", wrong)
    for verify in ("layers", "full"):
        with pytest.raises(MoesaicError, match="differ from the dense model"):
            convert(dense, out=tmp_path / verify, experts=4, top_k=2, verify=verify)
        assert not list(tmp_path.iterdir())


def test_the_report_counts_parameters_as_the_models_do(dense: Path, tmp_path: Path) -> None:
    write_text_tokenizer(tmp_path / "with tokenizer")
    source = write_dense(tmp_path / "with tokenizer")
    result = run_cli(
        "convert",
        source,
        "-o",
        tmp_path / "moe",
        "--experts",
        8,
        "--shared",
        2,
        "--top-k",
        4,
        "--json",
    )
    assert result.exit_code == 0, result.stderr
    report = result.json
    model = load(tmp_path / "moe")
    assert report["parameters_total"] == sum(p.numel() for p in model.parameters())
    assert report["parameters_dense"] == sum(p.numel() for p in load(source).parameters())
    # 2 of 6 routed experts of 6 neurons are active: 4 * 6 neurons of 3 * 32 weights idle a layer
    # and the noise weights of the routers, which act in training only
    idle = 2 * 4 * 6 * 3 * 32 + 2 * 6 * 32
    assert report["parameters_active"] == report["parameters_total"] - idle
    assert (report["experts"], report["shared"], report["top_k"]) == (8, 2, 4)
    assert report["exact"] is True
    assert report["difference"] < 1e-4
    assert report["scale"] == 3.0
    config = Checkpoint(tmp_path / "moe").config
    assert (config["num_selects"], config["score_scale_factor_residual"]) == (2, 2.0)
    assert (tmp_path / "moe" / "tokenizer.json").is_file()
    assert NeuronSplit.load(tmp_path / "moe").num_shared == 2
    shown = run_cli("convert", source, "-o", tmp_path / "b", "--experts", 8, "--top-k", 1)
    assert shown.stdout.splitlines()[-1] == str(tmp_path / "b")
    assert f"{report['parameters_dense']:,}" in shown.stdout


def test_scale_is_experts_by_selected_or_what_was_given(dense: Path, tmp_path: Path) -> None:
    common = {"experts": 6, "top_k": 2, "verify": "off"}
    for number, (given, wanted) in enumerate([("auto", 3.0), (2, 2.0), ([1, 2], [1.0, 2.0])]):
        path = convert(dense, out=tmp_path / str(number), scale=given, **common)
        assert Checkpoint(path).config["score_scale_factor"] == wanted
        assert read_lineage(path)["exact"] is False  # not compared is not proven
    for wrong in ("large", [1.0, 2.0, 3.0]):
        with pytest.raises(UserError, match="scale"):
            convert(dense, out=tmp_path / "x", scale=wrong, **common)


# --- bad input: exit code 2, one line, nothing written --------------------------------------


def copy_of(dense: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(dense, target))


def spoil(path: Path, key: str, value: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors[key].view(-1)[-1] = value
    save_file(tensors, path / "model.safetensors")


def as_gpt2(path: Path) -> None:
    edit_config(path, model_type="gpt2")


def lacking(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors")


def strange(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.lora_A.weight"] = torch.ones(2, 2)
    save_file(tensors, path / "model.safetensors")


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def code(path: Path) -> None:
    (path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Path("/")}, path / "pytorch_model.bin")


def nan(path: Path) -> None:
    spoil(path, "model.layers.1.mlp.down_proj.weight", float("nan"))


def infinite(path: Path) -> None:
    spoil(path, "model.layers.0.self_attn.q_proj.weight", float("-inf"))


def sliding(path: Path) -> None:
    edit_config(path, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=8)


def implicit_window(path: Path) -> None:
    edit_config(path, model_type="mistral", max_position_embeddings=8192)


def quantised(path: Path) -> None:
    edit_config(path, quantization_config={"quant_method": "gptq"})


def reshaped(path: Path) -> None:
    edit_config(path, intermediate_size=40)


def other_head(path: Path) -> None:
    edit_config(path, architectures=["LlamaForTokenClassification"])


@pytest.mark.parametrize(
    ("spoiler", "options", "words"),
    [
        (None, {"--experts": 7}, ["7", "does not divide", "48"]),
        (None, {"--top-k": 9, "--experts": 8}, ["top_k=9", "8 experts"]),
        (None, {"--top-k": 0}, ["top_k=0"]),
        (None, {"--top-k": 2, "--shared": 2}, ["top_k", "at least 3"]),
        (None, {"--split": "clusters"}, ["clusters", "did you mean 'cluster'"]),
        (None, {"--router": "centroid"}, ["centroid", "did you mean 'centroids'"]),
        (None, {"--router": "select"}, ["select", "data"]),
        (None, {"--scale": "layerwise"}, ["layerwise", "data"]),
        (None, {"--gate": "deep"}, ["gate", "mlp"]),
        (None, {"--verify": "perhaps"}, ["verify", "layers"]),
        (None, {"--split": "./no.safetensors"}, ["no split"]),
        (None, {"--router": "./no.safetensors"}, ["no router init"]),
        (as_gpt2, {}, ["gpt2", "not a dense llama"]),
        (lacking, {}, ["lacks", "model.layers.1.mlp.up_proj.weight"]),
        (strange, {}, ["lora_A", "merge adapters"]),
        (truncate, {}, ["model.safetensors", "truncated"]),
        (code, {}, ["pytorch_model.bin", "plain tensors"]),
        (nan, {}, ["model.layers.1.mlp.down_proj.weight", "nan"]),
        (infinite, {}, ["model.layers.0.self_attn.q_proj.weight", "infinite"]),
        (sliding, {"--preset": "llama-moe-v2"}, ["window of 8 tokens"]),
        (implicit_window, {"--preset": "llama-moe-v2"}, ["window of 4096 tokens"]),
        (quantised, {}, ["quantised"]),
        (reshaped, {}, ["mlp", "do not belong together"]),
        (other_head, {}, ["LlamaForTokenClassification", "ForCausalLM"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_input_is_one_line_and_writes_nothing(
    dense: Path, tmp_path: Path, spoiler: Any, options: dict[str, Any], words: list[str]
) -> None:
    source = dense
    if spoiler:
        source = copy_of(dense, tmp_path / "dense")
        spoiler(source)
    given = {"--experts": 4, "--top-k": 2, "--verify": "off", **options}
    out = tmp_path / "out"
    out.mkdir()
    flat = [item for pair in given.items() for item in pair]
    assert_user_error(run_cli("convert", source, "-o", out / "moe", *flat), *words)
    assert not list(out.iterdir())


def test_a_missing_model_and_a_taken_output_are_one_line(dense: Path, tmp_path: Path) -> None:
    rest = ("--experts", 4, "--top-k", 2)
    result = run_cli("convert", tmp_path / "nothing", "-o", tmp_path / "moe", *rest)
    assert_user_error(result, "nothing", "does not exist")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("keep me")
    assert_user_error(run_cli("convert", dense, "-o", taken, *rest), "not empty")
    result = run_cli("convert", dense, "-o", taken, *rest, "--overwrite")
    assert_user_error(result, "moesaic did not make it")
    assert (taken / "file").read_text() == "keep me"
    earlier = tmp_path / "earlier"
    assert run_cli("convert", dense, "-o", earlier, *rest).exit_code == 0
    (earlier / "stale").write_text("of the earlier run")
    assert run_cli("convert", dense, "-o", earlier, *rest, "--overwrite").exit_code == 0
    assert not (earlier / "stale").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"--seed": -1}, "seed=-1"),
        ({"--seed": 2**70}, "2^63"),
        ({"--scale": "nan"}, "scale=nan"),
        ({"--scale": "2,0"}, "scale=[2.0, 0.0]"),
        ({"--scale": "-1"}, "scale=-1"),
        ({"--shared-scale": "inf"}, "shared_scale=inf"),
        ({"--experts": 0}, "experts=0"),
        ({"--data": "nowhere.jsonl"}, "no such file"),
    ],
    ids=str,
)
def test_numbers_and_paths_that_cannot_be_are_refused(
    options: dict[str, Any], word: str, dense: Path, tmp_path: Path
) -> None:
    given = {"--experts": 4, "--top-k": 2, **options}
    flat = [f"{name}={value}" for name, value in given.items()]
    assert_user_error(run_cli("convert", dense, "-o", tmp_path / "moe", *flat), word)
    assert not list(tmp_path.glob("*moe*"))


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("hidden_act", "sulu", "did you mean 'silu'"),
        ("rope_parameters", {"rope_type": "yarm", "rope_theta": 1e4}, "did you mean 'yarn'"),
        ("architectures", "LlamaForQuestions", "LlamaForQuestions"),
    ],
)
def test_config_values_that_transformers_lacks_are_named(
    field: str, value: Any, word: str, dense: Path, tmp_path: Path
) -> None:
    model = copy_of(dense, tmp_path / "dense")
    edit_config(model, **{field: value})
    rest = ("-o", tmp_path / "moe", "--experts", 4, "--top-k", 2)
    assert_user_error(run_cli("convert", model, *rest), word)
    if field != "architectures":
        assert_user_error(run_cli("generate", model, "-p", "a", "--tokenizer", model))


def test_the_report_counts_active_parameters_as_info_does(dense: Path, tmp_path: Path) -> None:
    for name, shared in (("moe", 0), ("residual", 1)):
        out = tmp_path / name
        rest = ("--experts", 4, "--top-k", 2, "--shared", shared, "--json")
        made = run_cli("convert", dense, "-o", out, *rest).json
        found = run_cli("info", out, "--json").json["anatomy"]
        assert made["parameters_total"] == found["params_total"]
        assert made["parameters_active"] == found["params_active"]


def test_overwriting_never_takes_the_input(dense: Path, tmp_path: Path) -> None:
    moe = tmp_path / "runs" / "moe"
    rest = ("--experts", 4, "--top-k", 2)
    assert run_cli("convert", dense, "-o", moe, *rest).exit_code == 0
    before = sorted(path.stat().st_mtime_ns for path in [*moe.iterdir(), *dense.iterdir()])
    (tmp_path / "runs" / "moesaic.json").write_text("{}")
    for command in (
        ("convert", dense, "-o", dense, *rest),
        ("convert", dense, "-o", moe, "--top-k", 2, "--split", moe),
        ("split", dense, "-o", dense, "--experts", 4),
        ("router", dense, "-o", moe, "--split", moe),
        ("export", moe, "-o", moe),
        ("export", moe, "-o", moe.parent),
    ):
        assert_user_error(run_cli(*command, "--overwrite"), "holds an input")
    after = sorted(path.stat().st_mtime_ns for path in [*moe.iterdir(), *dense.iterdir()])
    assert after == before


def test_splits_and_routers_of_other_models_are_refused(dense: Path, tmp_path: Path) -> None:
    wide = NeuronSplit([[np.arange(30), np.arange(30, 60)]] * 2, [[], []], 60)
    with pytest.raises(UserError, match="60 neurons"):
        convert(dense, out=tmp_path / "x", split=wide, top_k=1)
    fits = NeuronSplit([[np.arange(24), np.arange(24, 48)]] * 2, [[], []], 48)
    with pytest.raises(UserError, match="experts=4"):
        convert(dense, out=tmp_path / "x", split=fits, top_k=1, experts=4)
    router = RouterInit([{"weight": torch.zeros(3, 32)}] * 2, [None, None])
    with pytest.raises(UserError, match="3 experts"):
        convert(dense, out=tmp_path / "x", split=fits, top_k=1, router=router)
    rows = [[np.arange(24), np.arange(24)], [np.arange(24), np.arange(20)]]
    with pytest.raises(UserError, match="one intermediate_size"):
        convert(dense, out=tmp_path / "x", split=NeuronSplit(rows, [[], []], 48), top_k=1)


def test_all_rope_types_of_transformers_are_tried() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPE_INIT_FUNCTIONS) <= set(ROPES)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [4, 8, 16])
def test_real_models_convert_exactly(experts: int, tmp_path: Path) -> None:
    name = "stories260K-hf" if experts == 4 else "dense-14m"
    source = SHARED / "ckpt" / name
    if not source.is_dir():
        pytest.skip(f"{source} is not here")
    path = convert(source, out=tmp_path / "moe", experts=experts, top_k=2)
    lineage = json.loads((path / "moesaic.json").read_text())
    assert lineage["exact"] is True
    assert lineage["difference"] < 1e-4
