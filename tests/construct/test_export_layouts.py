"""Mixtures in stock layouts: the same function in plain transformers, or a reason why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moesaic
from moesaic.construct.convert import convert
from moesaic.construct.export_layout import export_layout
from moesaic.construct.layouts import LAYOUTS, supports
from moesaic.construct.pipeline import construct
from moesaic.construct.router import RouterInit
from moesaic.core.errors import UserError
from moesaic.core.lineage import read_lineage
from moesaic.models.checkpoint import Checkpoint
from tests.construct.dense_family_models import FAMILIES, LLAMA3_ROPE, write_family
from tests.construct.dense_models import edit_config, write_dense, write_text_tokenizer
from tests.helpers import assert_user_error, run_cli

IDS = torch.arange(1, 49).view(2, 24) % 61
SIBLINGS = [
    ("llama", "mixtral"),
    ("llama", "qwen2_moe"),
    ("mistral", "mixtral"),
    ("qwen2", "qwen2_moe"),
    ("qwen3", "qwen3_moe"),
    ("olmo2", "flex_olmo"),
    ("deepseek_v3", "deepseek_v3"),
]


def source(path: Path, kind: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A mixture of one family with 4 experts."""
    fields: dict[str, Any] = {"rope_parameters": LLAMA3_ROPE} if kind == "mistral" else {}
    if kind == "llama":
        fields["head_dim"] = 8
    write_family(path / "dense", kind, dtype=dtype, **fields)
    settings: dict[str, Any] = {"experts": 4, "top_k": 2, "gate": "linear", "verify": "off"}
    return convert(path / "dense", out=path / "moe", **{**settings, **options})


