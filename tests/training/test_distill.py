"""A teacher: its divergence against F.kl_div, what an update makes of it, and whole runs."""

from __future__ import annotations

import json
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.core.config import to_yaml
from moesaic.core.errors import UserError
from moesaic.models.load import load
from moesaic.training import distill
from moesaic.training.balance import set_balance_coefficient
from moesaic.training.config import OptimizerConfig
from moesaic.training.distill import Teacher, kl_divergence
from moesaic.training.loop import Run, read_config, train
from moesaic.training.optimizer import Optimizer
from moesaic.training.state import states
from moesaic.training.step import accumulate, build_pass, run_update
from tests.helpers import assert_user_error, run_cli
from tests.training import models
from tests.training.test_conversations import chat, row, talks  # noqa: F401 - chat is a fixture
from tests.training.test_loop import Stop, course, log, stop_after, weights
from tests.training.test_step import T, gradients, largest_difference, tokens

V = 37


def random_logits(rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    student, teacher = (3 * torch.randn(rows, V, generator=generator) for _ in range(2))
    learned = torch.rand(rows, generator=generator) < 0.6
    return student.to(dtype).requires_grad_(), teacher.to(dtype), learned


def expected_divergence(student, teacher, learned):
    """Of the rows that are learned, in double precision."""
    student, teacher = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)[learned].sum()


