"""The distillation of one layer: what it lowers, what it leaves alone, where it may look."""

import pytest
import torch
from torch.nn import functional

from moesaic.construct.activations import LayerStream
from moesaic.construct.dense import open_dense
from moesaic.construct.free import head as heads
from moesaic.construct.free.block import Fixed, RoutedBlock, dense_block
from moesaic.construct.free.distil import Distillation, Target, distil
from moesaic.construct.free.head import Head, head_of
from moesaic.construct.layer_maker import LayerMaker
from moesaic.construct.pipeline import Recipe, run
from moesaic.core.errors import UserError
from tests.construct.dense_family_models import write_family
from tests.construct.dense_models import write_text_tokenizer

LAYERS, HIDDEN, WIDTH, EXPERTS = 3, 32, 48, 4
QUICK = {"passes": 6, "batch": 48, "learning_rate": 1e-4}


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("at_once", [7 * 50, 1 << 20])
def test_divergence_is_the_kl_with_its_gradient(cap, at_once, monkeypatch):
    monkeypatch.setattr(heads, "_AT_ONCE_ON_CPU", at_once)  # 7 tokens, or all
    x, wanted, weight = _normal(30, 8), _normal(30, 8, seed=1), _normal(50, 8, seed=2)
    head, found = Head(weight, cap), []
    for ours in (True, False):
        given = x.clone().requires_grad_()
        if ours:
            kl = head.divergence(given, wanted)
        else:
            logits = [functional.linear(it, weight) for it in (given, wanted)]
            if cap:
                logits = [cap * (it / cap).tanh() for it in logits]
            mine, its = (it.log_softmax(-1) for it in logits)
            kl = functional.kl_div(mine, its, log_target=True, reduction="batchmean")
        (3 * kl).backward()
        found.append((kl.detach(), given.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


class Case:
    """The first layer of a tiny model as experts, and the way through the layers behind it."""

    def __init__(self, path, kind, *, top_k=2, kept=True, device="cpu"):
        self.stream = stream = LayerStream(open_dense(path), context=16, device=device)
        layer = stream.load(0)
        weights = {
            "gate_PD": layer.mlp.gate_proj.weight.detach(),
            "up_PD": layer.mlp.up_proj.weight.detach(),
            "down_PD": layer.mlp.down_proj.weight.T.contiguous().detach(),
        }
        router = {"weight": _normal(EXPERTS, HIDDEN), "bias": torch.zeros(EXPERTS)}
        router = {name: value.to(device) for name, value in router.items()}
        fixed = Fixed(top_k, layer.mlp.act_fn)
        self.block = RoutedBlock(
            stream, layer, fixed, width=WIDTH // EXPERTS, router=router, **weights
        )
        ids = torch.randint(0, 60, (24, 16), generator=torch.Generator().manual_seed(5))
        self.rows = stream.embed(ids)
        self.frozen = [stream.load(layer) for layer in range(1, LAYERS)]
        with torch.no_grad():
            after = dense_block(stream, stream.load(0))(self.rows)
            self.targets = [Target(after, stream.norm_after(0))]
            for layer, module in enumerate(self.frozen, start=1):
                lead = dense_block(stream, module)
                after = lead(after)
                norm = stream.norm_after(layer)
                self.targets.append(Target(after if kept else None, norm, lead))
        self.start = {name: weight.clone() for name, weight in self.block.state_dict().items()}

    def distil(self, head=True, graph=False, **fields):
        settings = Distillation(**{**QUICK, **fields})
        last = head_of(self.stream) if head else None
        facts = distil(
            self.block, self.rows, self.targets, head=last, settings=settings, seed=0, graph=graph
        )
        return facts, {name: weight.clone() for name, weight in self.block.state_dict().items()}


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def case(request, tmp_path_factory):
    path = write_family(tmp_path_factory.mktemp(request.param) / "model", request.param)
    return lambda **given: Case(path, request.param, **given)


def test_a_dense_layer_misses_nothing(case):
    whole = case(top_k=EXPERTS)
    facts, _ = whole.distil(learning_rate=1e-6)
    assert facts["missed_before"] < 1e-8
    assert facts["kl_before"] == pytest.approx(0, abs=1e-5)
    assert facts["loss_after"] <= facts["loss_before"]


def test_everything_in_a_layer_moves_and_nothing_behind_it(case):
    one = case()
    before = [{k: w.clone() for k, w in module.state_dict().items()} for module in one.frozen]
    facts, after = one.distil()
    for name in ("missed", "kl", "loss"):
        assert facts[f"{name}_after"] < facts[f"{name}_before"]
    assert all(not torch.equal(weight, after[name]) for name, weight in one.start.items())
    for module, weights in zip(one.frozen, before, strict=True):
        assert all(
            torch.equal(weight, weights[name]) for name, weight in module.state_dict().items()
        )
        assert all(weight.grad is None for weight in module.parameters())


def test_the_loss_is_the_places_and_the_weighted_divergence(case):
    facts, with_kl = case().distil(kl=0.5)
    for when in ("before", "after"):
        total = LAYERS * facts[f"missed_{when}"] + 0.5 * facts[f"kl_{when}"]
        assert facts[f"loss_{when}"] == pytest.approx(total)
    _, more = case().distil(kl=2.0)
    plain, without = case().distil(head=False)
    assert set(plain) == {
        f"{name}_{when}" for name in ("missed", "loss") for when in ("before", "after")
    }
    for other in (more, without):
        assert not torch.equal(with_kl["down_PD"], other["down_PD"])


def test_streams_that_are_not_kept_are_made_again(case):
    # one step: the streams differ by rounding, which more steps of a saturated model make large
    kept, made = (case(kept=kept).distil(passes=0.01)[0] for kept in (True, False))
    assert kept == pytest.approx(made, rel=1e-3)
    assert kept["loss_after"] < kept["loss_before"]


def test_a_layer_that_is_no_nearer_stays_as_it_was(case):
    one = case()
    facts, after = one.distil(learning_rate=0.3)
    assert all(torch.equal(weight, after[name]) for name, weight in one.start.items())
    for name in ("missed", "kl", "loss"):
        assert facts[f"{name}_after"] == facts[f"{name}_before"]
    with pytest.raises(UserError, match="diverged at learning_rate"):
        case().distil(learning_rate=1e30)


def test_half_precision_of_what_is_frozen_hardly_matters(case, monkeypatch):
    """As on a GPU, where the frozen layers and the head run so."""
    usual = case().distil()
    half = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr("moesaic.construct.free.distil._half_precision", lambda _: half)
    for kept in (True, False):
        facts, weights = case(kept=kept).distil()
        assert facts == pytest.approx(usual[0], rel=0.05)
        assert not torch.equal(weights["down_PD"], usual[1]["down_PD"])


@pytest.mark.gpu
def test_replayed_steps_are_the_eager_ones(tmp_path):
    path = write_family(tmp_path / "model", "llama")
    found = [Case(path, "llama", device="cuda").distil(graph=graph) for graph in (True, False)]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-2)
    for name, weight in found[0][1].items():
        torch.testing.assert_close(weight, found[1][1][name], atol=2e-3, rtol=1e-2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    write_family(folder / "model", "llama")
    write_text_tokenizer(folder / "model")
    (folder / "text.txt").write_text(
        "the quick brown fox jumps over a lazy dog and then sleeps " * 60
    )
    return folder


def _facts(model, **refine):
    given = {"experts": 4, "top_k": 2, "context": 32, "tokens": 2048, "device": "cpu"}
    refine = {"method": "layerwise", "passes": 1, "batch": 128, "ahead": None, **refine}
    settings = Recipe(data=str(model / "text.txt"), refine=refine, **given)
    return [layer.facts["refine"] for layer in run(model / "model", settings).layers]


def test_no_number_of_layers_ahead_means_all(model):
    far, two, one = _facts(model), _facts(model, ahead=2), _facts(model, ahead=1)
    assert far == two
    assert one != two
    assert "kl_after" in far[0]
    assert ["kl_after" in facts for facts in one] == [False, True, True]
    assert not any("kl_after" in facts for facts in _facts(model, kl=0))


@pytest.mark.parametrize("rows", [0, 2])
def test_room_for_streams_changes_nothing(model, rows, monkeypatch):
    usual = _facts(model)
    monkeypatch.setattr("moesaic.construct.layer_maker.KEPT", rows * 2048 * HIDDEN * 4)
    kept, inner = [], LayerMaker._targets

    def watched(maker, *given):
        found = inner(maker, *given)
        kept.append([target.stream_BCD is not None for target in found])
        return found

    monkeypatch.setattr(LayerMaker, "_targets", watched)
    for one, other in zip(usual, _facts(model), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert [sum(places) for places in kept] == ([1, 1, 1] if rows == 0 else [2, 2, 1])