def stock(path: Path, **config: Any) -> Any:
    """The model as plain transformers loads it, nothing missing."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, **config
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def ours(path: Path) -> torch.Tensor:
    with torch.inference_mode():
        return moesaic.load(path, dtype=torch.float32)(IDS).logits


@pytest.mark.parametrize(("kind", "layout"), SIBLINGS)
def test_a_sibling_computes_the_same(kind: str, layout: str, tmp_path: Path) -> None:
    moe = source(tmp_path, kind, scale=3.0)
    out = export_layout(moe, out=tmp_path / "out", layout=layout)
    model = stock(out)
    assert type(model).__name__ == LAYOUTS[layout].architecture
    with torch.inference_mode():
        given = model(IDS).logits
    wanted = ours(moe)
    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=0)
    record = read_lineage(out)
    assert record is not None
    assert record["exact"] is True
    assert record["difference"] <= 1e-4
    assert record["difference_of"] == "logits"


@pytest.mark.parametrize(("kind", "layout"), SIBLINGS)
def test_all_experts_on_are_the_dense_model(kind: str, layout: str, tmp_path: Path) -> None:
    """With routers of zero every weight is equal; scaled by E, the experts add up to the MLP."""
    silent = RouterInit([{"weight": torch.zeros(4, 32)}] * 3, [None] * 3)
    moe = source(tmp_path, kind, router=silent, top_k=4, scale=4.0)
    out = export_layout(moe, out=tmp_path / "out", layout=layout)
    with torch.inference_mode():
        given = stock(out)(IDS).logits
        wanted = moesaic.load(tmp_path / "dense", dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "layout"), [("llama", "qwen2_moe"), ("qwen2", "qwen2_moe"), ("deepseek_v3", "")]
)
def test_always_on_experts_go_along(kind: str, layout: str, tmp_path: Path) -> None:
    moe = source(tmp_path, kind, shared=1)
    out = export_layout(moe, out=tmp_path / "out", layout=layout or kind)
    with torch.inference_mode():
        given = stock(out)(IDS).logits
    torch.testing.assert_close(given, ours(moe), atol=1e-4, rtol=0)
    name = "shared_expert" if layout else "shared_experts"
    down = Checkpoint(out).read(f"model.layers.1.mlp.{name}.down_proj.weight")
    assert bool(down.any())


def test_a_v2_mixture_goes_to_mixtral(tmp_path: Path) -> None:
    moe = source(tmp_path, "llama", preset="llama-moe-v2")
    out = export_layout(moe, out=tmp_path / "out", layout="mixtral")
    with torch.inference_mode():
        given = stock(out)(IDS).logits
    torch.testing.assert_close(given, ours(moe), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_widths_that_torch_s_grouped_product_refuses(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_family(tmp_path / "dense", kind, intermediate_size=45)
    moe = convert(tmp_path / "dense", out=tmp_path / "moe", experts=3, top_k=2, gate="linear")
    layout = {"llama": "mixtral", "qwen3": "qwen3_moe"}[kind]
    with caplog.at_level("INFO", logger="moesaic"):
        out = export_layout(moe, out=tmp_path / "out", layout=layout)
    assert 'experts_implementation="eager"' in caplog.text
    with torch.inference_mode():
        given = stock(out, experts_implementation="eager")(IDS).logits
    torch.testing.assert_close(given, ours(moe), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["mixtral", "qwen2_moe"])
def test_weights_of_one_are_approached(layout: str, tmp_path: Path) -> None:
    moe = source(tmp_path, "llama")
    edit_config(moe, multiply_gate_scores=False)
    with pytest.raises(UserError, match="no stock router gives exactly"):
        export_layout(moe, out=tmp_path / "out", layout=layout, tolerance=1e-7)
    assert not (tmp_path / "out").exists()
    out = export_layout(moe, out=tmp_path / "out", layout=layout, tolerance=1e-2)
    record = read_lineage(out)
    assert record is not None
    assert record["flattened"] is True
    assert record["llama_cpp"] is True
    with torch.inference_mode():
        found = float((stock(out)(IDS).logits - ours(moe)).abs().max())
    assert 0 < record["typical_difference"] <= record["difference"]
    # another text than that of the record, the same size of error
    assert 0 < found < 10 * record["difference"] < 0.1


@pytest.mark.parametrize(("kind", "layout"), [("llama", "mixtral"), ("qwen3", "qwen3_moe")])
def test_a_construction_goes_to_a_stock_layout_but_for_an_intercept(
    kind: str, layout: str, tmp_path: Path
) -> None:
    dense = write_family(tmp_path / "dense", kind, **({"head_dim": 8} if kind == "llama" else {}))
    write_text_tokenizer(dense)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog. " * 60)
    biased: Any = {"method": "energy", "intercept": True}
    fields: Any = {"experts": 4, "data": str(text), "tokens": 1024, "context": 32}
    moe = construct(dense, out=tmp_path / "biased", recipe={**fields, "router": biased})
    with pytest.raises(UserError, match="intercept: false"):
        export_layout(moe, out=tmp_path / "out", layout=layout, tolerance=0.1)
    moe = construct(dense, out=tmp_path / "moe", recipe={**fields, "refine": "layerwise"})
    out = export_layout(moe, out=tmp_path / "out", layout=layout, tolerance=2e-2)
    with torch.inference_mode():
        given = stock(out)(IDS).logits
    torch.testing.assert_close(given, ours(moe), atol=5e-2, rtol=0)
    learn_exponents(moe, [0.07, 0.2, -1e-3])  # a layer that has learned next to nothing
    with pytest.raises(UserError, match="tolerance"):
        export_layout(moe, out=tmp_path / "exact", layout=layout, tolerance=1e-7)
    out = export_layout(moe, out=tmp_path / "near", layout=layout, tolerance=2e-2)
    with torch.inference_mode():
        torch.testing.assert_close(stock(out)(IDS).logits, ours(moe), atol=5e-2, rtol=0)
    learn_exponents(moe, [0.07, 0.2, 0.013])
    out = export_layout(moe, out=tmp_path / "exact", layout=layout)
    with torch.inference_mode():
        given = stock(out)(IDS).logits
    wanted = ours(moe)
    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=0)
    learn_exponents(moe, [0.0, 0.0, 0.0])
    assert float((ours(moe) - wanted).abs().max()) > 1e-3


def learn_exponents(moe: Path, values: list[float]) -> None:
    """Write what training may make of a tempered mixture's exponents."""
    from safetensors.torch import load_file, save_file

    file = moe / "model.safetensors"
    tensors = load_file(file)
    names = sorted(n for n in tensors if n.endswith(("mlp.gate.scale", "mlp.gate.correction")))
    assert len(names) == len(values)
    tensors |= {n: torch.full_like(tensors[n], v) for n, v in zip(names, values, strict=True)}
    save_file(tensors, file)