# One chunk; chunks that end with the rows, and that do not; one row a chunk; a row above the limit.
@pytest.mark.parametrize(("rows", "elements"), [(10, 2**24), (9, 3 * V), (10, 3 * V + 5), (7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_and_its_gradient_are_those_of_kl_div(rows, elements, dtype, monkeypatch):
    monkeypatch.setattr(distill, "ELEMENTS", elements)
    student, teacher, learned = random_logits(rows, dtype)
    assert 0 < int(learned.sum()) < rows
    expected = expected_divergence(student, teacher, learned)
    found = kl_divergence(student, teacher, learned)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (0.3 * expected).backward()
    want, student.grad = student.grad.double(), None
    (0.3 * found).backward()
    assert student.grad.dtype == dtype
    close = 1e-6 if dtype == torch.float32 else 2**-7 * float(want.abs().max())
    torch.testing.assert_close(student.grad.double(), want, rtol=0, atol=close)
    assert not student.grad[~learned].any()
    assert student.grad[learned].any(-1).all()


def test_nothing_learned_is_zero_and_no_gradient_is_needed():
    student, teacher, _ = random_logits(4)
    nothing = kl_divergence(student, teacher, torch.zeros(4, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 0.0
    assert not student.grad.any()
    everything = torch.ones(4, dtype=torch.bool)
    with torch.no_grad():
        found = kl_divergence(student, teacher, everything)
    assert float(found) == pytest.approx(
        expected_divergence(student, teacher, everything).item(), rel=1e-5
    )


def test_three_float32_of_some_rows_are_held(monkeypatch):
    monkeypatch.setattr(distill, "ELEMENTS", 3 * V)
    student, teacher, learned = random_logits(40, torch.bfloat16)
    made, held = [], []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                made.append(weakref.ref(out))
            alive = {id(x): x.numel() for x in (found() for found in made) if x is not None}
            held.append(sum(size for size in alive.values() if size >= V))
            return out

    with Sizes():
        kl_divergence(student, teacher, learned).backward()
    assert max(held) == 3 * 3 * V


def test_a_teacher_answers_in_its_own_type():
    model, ids = models.dense(), tokens(2)
    said = model(input_ids=ids).logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert float(Teacher(models.dense(), 1.0).divergence(said, ids, input_ids=ids)) == 0.0


@pytest.mark.parametrize("weight", [0.9, 1.0])
def test_cross_entropy_is_learned_below_weight_one_only(weight):
    run_pass = build_pass(models.dense(), teacher=Teacher(models.dense(seed=5), weight))
    assert run_pass(tokens(2)).cross_entropy.requires_grad == (weight < 1)


def plain_objective(model, teacher, weight, given):
    """(1 - w) CE + w KL, a learned token's, as one would write it down."""
    cross_entropy, divergence, count = 0.0, 0.0, 0
    for ids, positions, labels in zip(*given, strict=True):
        at = {} if positions is None else {"position_ids": positions[None]}
        # Without a cache: with one, transformers does not look for positions that begin anew.
        both = (m(input_ids=ids[None], use_cache=False, **at) for m in (model, teacher))
        said, wanted = (outputs.logits[0, :-1] for outputs in both)
        kept = labels[1:] != -100
        cross_entropy += F.cross_entropy(said[kept], labels[1:][kept], reduction="sum")
        divergence += expected_divergence(said, wanted.detach(), kept)
        count += int(kept.sum())
    loss = ((1 - weight) * cross_entropy + weight * divergence) / count
    return loss, cross_entropy.item() / count, divergence.item() / count


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("weight", "passes"), [(0.3, 1), (0.3, 2), (1.0, 2)])
def test_an_update_learns_the_weighted_sum(weight, passes, packed, monkeypatch):
    monkeypatch.setattr(distill, "ELEMENTS", 5 * 64)
    model, teacher = models.mixtral(router_aux_loss_coef=0.0), models.dense(seed=5)
    if packed:
        rows = [row(talks(seed), length=20) for seed in range(4)]
        ids, positions, labels = (
            torch.cat([one[name] for one in rows]) for name in ("ids", "position", "labels")
        )
        given = {"position_ABT": positions, "labels_ABT": labels}
    else:
        ids = labels = tokens(4)
        positions, given = [None] * 4, {}
    loss, cross_entropy, divergence = plain_objective(
        model, teacher, weight, (ids, positions, labels)
    )
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    run_pass = build_pass(model, teacher=Teacher(teacher, weight))
    split = {name: x.view(passes, 4 // passes, -1) for name, x in given.items()}
    result = accumulate(run_pass, ids.view(passes, 4 // passes, -1), **split)
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert largest_difference(expected, got) < 1e-6
    assert float(result.values["loss"]) == pytest.approx(cross_entropy, rel=1e-5)
    assert float(result.values["distill_loss"]) == pytest.approx(divergence, rel=1e-5)
    assert divergence > 1e-4
    assert all(p.grad is None for p in teacher.parameters())


def test_its_own_copy_teaches_a_model_nothing():
    ids = tokens(4).view(2, 2, T)
    model = models.dense().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, OptimizerConfig(lr=1e-2, weight_decay=0.0))
    result = run_update(build_pass(model, teacher=Teacher(models.dense(), 1.0)), optimizer, ids)
    assert float(result.values["distill_loss"]) == 0.0
    assert float(result.values["grad_norm"]) == 0.0
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_balance_is_learned_beside_a_teacher_of_weight_one():
    ids = tokens(4).view(2, 2, T)
    model, teacher = models.mixtral(), models.mixtral()
    set_balance_coefficient(model, 0.5)
    _, with_balance = gradients(model, ids)
    set_balance_coefficient(model, 0.0)
    _, without = gradients(model, ids)
    set_balance_coefficient(model, 0.5)
    model.zero_grad(set_to_none=True)
    result = accumulate(build_pass(model, teacher=Teacher(teacher, 1.0)), ids)
    assert float(result.values["distill_loss"]) == 0.0
    assert float(result.values["balance_loss"]) > 1e-3
    for name, p in model.named_parameters():
        if name in with_balance and p.grad is not None:
            expected = with_balance[name] - without[name]
            torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-6)


def test_a_compiled_pass_gives_the_same():
    ids = tokens(4).view(2, 2, T)
    found = []
    for compiled in (False, True):
        model, teacher = models.dense(), models.dense(seed=5)
        run_pass = build_pass(model, teacher=Teacher(teacher, 0.5))
        if compiled:
            torch._dynamo.reset()
            run_pass = torch.compile(run_pass, backend="aot_eager")
        result = accumulate(run_pass, ids)
        found.append((result.values, {n: p.grad for n, p in model.named_parameters()}))
    (eager, expected), (values, got) = found
    assert {n: float(v) for n, v in values.items()} == pytest.approx(
        {n: float(v) for n, v in eager.items()}, rel=1e-6
    )
    assert largest_difference(expected, got) < 1e-6


def decided(**fields):
    """A teacher that is sure of what no data says."""
    model = models.dense(seed=5, **fields)
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)
    return model


@pytest.fixture
def taught(settings, checkpoint):
    """Function to the mapping of a run with a teacher."""

    def make(build=models.llama_moe, weight=1.0, **changes):
        teacher = {"model": str(checkpoint(decided)), "weight": weight}
        return settings(build, distill=teacher, **changes)

    return make


@torch.no_grad()
def divergence_on(path, teacher, ids_BT):
    model = load(path, dtype=torch.float32)
    teacher = load(teacher, dtype=torch.float32)
    said, wanted = (m(input_ids=ids_BT).logits[:, :-1].flatten(0, 1) for m in (model, teacher))
    everything = torch.ones(len(said), dtype=torch.bool)
    return float(expected_divergence(said, wanted, everything)) / len(said)


def test_a_distilled_run_comes_closer_to_its_teacher_and_only_it_is_trained(
    taught, settings, checkpoint, tmp_path
):
    teacher = checkpoint(decided)
    before = {file.name: file.read_bytes() for file in teacher.iterdir()}
    config = tmp_path / "run.yaml"
    config.write_text(to_yaml(taught(steps=40, optimizer={"lr": 1e-2})))
    result = run_cli("train", config, "-o", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "run"
    count = sum(p.numel() for p in decided(vocab_size=300).parameters())
    assert f"teacher: LlamaForCausalLM, {count:,} frozen parameters" in result.stderr
    lines = log(out)
    assert lines[-1]["distill_loss"] < 0.7 * lines[0]["distill_loss"]
    assert lines[-1]["loss"] > lines[0]["loss"], "the cross-entropy is reported, not learned"

    plain = train(settings(steps=40, optimizer={"lr": 1e-2}), out=tmp_path / "plain")
    assert "distill_loss" not in log(plain)[0]
    assert log(plain)[0]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-6)
    ids_BT = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(2))
    assert divergence_on(out, teacher, ids_BT) < 0.8 * divergence_on(plain, teacher, ids_BT)

    assert {file.name: file.read_bytes() for file in teacher.iterdir()} == before
    for ours, theirs in ((out, plain), (states(out)[39], states(plain)[39])):
        saved, alone = (load_file(path / "model.safetensors") for path in (ours, theirs))
        assert saved.keys() == alone.keys()
        files = ({file.name for file in path.iterdir()} for path in (ours, theirs))
        assert next(files) == next(files)
    lineage = json.loads((out / "moesaic.json").read_text())
    assert lineage["config"]["distill"] == {"model": str(teacher), "weight": 1.0}
    assert lineage["parameters"] == json.loads((plain / "moesaic.json").read_text())["parameters"]
    assert str(teacher) in (out / "train.yaml").read_text()


def test_a_dry_run_tells_of_the_teacher(taught, checkpoint, tmp_path):
    (tmp_path / "run.yaml").write_text(to_yaml(taught(weight=0.25)))
    result = run_cli("train", tmp_path / "run.yaml", "-o", tmp_path / "run", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.json["teacher"] == {
        "model": str(checkpoint(decided)),
        "weight": 0.25,
        "architecture": "LlamaForCausalLM",
        "parameters": sum(p.numel() for p in decided(vocab_size=300).parameters()),
    }


def test_an_interrupted_run_goes_on_bit_for_bit_with_the_same_teacher_only(
    taught, checkpoint, tmp_path, monkeypatch
):
    config = taught(weight=0.5)
    whole = train(config, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stop):
            train(config, out=tmp_path / "cut")
    teacher = config["distill"]["model"]
    for key, changed in (
        ("weight", {"model": teacher, "weight": 0.25}),
        ("model", {"model": str(checkpoint(models.dense)), "weight": 0.5}),
    ):
        with pytest.raises(UserError, match=rf"was started with distill\.{key}="):
            train({**config, "distill": changed}, out=tmp_path / "cut")
    with pytest.raises(UserError, match=r"was started with distill="):
        train({**config, "distill": None}, out=tmp_path / "cut")
    cut = train(config, out=tmp_path / "cut")
    assert course(cut) == course(whole)
    assert all(torch.equal(weights(whole)[name], w) for name, w in weights(cut).items())


def test_answers_alone_are_distilled_from_conversations(chat, tmp_path, monkeypatch):  # noqa: F811
    teacher = models.dense(seed=5, vocab_size=300)
    teacher.save_pretrained(tmp_path / "teacher")
    config = chat(distill={"model": str(tmp_path / "teacher"), "weight": 1.0})
    whole = train(config, out=tmp_path / "whole")
    found = log(whole)[0]
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(Stop):
            train(config, out=tmp_path / "cut")
    assert course(train(config, out=tmp_path / "cut")) == course(whole)
    # The first update's figures, from its own rows, one conversation after the other.
    settings = read_config(config)
    run = Run.prepare(settings, tmp_path / "again", resume=True)
    blocks = [run.data.stream.next() for _ in range(settings.batch.sequences)]
    given = [
        [torch.from_numpy(getattr(block, name)) for block in blocks]
        for name in ("ids", "position", "labels")
    ]
    assert any((labels < 0).any() for labels in given[2])
    _, cross_entropy, divergence = plain_objective(run.model, teacher, 1.0, given)
    assert found["loss"] == pytest.approx(cross_entropy, rel=1e-4)
    assert found["distill_loss"] == pytest.approx(divergence, rel=1e-4)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16", torch.bfloat16), ("mixed", torch.bfloat16), ("fp32", torch.float32)],
)
def test_a_teacher_is_held_in_the_type_its_student_computes_in(precision, dtype, taught, tmp_path):
    # grouped_mm: of the student's experts; the teacher has none
    config = taught(models.mixtral, precision=precision, experts="grouped_mm", steps=2)
    run = Run.prepare(read_config(config), tmp_path / "run", resume=True)
    assert not run.teacher.model.training
    assert {p.dtype for p in run.teacher.model.parameters()} == {dtype}
    assert not any(p.requires_grad for p in run.teacher.model.parameters())
    out = run.train()
    exact = train(taught(models.mixtral, steps=2), out=tmp_path / "exact")
    a, b = ([line["distill_loss"] for line in log(path)] for path in (exact, out))
    assert b == pytest.approx(a, rel=0.03)


def other_tokenizer(folder, checkpoint):
    shutil.copytree(checkpoint(models.dense), folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[200:202]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    return folder


BAD = {
    "missing": (lambda folder, _: folder, ["is no directory", "Give that of the teacher"]),
    "empty": (lambda folder, _: folder.mkdir() or folder, ["teacher"]),
    "wide": (
        lambda folder, _: models.dense(vocab_size=301).save_pretrained(folder) or folder,
        ["logits for 301 tokens, the model for 300"],
    ),
    "tokens": (other_tokenizer, ["is not that of this run: 2 tokens differ", "id "]),
    "short": (
        lambda folder, _: (
            models.dense(vocab_size=300, max_position_embeddings=16).save_pretrained(folder)
            or folder
        ),
        ["the teacher reads at most 16 positions"],
    ),
    "bare": (
        lambda folder, _: models.dense(vocab_size=300).model.save_pretrained(folder) or folder,
        ["LlamaModel", "no causal language model"],
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_teach_is_refused_before_anything_is_written(
    kind, settings, checkpoint, tmp_path
):
    make, words = BAD[kind]
    folder = make(tmp_path / "teacher", checkpoint)
    (tmp_path / "run.yaml").write_text(to_yaml(settings(distill={"model": str(folder)})))
    for dry in ([], ["--dry-run"]):
        result = run_cli("train", tmp_path / "run.yaml", "-o", tmp_path / "run", *dry)
        assert_user_error(result, *words)
        assert not (tmp_path / "run").exists()


def test_a_teacher_with_a_weight_that_is_no_number_is_refused(settings, checkpoint, tmp_path):
    teacher = checkpoint(models.dense)
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    broken = models.dense(vocab_size=300)
    broken.load_state_dict(tensors)
    broken.save_pretrained(tmp_path / "teacher")
    config = settings(distill={"model": tmp_path / "teacher"})
    with pytest.raises(UserError, match=r"teacher: the weight model\.norm\.weight holds NaN"):
        train(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["weight=0", "weight=2", "weight=.nan", "weigth=0.5"])
def test_weights_outside_their_range_are_refused(setting, taught, tmp_path):
    (tmp_path / "run.yaml").write_text(to_yaml(taught()))
    options = ["--set", f"distill.{setting}"]
    result = run_cli("train", tmp_path / "run.yaml", "-o", tmp_path / "run", *options)
    assert_user_error(result, setting.partition("=")[0])
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_mixes_conversations_is_refused(chat, tmp_path, monkeypatch):  # noqa: F811
    teacher = models.mixtral(vocab_size=300)
    teacher.save_pretrained(tmp_path / "teacher")
    forward = type(teacher).forward
    monkeypatch.setattr(
        type(teacher), "forward", lambda self, position_ids=None, **rest: forward(self, **rest)
    )
    with pytest.raises(UserError, match=r"does not keep conversations apart.*Give a teacher of"):
        train(chat(distill={"model": tmp_path / "teacher"}), out=tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_an_update_with_a_teacher_is_captured_and_does_not_wait(monkeypatch):
    monkeypatch.setattr(distill, "ELEMENTS", 5 * 64)
    model, teacher = models.llama_moe().cuda().train(), models.llama_moe(seed=5).cuda().bfloat16()
    run_pass = build_pass(model, teacher=Teacher(teacher, 0.5))
    ids = tokens(4).view(2, 2, T).cuda()
    autocast = torch.autocast("cuda", torch.bfloat16, cache_enabled=False)

    def update():
        model.zero_grad(set_to_none=False)
        return accumulate(run_pass, ids, autocast=autocast).values["distill_loss"]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = float(update())
        torch.cuda.set_sync_debug_mode("error")
        try:
            update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = update()
    graph.replay()
    assert float(captured) == pytest.approx(expected, rel=1e-2)
