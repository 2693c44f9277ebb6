"""Every dense family becomes experts: found, streamed, split, converted, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moesaic
from moesaic.construct.convert import convert
from moesaic.construct.dense import open_dense
from moesaic.core.errors import UserError
from moesaic.core.lineage import read_lineage
from moesaic.models.checkpoint import Checkpoint
from tests.construct.dense_family_models import FAMILIES, write_family
from tests.construct.dense_models import edit_config, to_bin, write_dense, write_text_tokenizer

IDS = torch.arange(1, 49).view(2, 24) % 61


def logits(path: Path, **config: Any) -> torch.Tensor:
    with torch.inference_mode():
        return moesaic.load(path, dtype=torch.float32, **config)(IDS).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_experts_on_are_the_dense_model(kind: str, tmp_path: Path) -> None:
    dense = write_family(tmp_path / "dense", kind, shard="20KB")
    options: dict[str, Any] = {"experts": 4, "shared": 1, "top_k": 2}
    moe = convert(dense, out=tmp_path / "moe", **options)
    record = read_lineage(moe)
    assert record is not None
    assert record["exact"] is True
    assert record["difference_of"] == "logits"
    wanted = logits(dense)
    if kind == "llama":
        assert Checkpoint(moe).config["model_type"] == "llama_moe_residual"
        everything = {"num_selects": 3, "multiply_gate_scores": False}
        given = logits(moe, **everything, multiply_gate_scores_residual=False)
    else:
        assert Checkpoint(moe).config["model_type"] == "moesaic_moe"
        everything = {"num_experts_per_tok": 3, "weighting": "one", "routed_scaling_factor": 1.0}
        given = logits(moe, **everything)
    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=0)
    # as it routes, it is another function: the comparison above says something
    assert float((logits(moe) - wanted).abs().max()) > 1e-3


def whole(dense: Path, kind: str) -> Any:
    """The dense model as transformers runs it."""
    # transformers before 5.23 lets Gemma 2 run without the soft-capping of its scores
    return moesaic.load(dense, **({"attn_implementation": "eager"} if kind == "gemma2" else {}))


WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [*((kind, {}) for kind in FAMILIES), ("qwen2", WINDOW), ("qwen3", WINDOW)],
)
def test_the_stream_sees_what_the_model_sees(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    from moesaic.construct.activations import LayerStream

    dense = write_family(tmp_path / "dense", kind, **fields)
    model = whole(dense, kind)
    wanted: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, given, out: wanted.append(given[0].flatten(0, 1)))
    ids = torch.randint(0, 61, (10, 30), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        model(ids)
    seen = [inputs.normed_TD for inputs in LayerStream(open_dense(dense), context=30).layers(ids)]
    assert len(seen) == 3
    for given, found in zip(wanted, seen, strict=True):
        torch.testing.assert_close(found, given, atol=1e-5, rtol=1e-5)


LONG = {
    "original_max_position_embeddings": 16,  # shorter than the rows: the table is made again
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 4.0],
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize(("kind", "fields"), [*((kind, {}) for kind in FAMILIES), ("phi3", LONG)])
def test_hidden_features_and_their_importance_are_the_model_s(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Norms differ between families, and so does what is done to the logits."""
    from moesaic.construct.cluster_importance import TokenBatch, cluster_importance
    from moesaic.construct.hidden import hidden_layers

    dense = write_family(tmp_path / "dense", kind, **fields)
    model = whole(dense, kind)
    features: list[torch.Tensor] = []
    neurons: list[torch.Tensor] = []

    def keep(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        given[0].retain_grad()
        neurons.append(given[0])

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, given: features.append(given[0].detach()))
        layer.mlp.down_proj.register_forward_pre_hook(keep)
    ids = torch.randint(0, 61, (10, 24), generator=torch.Generator().manual_seed(1))
    model(ids, labels=ids).loss.backward()

    opened = open_dense(dense)
    for seen in hidden_layers(opened, ids):
        found = torch.cat(list(seen.features()))
        wanted = features[seen.layer].flatten(0, 1)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    batch = TokenBatch(ids, ids, torch.ones_like(ids, dtype=torch.bool))
    scores_LEF, _ = cluster_importance(opened, torch.zeros(3, 1, 32), [batch])
    for layer, h in enumerate(neurons):
        assert h.grad is not None
        change_F = (h * h.grad).abs().flatten(0, 1).mean(0).detach()
        torch.testing.assert_close(
            torch.from_numpy(scores_LEF[layer, 0]), change_F, atol=1e-8, rtol=1e-3
        )