def test_one_chosen_expert_that_was_weighed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    moe = source(tmp_path, "qwen3", top_k=1)
    edit_config(moe, weighting="tempered")
    learned = {f"model.layers.{layer}.mlp.gate.scale": torch.full((1,), 0.1) for layer in range(3)}
    save_file(load_file(moe / "model.safetensors") | learned, moe / "model.safetensors")
    with pytest.raises(UserError, match="one chosen expert always weighs 1"):
        export_layout(moe, out=tmp_path / "out", layout="qwen3_moe", tolerance=0.5)


def test_rounded_factors_are_refused_unless_asked_for(tmp_path: Path) -> None:
    moe = source(tmp_path, "qwen3", dtype=torch.bfloat16, scale=3.1)
    with pytest.raises(UserError, match="--dtype float32"):
        export_layout(moe, out=tmp_path / "out", layout="qwen3_moe")
    loose = export_layout(moe, out=tmp_path / "loose", layout="qwen3_moe", tolerance=0.1)
    record = read_lineage(loose)
    assert record is not None
    assert record["exact"] is False
    assert record["difference"] > 1e-4
    out = export_layout(moe, out=tmp_path / "out", layout="qwen3_moe", dtype="float32")
    torch.testing.assert_close(stock(out)(IDS).logits, ours(moe), atol=1e-4, rtol=0)
    assert Checkpoint(out).config["dtype"] == "float32"
    # a power of two is exact in any type, and the type stays
    even = source(tmp_path / "even", "qwen3", dtype=torch.bfloat16, scale=2.0)
    kept = Checkpoint(export_layout(even, out=tmp_path / "kept", layout="qwen3_moe"))
    assert kept.dtype("model.layers.0.mlp.experts.0.down_proj.weight") == torch.bfloat16


@pytest.mark.parametrize("kind", FAMILIES)
def test_supports_says_why_not(kind: str, tmp_path: Path) -> None:
    moe = source(tmp_path, kind)
    config = Checkpoint(moe).config
    known = {layout for family, layout in SIBLINGS if family == kind}
    for layout in LAYOUTS:
        reasons = supports(config, layout, explain=True)
        assert supports(config, layout) is (not reasons)
        assert (not reasons) is (layout in known), (layout, reasons)
        if reasons:
            with pytest.raises(UserError) as caught:
                export_layout(moe, out=tmp_path / "out", layout=layout)
            assert all(reason in str(caught.value) for reason in reasons)
    assert not (tmp_path / "out").exists()


def test_reasons_name_the_part(tmp_path: Path) -> None:
    config = Checkpoint(source(tmp_path, "llama")).config

    def reasons(layout: str, **changed: Any) -> str:
        return "; ".join(supports({**config, **changed}, layout, explain=True))

    assert "not one matrix" in reasons("mixtral", gate_network="mlp")
    assert "raw logits" in reasons("mixtral", gate_use_softmax=False)
    assert "four biases" in reasons("mixtral", attention_bias=True)
    assert "experts have biases" in reasons("mixtral", mlp_bias=True)
    assert "wide" in reasons("mixtral", size_experts=[[10, 14, 12, 12]] * 3)
    assert "heads of 16" in reasons("qwen2_moe", head_dim=16)
    assert reasons("mixtral") == ""
    residual = Checkpoint(source(tmp_path / "r", "llama", shared=1)).config
    assert "always-on" in "; ".join(supports(residual, "mixtral", explain=True))
    with pytest.raises(UserError, match="mixtral"):
        supports(config, "mixtrall")
    with pytest.raises(UserError, match="llama_moe_v2"):
        supports({"model_type": "gpt2"}, "mixtral")


