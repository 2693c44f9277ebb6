"""Recording: what every family's routers chose, against the original programs' numbers."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moesaic
from moesaic.core.console import LoggingReporter, reporting
from moesaic.core.errors import UserError
from moesaic.models import LlamaMoEConfig, LlamaMoEForCausalLM
from moesaic.routing import recording as module
from tests.models.golden import FAMILIES, family

FIXTURES = sorted(
    path.parent.name
    for path in FAMILIES.glob("*/expected.safetensors")
    if any("topk_idx" in key for key in family(path.parent.name)[1])
)
GROUPS = {  # beginning of the golden keys: where the recording holds them
    "": lambda rec: rec,
    "attn_": lambda rec: rec.attention,
    "dec": lambda rec: rec,
    "enc": lambda rec: rec.encoder,
}
CLOSE = {"atol": 1e-5, "rtol": 0}


def load(name: str) -> nn.Module:
    return moesaic.load(FAMILIES / name, dtype=torch.float32)


def inputs(name: str, case: str = "plain") -> dict[str, torch.Tensor]:
    arrays, _ = family(name)
    prefix = "" if case == "plain" else f"{case}_"
    given = {"input_ids": arrays[f"{prefix}input_ids"]}
    if f"{prefix}attention_mask" in arrays:
        given["attention_mask"] = arrays[f"{prefix}attention_mask"]
    if "decoder_input_ids" in arrays:
        given["decoder_input_ids"] = arrays["decoder_input_ids"]
    return given


def wanted(name: str, case: str, group: str) -> dict[int, tuple[torch.Tensor, ...]]:
    """Golden ids, weights and logits by layer."""
    _, expected = family(name)
    before, after = ("", f"_{group}") if group in ("enc", "dec") else (group, "")
    logits = f"{group}_router_logits" if after else f"{group}router_logits"
    start = f"{case}/{before}topk_idx{after}/"
    found = {}
    for key in expected:
        if key.startswith(start):
            layer = key.removeprefix(start)
            weights = expected[f"{case}/{before}topk_weight{after}/{layer}"]
            logits_RE = expected[f"{case}/{logits}/{layer}"]
            logits_RE = logits_RE.flatten(0, -2)
            rows = len(logits_RE)
            ids = expected[key].reshape(rows, -1)
            weights = weights.reshape(rows, -1)
            if name.startswith("openmoe"):  # stored as its id with weight 0
                ids = torch.where(weights == 0, -1, ids)
            found[int(layer)] = (ids, weights, logits_RE)
    return found


def in_order(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids, order = ids.sort(dim=1)
    return ids, weights.gather(1, order)


@pytest.mark.parametrize("name", FIXTURES)
def test_golden(name):
    model = load(name)
    checked = 0
    for case in ("plain", "right", "left"):
        if f"{case}/logits" not in family(name)[1]:
            continue
        with torch.no_grad(), moesaic.recording(model) as rec:
            model(**inputs(name, case))
        for group, place in GROUPS.items():
            golden, found = wanted(name, case, group), place(rec)
            if not golden:
                continue
            assert sorted(found.experts) == sorted(golden) == sorted(found.weights)
            mask = inputs(name, case).get("attention_mask")
            if mask is not None and group != "dec":
                assert torch.equal(found.mask, mask.flatten().bool())
            for layer, (ids, weights, logits) in golden.items():
                got = found.experts[layer], found.weights[layer]
                want = ids, weights
                if name.startswith("deepseek"):  # the original's order means nothing
                    got, want = in_order(*got), in_order(*want)
                real = found.mask
                assert len(real) == len(ids)
                assert torch.equal(got[0][real], want[0][real]), (case, group, layer)
                torch.testing.assert_close(got[1][real].float(), want[1][real], **CLOSE)
                torch.testing.assert_close(found.logits[layer][real].float(), logits[real], **CLOSE)
                checked += 1
        assert rec.calls == [0, len(rec.mask)]
    assert checked


@pytest.mark.parametrize("name", FIXTURES)
def test_generate(name):
    """Decoding records the rows of every step, and what one forward pass over them all chooses."""
    model = load(name)
    prompt = inputs(name)["input_ids"][:, :8]
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "use_cache": True}
    with torch.no_grad(), moesaic.recording(model) as rec:
        tokens = model.generate(prompt, **given, eos_token_id=None, pad_token_id=0)
    batch = len(prompt)
    encoded = model.config.is_encoder_decoder
    first = 1 if encoded else 8
    assert rec.calls == [0, *(batch * (first + step) for step in range(6))]
    assert rec.mask.all()
    assert len(rec.mask) == rec.calls[-1]
    if encoded:
        assert rec.encoder.calls == [0, batch * 8]
        again = {"input_ids": prompt, "decoder_input_ids": tokens[:, :-1]}
    else:
        again = {"input_ids": tokens[:, :-1]}
    with torch.no_grad(), moesaic.recording(model) as whole:
        model(**again)
    if name in ("openmoe", "openmoe_lowcap", "switch_transformers_lowcap"):
        return  # capacity depends on what is in the batch
    if name.startswith("yuan"):
        return  # an EOD inside the prompt restarts positions in the whole pass only
    borders = list(itertools.pairwise(rec.calls))
    for layer, ids in rec.experts.items():
        steps = [ids[start:stop].view(batch, -1, ids.shape[1]) for start, stop in borders]
        together = torch.cat(steps, dim=1).flatten(0, 1)
        assert torch.equal(together.sort(1)[0], whole.experts[layer].sort(1)[0])
    with torch.no_grad():
        unrecorded = model.generate(prompt, **given, eos_token_id=None, pad_token_id=0)
    assert torch.equal(tokens, unrecorded)


def llama_moe(**fields: object) -> LlamaMoEForCausalLM:
    torch.manual_seed(0)
    config = LlamaMoEConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=4,
        **{"num_selects": 2, "score_scale_factor": 2.0, **fields},
    )
    return LlamaMoEForCausalLM(config).eval()


IDS = torch.arange(24).view(2, 12)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_scores_that_are_not_multiplied_weigh_one():
    model = llama_moe(multiply_gate_scores=False, score_scale_factor=1.0)
    with torch.no_grad(), moesaic.recording(model) as rec:
        model(IDS)
    assert all((weights == 1).all() for weights in rec.weights.values())
    assert rec.experts[0].dtype == torch.int64


def test_dropped_tokens_are_minus_one():
    """What SwitchDropTokenCalculator says it dropped, and nothing else."""
    model = llama_moe(
        gate_type="SwitchBalancedGate",
        calculator_type="SwitchDropTokenCalculator",
        num_selects=1,
        capacity_factor=0.5,
    )
    with torch.no_grad(), moesaic.recording(model) as rec:
        dropped = model(IDS).num_dropped_tokens
    for layer, ids in rec.experts.items():
        assert (ids == -1).sum() == dropped[layer] > 0
        counts = torch.bincount(ids[ids >= 0], minlength=4)
        assert (counts <= int(0.5 * 24 / 4)).all()
        assert (rec.weights[layer] > 0).all()


def test_several_passes_are_laid_end_to_end():
    model = llama_moe()
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    with torch.no_grad(), moesaic.recording(model) as rec:
        model(IDS[:, :3])
        assert rec.experts[0].shape == (6, 2)  # also inside the block
        model(input_ids=IDS, attention_mask=mask)
        model(inputs_embeds=model.get_input_embeddings()(IDS[:1]))
    assert rec.calls == [0, 6, 30, 42]
    expected = torch.cat([torch.ones(6), mask.flatten(), torch.ones(12)]).bool()
    assert torch.equal(rec.mask, expected)
    for start, stop, arguments in (
        (0, 6, {"input_ids": IDS[:, :3]}),
        (6, 30, {"input_ids": IDS, "attention_mask": mask}),
    ):
        with torch.no_grad(), moesaic.recording(model) as alone:
            model(**arguments)
        for layer in rec.experts:
            assert torch.equal(rec.experts[layer][start:stop], alone.experts[layer])
            assert torch.equal(rec.logits[layer][start:stop], alone.logits[layer])
    assert rec.attention.experts == rec.encoder.experts == {}


def test_mask_of_queries_and_keys():
    """A 4-D mask: a row counts when it may look at itself."""
    model = llama_moe()
    allowed = torch.ones(12, 12).tril().bool().repeat(2, 1, 1, 1)
    allowed[0, :, :, :4] = False
    additive = torch.zeros(2, 1, 12, 12).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad(), moesaic.recording(model) as rec:
        model(input_ids=IDS, attention_mask=additive)
    assert torch.equal(rec.mask.view(2, 12).sum(1), torch.tensor([8, 12]))


def test_nothing_changes_and_nothing_stays():
    model = llama_moe()
    before = hooks_of(model)
    with torch.no_grad():
        plain = model(IDS).logits
        with moesaic.recording(model) as rec, moesaic.recording(model) as inner:
            assert hooks_of(model) > before
            recorded = model(IDS).logits
    assert torch.equal(plain, recorded)
    assert torch.equal(rec.experts[1], inner.experts[1])
    assert hooks_of(model) == before == 0
    with torch.no_grad():
        model(IDS)
    assert rec.calls == [0, 24]


def test_an_exception_removes_the_hooks_and_the_half_pass(monkeypatch):
    model = llama_moe()
    last = model.model.layers[1].mlp.calculator

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    def run() -> None:
        model(IDS[:, :4])
        monkeypatch.setattr(last, "forward", fail)
        model(IDS)

    with pytest.raises(RuntimeError, match="out of memory"), moesaic.recording(model) as rec:
        run()
    assert hooks_of(model) == 0
    assert rec.calls == [0, 8]
    assert len(rec.experts[0]) == len(rec.experts[1]) == 8


def test_what_was_chosen_is_what_was_run():
    """Another hook changes the router's choice after ours has heard it: the experts' ids count."""
    model = llama_moe()
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad(), moesaic.recording(model) as rec:
        handle = gate.register_forward_hook(
            lambda module, args, output: output._replace(ids=torch.full_like(output.ids, 3))
        )
        model(IDS)
        handle.remove()
    assert (rec.experts[0] == 3).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_checkpointed_layers(reentrant):
    """The second forward pass of gradient checkpointing is not recorded; no graph is kept."""
    model = llama_moe(gate_add_noise=False).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with moesaic.recording(model) as rec:
        model(IDS, labels=IDS).loss.backward()
    assert rec.calls == [0, 24]
    assert all(len(ids) == 24 for ids in rec.experts.values())
    kept = (*rec.weights.values(), *rec.logits.values())
    assert not any(tensor.requires_grad for tensor in kept)
    with torch.no_grad(), moesaic.recording(model.eval()) as plain:
        model(IDS)
    assert torch.equal(rec.experts[0], plain.experts[0])


def test_without_logits():
    model = llama_moe()
    with torch.no_grad(), moesaic.recording(model, logits=False) as rec:
        model(IDS)
        kept = [
            tensor
            for call in rec._stream.calls
            for _, parts in call.router
            for tensor in parts
            if tensor is not None
        ]
    assert kept
    assert not any(tensor.dim() == 2 and tensor.shape[1] == 4 for tensor in kept)
    assert rec.logits == {}
    assert sorted(rec.experts) == sorted(rec.weights) == [0, 1]


def test_much_is_moved_off_the_accelerator(monkeypatch):
    """What waits is moved to the CPU now and then, and reads the same."""
    model = llama_moe()
    monkeypatch.setattr(module, "_on_device", lambda kept: 600)
    monkeypatch.setattr(module, "_KEPT_BYTES", 6000)  # a pass: 2 layers, 2 ends of each
    with torch.no_grad(), moesaic.recording(model) as rec:
        for _ in range(5):
            model(IDS)
        moved = [not call.router for call in rec._stream.calls]
    assert moved == [True, True, True, False, False]
    assert rec.calls == [0, 24, 48, 72, 96, 120]
    for kept in (rec.experts, rec.weights, rec.logits):
        assert torch.equal(kept[0][:24], kept[0][96:])


def test_drained():
    model = llama_moe()
    with torch.no_grad(), moesaic.recording(model) as rec:
        model(IDS)
        whole = rec.experts[0]
        choices = rec.drain()
        assert torch.equal(choices[0].ids, whole)
        assert rec.calls == [0]
        assert rec.experts == {}
        assert rec.drain() == {}


def test_dispatched_by_accelerate(tmp_path):
    """Layers on the CPU and on disk, moved in by accelerate's own wrappers of `forward`."""
    from accelerate import disk_offload

    model = llama_moe()
    with torch.no_grad(), moesaic.recording(model) as plain:
        model(IDS)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    with torch.no_grad(), moesaic.recording(model) as rec:
        model(IDS)
    for layer, ids in plain.experts.items():
        assert torch.equal(rec.experts[layer], ids)
        assert torch.equal(rec.weights[layer], plain.weights[layer])


