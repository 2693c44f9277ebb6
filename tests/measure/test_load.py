from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.core.errors import UserError
from moesaic.data import document_rows
from moesaic.measure import measure_load
from moesaic.measure.load import dead_experts, entropy, load_share, variation
from tests.measure.test_loss import TEXTS


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    return MixtralForCausalLM(config)


def llama_moe(cls: str = "LlamaMoE", **options: Any) -> Any:
    import moesaic.models as models

    torch.manual_seed(0)
    config = getattr(models, f"{cls}Config")(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_experts=6,
        num_selects=2,
        initializer_range=0.3,
        **options,
    )
    return getattr(models, f"{cls}ForCausalLM")(config)


def expected(model: Any, tokenizer: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Top 2 of the router logits of each document alone: counts and sums of weights, [L, E]."""
    found = {}
    for name, texts in TEXTS.items():
        counts, weights = np.zeros((3, 6)), np.zeros((3, 6))
        for row in document_rows(texts, tokenizer, context=48):
            with torch.no_grad():
                output = model(torch.tensor([row]), output_router_logits=True)
            for layer, logits_TE in enumerate(output.router_logits):
                top, ids_TK = logits_TE.reshape(-1, 6).float().topk(2)
                for ids, scores in zip(ids_TK, top.softmax(-1), strict=True):
                    for e, score in zip(ids.tolist(), scores.tolist(), strict=True):
                        counts[layer, e] += 1
                        weights[layer, e] += score
        found[name] = (counts, weights)
    return found


@pytest.mark.parametrize("make", [mixtral, llama_moe])
def test_counts_what_the_routers_chose(make: Any, tokenizer: Any) -> None:
    model = make().eval()
    report = measure_load(model, tokenizer, TEXTS, context=48, batch_size=4)
    assert report.domains == ("long", "short")
    assert report.top_k == 2
    assert len(report.layers) == 3
    for d, (counts, weights) in enumerate(expected(model, tokenizer).values()):
        assert report.counts_DLE[d].tolist() == counts.tolist()
        assert np.allclose(report.importance_DLE[d], weights, atol=1e-3)
        assert (report.counts_DLE[d].sum(-1) == 2 * report.tokens_D[d]).all()


def test_agrees_with_what_llama_moe_itself_reports(tokenizer: Any) -> None:
    model = llama_moe().eval()
    report = measure_load(model, tokenizer, TEXTS, context=48)
    load = torch.zeros(3, 6)
    importance = torch.zeros(3, 6)
    for texts in TEXTS.values():
        for row in document_rows(texts, tokenizer, context=48):
            with torch.no_grad():
                output = model(torch.tensor([row]))
            load += torch.stack(output.gate_load)
            importance += torch.stack(output.gate_importance)
    assert report.counts_DLE.sum(0).tolist() == load.tolist()
    assert np.allclose(report.importance_DLE.sum(0), importance.numpy(), atol=1e-3)


def test_residual_experts_are_not_counted(tokenizer: Any) -> None:
    widths = {"intermediate_size_moe": 96, "intermediate_size_residual": 32}
    model = llama_moe("LlamaMoEResidual", num_experts_residual=2, **widths).eval()
    report = measure_load(model, tokenizer, TEXTS, context=16)
    assert report.counts_DLE.shape == (2, 3, 6)
    assert (report.counts_DLE.sum(-1) == 2 * report.tokens_D[:, None]).all()


def test_hooks_are_removed_and_modes_restored(tokenizer: Any) -> None:
    model = mixtral().train()
    measure_load(model, tokenizer, TEXTS, context=16, max_documents=1)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_dense_model_is_refused(tokenizer: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    with pytest.raises(UserError, match="has no router"):
        measure_load(dense, tokenizer, TEXTS)


def test_summary_is_json_and_adds_the_domains_up(tokenizer: Any) -> None:
    report = measure_load(mixtral(), tokenizer, TEXTS, context=16)
    summary = json.loads(json.dumps(report.summary()))
    assert set(summary["domains"]) == {"long", "short", "all"}
    everything = summary["domains"]["all"]
    assert everything["tokens"] == int(report.tokens_D.sum())
    share = report.counts_DLE.sum(0) / report.counts_DLE.sum((0, 2))[:, None]
    assert np.allclose(everything["load"], share)
    assert np.allclose(np.sum(everything["load"], axis=-1), 1)


def test_figures_of_even_and_uneven_load() -> None:
    counts = np.array([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0], [0, 0, 0, 0]])
    assert load_share(counts).tolist() == [
        [0.25] * 4,
        [1, 0, 0, 0],
        [0.5, 0.5, 0, 0],
        [0, 0, 0, 0],
    ]
    assert variation(counts).tolist() == pytest.approx([0, math.sqrt(3), 1, 0])
    assert entropy(counts).tolist() == pytest.approx([1, 0, 0.5, 0])
    assert dead_experts(counts).tolist() == [0, 3, 2, 4]
    assert entropy(np.array([[3]])).tolist() == [1]
