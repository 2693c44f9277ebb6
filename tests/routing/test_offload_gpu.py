"""Offloading to a GPU: experts really travel, nothing is read before it has arrived."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moesaic
from moesaic.routing import caches
from tests.kernels.families import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SIZES = {
    "width": 1536,
    "hidden": 512,
    "layers": 4,
}  # an expert of 9 MB, longer on its way than read


def decoded(model, ids, steps=24):
    """Greedy tokens and the logits of every step, with a cache of keys and values."""
    with torch.inference_mode():
        past, logits, tokens = None, [], ids
        for _ in range(steps):
            out = model(
                input_ids=tokens, past_key_values=past, use_cache=True, output_router_logits=False
            )
            past, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
            logits.append(out.logits[:, -1].float())
    return torch.stack(logits, 1)


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_outputs_and_hits(policy, prefetch, scope):
    model = tiny("mixtral", **SIZES).cuda()
    for rows, length in ((1, 5), (3, 40)):
        ids = torch.randint(1, 97, (rows, length), device="cuda")
        expected = decoded(model, ids)
        for cache in (1.0, 2.0):
            with (
                moesaic.offload(
                    model, cache=cache, policy=policy, scope=scope, prefetch=prefetch
                ) as off,
                moesaic.recording(model, logits=False) as rec,
            ):
                found = decoded(model, ids)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
            asked = np.stack([rec.experts[x].numpy() for x in sorted(rec.experts)], 1)[None]
            rates = caches.hit_rates(asked, num_experts=6, policy=policy, scope=scope)[0]
            rates = rates if scope == "layer" else rates[None]
            for rate, size, hits, count in zip(
                rates, off.slots, off.hits, off.requests, strict=True
            ):
                assert np.float32(hits / count) == rate[size - 1]


def test_memory_and_what_is_put_back():
    model = tiny("mixtral", **SIZES).to("cuda", torch.bfloat16)
    ids = torch.randint(1, 97, (2, 30), device="cuda")
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected, held = decoded(model, ids), torch.cuda.memory_allocated()
    with moesaic.offload(model, cache=1.0) as off:
        inside = torch.cuda.memory_allocated()
        assert held - inside >= 0.9 * (off.host_bytes - off.device_bytes)
        experts = model.model.layers[0].mlp.experts
        assert experts.gate_up_proj.device.type == "cpu"
        assert experts.gate_up_proj.is_pinned()
        decoded(model, ids)
    assert all(p.device.type == "cuda" for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(decoded(model, ids), expected)
    assert torch.cuda.memory_allocated() <= held * 1.01


def test_a_checkpoint_never_lies_whole_on_the_gpu(tmp_path):
    tiny("mixtral", **SIZES).save_pretrained(tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    with moesaic.offload(tmp_path, cache=1.0, device="cuda") as off:
        peak = torch.cuda.max_memory_allocated() - start
        assert peak < off.device_bytes + 0.25 * off.host_bytes
        found = decoded(off.model, torch.randint(1, 97, (1, 5), device="cuda"))
        assert found.isfinite().all()
        measured = off.measure(torch.ones(1, 8, dtype=torch.long), new_tokens=8)
        assert measured.bandwidth > 1e9
    assert all(p.device.type == "cpu" for p in off.model.parameters())