class Notes(LoggingReporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_compiled_models_are_recorded_uncompiled():
    """Compiled code calls no hooks: inside the block the model itself runs, and a note says so."""
    model, notes = llama_moe(), Notes()
    with torch.no_grad(), moesaic.recording(model) as plain:
        model(IDS)
        model(IDS.flip(0))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(IDS)
    for given in (compiled, model):  # the wrapper, and the model that someone else has wrapped
        with torch.no_grad(), reporting(notes), moesaic.recording(given) as rec:
            compiled(IDS)
            compiled(IDS.flip(0))
        assert rec.calls == [0, 24, 48]
        assert all(torch.equal(rec.experts[layer], plain.experts[layer]) for layer in (0, 1))
    assert ["uncompiled" in text for text in notes.said if "compile" in text] == [True]
    with torch.no_grad():
        compiled(IDS)
    assert rec.calls == [0, 24, 48]
    torch._dynamo.reset()


def test_replaced_parts_are_noticed():
    """A second recording of a model whose parts were replaced hears the new ones."""
    model, other = llama_moe(), llama_moe()
    with moesaic.recording(model):
        pass
    model.model.layers[1].mlp = other.model.layers[0].mlp
    with torch.no_grad(), moesaic.recording(model) as rec:
        model(IDS)
    assert sorted(rec.experts) == [0, 1]
    model.model.layers[0].mlp = nn.Identity()
    model.model.layers = model.model.layers[1:]
    with torch.no_grad(), moesaic.recording(model) as rec:
        model(IDS)
    assert sorted(rec.experts) == [0]
    model.model = other.model
    with torch.no_grad(), moesaic.recording(model) as rec:
        model(IDS)
    assert sorted(rec.experts) == [0, 1]


def test_models_are_let_go():
    model = llama_moe().model
    with torch.no_grad(), moesaic.recording(model) as rec:
        model(IDS)
    assert rec.calls == [0, 24]
    gone = weakref.ref(model)
    del model, rec
    gc.collect()
    assert gone() is None


def test_dense_models_have_nothing_to_record():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(UserError, match="dense"), moesaic.recording(LlamaForCausalLM(config)):
        pass


SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "pad_token_id": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 99,
    "global_head_dim": 8,
    "num_global_key_value_heads": 4,
    "routed_scaling_factor": 2.5,
    "moe_layer_start_index": 1,
    "moe_num_experts": 6,
}
NATIVE = {  # what is peculiar: scaled in the router, biased choice, probabilities, in the layer
    "deepseek_v3": ({"n_routed_experts": 6}, [1, 2]),
    "gpt_oss": ({"num_local_experts": 6}, [0, 1, 2]),
    "gemma4_text": ({"num_experts": 6}, [0, 1, 2]),
    "minimax_m2": ({"num_local_experts": 6}, [0, 1, 2]),
    "ernie4_5_moe": ({}, [1, 2]),
    "glm4_moe": ({"n_routed_experts": 6}, [1, 2]),
    "cohere2_moe": ({"num_experts": 6}, [0, 1, 2]),
}