def test_fused_gate_and_up_are_seen_apart(tmp_path: Path) -> None:
    dense = write_family(tmp_path / "dense", "phi3", dtype=torch.bfloat16)
    fused = Checkpoint(dense).read("model.layers.1.mlp.gate_up_proj.weight")
    opened = open_dense(dense)
    gate, up, down = opened.ffn(1)
    assert torch.equal(opened.read(gate), fused[:48])
    assert torch.equal(opened.read(up), fused[48:])
    assert opened.checkpoint.shape(gate) == (48, 32)
    assert opened.checkpoint.dtype(up) == torch.bfloat16
    assert not [name for name in opened.checkpoint.keys() if "gate_up" in name]  # noqa: SIM118
    assert set(opened.others(1)).isdisjoint({gate, up, down})
    # counted once, halves or whole
    assert opened.checkpoint.parameters == Checkpoint(dense).parameters


@pytest.mark.parametrize(
    ("kind", "split"),
    [("phi3", "cluster"), ("gemma2", "coactivation"), ("olmo2", "random")],
)
def test_splits_that_read_weights_or_text_take_every_family(
    kind: str, split: str, tmp_path: Path
) -> None:
    dense = write_family(tmp_path / "dense", kind, dtype=torch.bfloat16)
    write_text_tokenizer(dense)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    settings: Any = {"method": split}
    if split == "coactivation":
        settings |= {"tokens": 2048, "context": 64}
    moe = convert(
        dense, out=tmp_path / "moe", split=settings, experts=4, top_k=2, data=text, router="random"
    )
    record = read_lineage(moe)
    assert record is not None
    assert record["exact"] is True
    assert Checkpoint(moe).dtype("model.layers.0.mlp.experts.3.up_proj.weight") == torch.bfloat16


def test_old_files_and_other_types_are_read(tmp_path: Path) -> None:
    dense = write_family(tmp_path / "dense", "qwen3", dtype=torch.float16, shard="20KB")
    to_bin(dense)
    moe = convert(dense, out=tmp_path / "moe", experts=4, top_k=2)
    stored = Checkpoint(moe)
    key = "model.layers.2.self_attn.q_norm.weight"
    assert torch.equal(stored.read(key), Checkpoint(dense).read(key))
    assert stored.dtype(key) == torch.float16


def test_positions_windows_and_caps_are_the_dense_config_s(tmp_path: Path) -> None:
    for kind, field in (
        ("smollm3", "rope_parameters"),
        ("gemma2", "attn_logit_softcapping"),
        ("gemma3_text", "layer_types"),
        ("mistral", "sliding_window"),
    ):
        dense = write_family(tmp_path / kind, kind)
        moe = convert(dense, out=tmp_path / f"{kind}-moe", experts=4, top_k=2, verify="off")
        wanted = Checkpoint(dense).config[field]
        assert wanted is not None
        assert Checkpoint(moe).config["text_config"][field] == wanted


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_dense(path)
    return str(caught.value)


def test_other_models_are_told_which_anatomy_they_lack(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 61}
    import transformers

    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=61)
    )
    gpt.save_pretrained(tmp_path / "gpt2")
    assert "no gate" in refused(tmp_path / "gpt2")
    assert "c_fc" in refused(tmp_path / "gpt2")
    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **sizes, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1
        )
    )
    mixtral.save_pretrained(tmp_path / "mixtral")
    assert "mixture of experts already" in refused(tmp_path / "mixtral")
    glm = write_dense(tmp_path / "other")
    edit_config(glm, model_type="seed_oss", architectures=["SeedOssForCausalLM"])
    assert "never compared" in refused(glm)
    multi = write_family(tmp_path / "multi", "gemma3_text")
    edit_config(multi, model_type="gemma3", text_config={"model_type": "gemma3_text"})
    assert "gemma3_text" in refused(multi)
    nearly = write_family(tmp_path / "nearly", "qwen3")
    edit_config(nearly, model_type="qwen33")
    assert "Did you mean" in refused(nearly)
    half = write_family(tmp_path / "half", "deepseek_v3")
    edit_config(half, first_k_dense_replace=1)
    assert "deepseek_v3" in refused(half)
    biased = write_family(tmp_path / "biased", "smollm3", mlp_bias=True)
    assert "mlp_bias" in refused(biased)
    headless = write_family(tmp_path / "headless", "qwen2")
    edit_config(headless, architectures=["Qwen2ForSequenceClassification"])
    assert "Qwen2ForCausalLM" in refused(headless)


def test_unequal_experts_and_other_routers_are_refused(tmp_path: Path) -> None:
    import numpy as np

    from moesaic.construct.split import NeuronSplit

    dense = write_family(tmp_path / "dense", "qwen2")
    ids = np.arange(48)
    split = NeuronSplit([[ids[:30], ids[30:]]] * 3, [[]] * 3, 48)
    with pytest.raises(UserError, match="one width"):
        convert(dense, out=tmp_path / "moe", split=split, top_k=1)
    with pytest.raises(UserError, match="gate=linear"):
        convert(dense, out=tmp_path / "moe", experts=4, top_k=1, gate="mlp")
    sliding = write_family(tmp_path / "sliding", "mistral")
    with pytest.raises(UserError, match="window of 8 tokens"):
        convert(sliding, out=tmp_path / "moe", experts=4, top_k=1, preset="llama-moe-v2")
    assert not (tmp_path / "moe").exists()