def test_trained_corrections_and_damage_are_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    moe = source(tmp_path, "qwen3")
    edit_config(moe, weighting="learned")
    file = moe / "model.safetensors"
    tensors = load_file(file)
    for layer in range(3):
        tensors[f"model.layers.{layer}.mlp.gate.scale"] = torch.zeros(4)
    save_file(tensors, file)
    export_layout(moe, out=tmp_path / "near", layout="qwen3_moe", tolerance=1e-2)
    tensors["model.layers.2.mlp.gate.scale"][1] = 0.5
    save_file(tensors, file)
    with pytest.raises(UserError, match="trained away from 1"):
        export_layout(moe, out=tmp_path / "out", layout="qwen3_moe", tolerance=1e-2)
    edit_config(moe, weighting="renormalised")
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"experts\.2\.up_proj\.weight holds NaN"):
        export_layout(moe, out=tmp_path / "out", layout="qwen3_moe")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match="lacks the tensor"):
        export_layout(moe, out=tmp_path / "out", layout="qwen3_moe")
    assert not (tmp_path / "out").exists()


def test_large_models_are_compared_by_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesaic.construct.export_layout.FULL_BELOW", 0)
    moe = source(tmp_path, "qwen3", dtype=torch.bfloat16, scale=3.1)
    with pytest.raises(UserError, match="--dtype float32"):
        export_layout(moe, out=tmp_path / "out", layout="qwen3_moe")
    out = export_layout(moe, out=tmp_path / "out", layout="qwen3_moe", dtype="float32")
    record = read_lineage(out)
    assert record is not None
    assert record["difference_of"] == "layers"
    assert record["exact"] is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [0, 1])
def test_a_shared_gate_is_one_half_in_llama_cpp_too(
    shared: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """llama.cpp divides silu by its argument, in float32."""
    moe = source(tmp_path, "llama", dtype=dtype, shared=shared, top_k=2 + shared)
    out = export_layout(moe, out=tmp_path / "out", layout="qwen2_moe", tolerance=0.1)
    x_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.shared_expert_gate.weight"
        gate_1D = Checkpoint(out).read(name).float()
        logits = x_TD @ gate_1D.T
        half = torch.nn.functional.silu(logits) / logits
        torch.testing.assert_close(half, torch.full_like(half, 0.5), atol=2e-6, rtol=0)


def test_a_deepseek_v3_names_its_scores_for_other_programs(tmp_path: Path) -> None:
    moe = source(tmp_path, "deepseek_v3")
    out = export_layout(moe, out=tmp_path / "out", layout="deepseek_v3")
    config = json.loads((out / "config.json").read_text())
    assert (config["scoring_func"], config["topk_method"]) == ("sigmoid", "noaux_tc")
    assert stock(out).config.num_experts_per_tok == 2


@pytest.mark.parametrize("tied", [False, True])
def test_where_llama_cpp_wants_a_head_a_tied_one_is_said(
    tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = write_family(tmp_path / "dense", "llama", head_dim=8, tie_word_embeddings=tied)
    moe = convert(dense, out=tmp_path / "moe", experts=3, top_k=2, gate="linear")
    edit_config(moe, multiply_gate_scores=False)
    with caplog.at_level("INFO", logger="moesaic"):
        for layout, loads in (("mixtral", True), ("qwen2_moe", not tied)):
            out = export_layout(moe, out=tmp_path / layout, layout=layout, tolerance=1e-2)
            record = read_lineage(out)
            assert record is not None
            assert record["llama_cpp"] is loads
    assert ("llama.cpp wants a head in a qwen2_moe" in caplog.text) is tied


def test_the_command_says_what_was_written(tmp_path: Path) -> None:
    moe = source(tmp_path, "llama")
    result = run_cli("export", moe, "-o", tmp_path / "out", "--layout", "mixtral", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["layout"] == "mixtral"
    assert told["exact"] is True
    shown = run_cli("export", moe, "-o", tmp_path / "qwen", "--layout", "qwen2_moe")
    assert "llama.cpp always weighs qwen2_moe by softmax" in " ".join(shown.stderr.split())
    assert "logits differ" in shown.stdout
    bad = run_cli("export", moe, "-o", tmp_path / "x", "--layout", "olmoe")
    assert_user_error(bad, "olmoe", "all heads together")
    assert_user_error(run_cli("export", moe, "-o", tmp_path / "x", "--layout", "y"), "layout", "y")
    dense = write_dense(tmp_path / "plain")
    assert_user_error(
        run_cli("export", dense, "-o", tmp_path / "x", "--layout", "mixtral"), "'llama'"
    )