@pytest.mark.parametrize("model_type", NATIVE)
def test_any_model_with_replaceable_experts(model_type):
    """What is recorded is what transformers' experts interface hands to the experts."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    extra, layers = NATIVE[model_type]
    config_class = CONFIG_MAPPING[model_type]
    fields = {name for cls in config_class.__mro__ for name in getattr(cls, "__annotations__", {})}
    config = config_class(**{k: v for k, v in {**SMALL, **extra}.items() if k in fields})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and not parameter.any():  # routers that start at zero
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(experts: nn.Module, x: torch.Tensor, *args: torch.Tensor, **more: torch.Tensor):
        ids, weights = (*args, *more.values())
        seen.append((ids.clone(), weights.clone()))
        return type(experts).forward.__wrapped__(experts, x, *args, **more)

    ALL_EXPERTS_FUNCTIONS["spy"] = spy
    try:
        model.set_experts_implementation("spy")
        with torch.no_grad(), moesaic.recording(model) as rec:
            model(IDS)
    finally:
        del ALL_EXPERTS_FUNCTIONS["spy"]
    assert list(rec.experts) == list(rec.weights) == list(rec.logits) == layers
    assert len(seen) == len(layers)
    for layer, (ids, weights) in zip(layers, seen, strict=True):
        assert torch.equal(rec.experts[layer], ids)
        assert torch.equal(rec.weights[layer], weights)
        logits = rec.logits[layer].float()
        assert logits.shape == (24, 6)
        assert not torch.allclose(logits.sum(1), torch.ones(24), atol=1e-3)  # no probabilities
