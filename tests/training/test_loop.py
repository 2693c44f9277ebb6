import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.core.errors import MoesaicError, UserError
from moesaic.training.loop import train
from moesaic.training.state import states
from moesaic.training.telemetry import read_log_lines
from tests.training import models


def log(path, event="train"):
    return [line for line in read_log_lines(path / "log.jsonl") if line["event"] == event]


def course(path):
    """What must not depend on interruptions: everything but times."""
    timed = ("seconds", "tokens_per_second", "mfu")
    return [
        {key: value for key, value in line.items() if key not in timed}
        for line in read_log_lines(path / "log.jsonl")
    ]


def weights(path):
    return load_file(path / "model.safetensors")


class Stop(Exception):
    pass


def stop_after(monkeypatch, updates):
    """Make the loop raise after so many updates, as a crash would."""
    from moesaic.training import loop

    original, done = loop.run_update, []

    def limited(*args, **kwargs):
        if len(done) == updates:
            raise Stop
        done.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "run_update", limited)


@pytest.mark.parametrize("build", [models.dense, models.llama_moe, models.mixtral])
def test_a_run_learns_and_leaves_a_model(build, settings, tmp_path):
    config = settings(build, steps=24)
    out = train(config, out=tmp_path / "run")
    losses = [line["loss"] for line in log(out)]
    assert losses[-1] < losses[0] - 0.5
    held_out = log(out, "evaluate")
    assert [line["step"] for line in held_out] == [0, 4, 8, 12, 16, 20, 24]
    assert held_out[-1]["loss"]["mean"] < held_out[0]["loss"]["mean"] - 0.5
    assert set(held_out[0]["loss"]) == {"mean", "sums", "tales"}

    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == build().__class__.__name__
    assert len(AutoTokenizer.from_pretrained(out)) == 300
    lineage = json.loads((out / "moesaic.json").read_text())
    assert lineage["parent"] == config["model"]
    assert lineage["tokens"] == 24 * 4 * 32
    assert lineage["held_out_loss"] == held_out[-1]["loss"]
    assert (out / "train.yaml").is_file()


def test_the_model_written_is_the_model_trained(settings, tmp_path):
    from moesaic.measure import held_out_loss

    config = settings(steps=5)
    out = train(config, out=tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    again = held_out_loss(
        model, AutoTokenizer.from_pretrained(out), config["data"]["valid"], context=32
    )
    assert again == pytest.approx(log(out, "evaluate")[-1]["loss"], abs=1e-5)


def test_log_lines_report_the_run(settings, tmp_path):
    out = train(settings(log={"every": 3, "peak_tflops": 0.001}, steps=8), out=tmp_path / "run")
    lines = log(out)
    assert [line["step"] for line in lines] == [3, 6, 8]
    line = lines[-1]
    assert line["tokens"] == 8 * 4 * 32
    assert line["weights"] == {"sums": 0.5, "tales": 0.5}
    assert line["load_cv"] >= 0
    assert line["load_max"] >= 1
    assert line["balance_loss"] > 0
    assert line["grad_norm"] > 0
    lineage = json.loads((out / "moesaic.json").read_text())
    active = lineage["active_parameters"]
    assert active < lineage["parameters"]
    expected = 6 * active * line["tokens_per_second"] / 1e9
    assert line["mfu"] == pytest.approx(expected, rel=0.01, abs=1e-4)
    # Blocks are counted as they are used, not as they are drawn ahead.
    read = sum(line["epochs"][n] * tokens(out, n) for n in ("sums", "tales"))
    assert read == pytest.approx(line["tokens"], rel=0.01)


def tokens(out, name):
    state = json.loads((list(states(out).values())[-1] / "state.json").read_text())
    drawn = state["drawn"][name]
    return drawn * 32 / log(out)[-1]["epochs"][name]


# Before the first state; between states and between log lines; after the last but one.
@pytest.mark.parametrize(("stop", "log_every"), [(2, 1), (7, 4), (11, 1)])
def test_resuming_repeats_the_uninterrupted_run_bit_for_bit(
    stop, log_every, settings, tmp_path, monkeypatch
):
    config = settings(log={"every": log_every})
    straight = train(config, out=tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(Stop):
            train(config, out=tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    torch.manual_seed(999)  # whatever the process drew in between
    resumed = train(config, out=tmp_path / "run")
    assert course(resumed) == course(straight)
    a, b = weights(straight), weights(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resuming_under_dynamic_weights_is_bit_equal_and_weights_move(
    settings, tmp_path, monkeypatch
):
    dynamic = {"rule": "sheared_llama", "reference": {"sums": 1.0, "tales": 5.0}}
    config = settings(data={"dynamic": dynamic}, evaluate={"every": 2})
    straight = train(config, out=tmp_path / "straight")
    shares = [line["weights"]["sums"] for line in log(straight)]
    assert shares[0] == shares[1] == 0.5
    assert shares[2] > 0.9, "after the evaluation at update 2 the lagging domain gains"
    drawn = json.loads((list(states(straight).values())[-1] / "state.json").read_text())["drawn"]
    assert drawn["sums"] > 3 * drawn.get("tales", 0)
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stop):
            train(config, out=tmp_path / "run")
    assert course(train(config, out=tmp_path / "run")) == course(straight)


def test_accumulation_and_batch_give_the_same_course(settings, tmp_path):
    def losses(micro):
        config = settings(
            models.dense, batch={"sequences": 4, "micro": micro}, evaluate={"every": None}
        )
        return [line["loss"] for line in log(train(config, out=tmp_path / str(micro)))]

    assert losses(4) == pytest.approx(losses(1), rel=1e-4)


def test_states_beyond_keep_last_are_deleted_and_a_finished_run_is_left_alone(settings, tmp_path):
    config = settings()
    out = train(config, out=tmp_path / "run")
    assert list(states(out)) == [9, 12]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert train(config, out=out) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

    config = settings(checkpoint={"every": None, "keep_last": 0})
    out = train(config, out=tmp_path / "none")
    assert not states(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    train(config, out=out)
    with pytest.raises(UserError, match="other settings"):
        train({**config, "steps": 3}, out=out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_no_resume_starts_again(settings, tmp_path):
    config = settings(steps=4)
    out = train(config, out=tmp_path / "run")
    first = course(out)
    with pytest.raises(UserError, match=r"seed=0, now it is 1.*--no-resume"):
        train({**config, "seed": 1}, out=out)
    train({**config, "seed": 1}, out=out, resume=False)
    second = course(out)
    assert len(second) == len(first)
    assert second[-1] != first[-1]


def test_what_does_not_change_the_course_may_change_on_resume(settings, tmp_path, monkeypatch):
    config = settings()
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stop):
            train(config, out=tmp_path / "run")
    config["checkpoint"] = {"every": 5, "keep_last": 1}
    assert list(states(train(config, out=tmp_path / "run"))) == [12]


def test_only_safetensors_json_and_text_are_written(settings, tmp_path):
    out = train(settings(steps=4), out=tmp_path / "run")
    suffixes = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".yaml"}


def test_a_diverging_run_stops_at_the_update_and_keeps_its_states(settings, tmp_path):
    config = settings(optimizer={"lr": 1e9, "clip": None}, schedule={"warmup": 8})
    with pytest.raises(MoesaicError, match=r"became (nan|inf) at update") as caught:
        train(config, out=tmp_path / "run")
    assert "optimizer.lr" in str(caught.value)
    assert not (tmp_path / "run" / "config.json").exists()
    for folder in states(tmp_path / "run").values():
        for tensor in load_file(folder / "model.safetensors").values():
            assert torch.isfinite(tensor).all()


def test_a_full_disk_leaves_the_last_state_whole(settings, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from moesaic.training import state

    config, original, calls = settings(), state.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 5:  # the second state's optimizer
            path.write_bytes(b"part")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        original(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", full)
        with pytest.raises(MoesaicError, match=r"no space left.*update 3 is whole") as caught:
            train(config, out=tmp_path / "run")
    assert caught.value.exit_code == 1
    assert list(states(tmp_path / "run")) == [3]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    straight = train(config, out=tmp_path / "straight")
    assert course(train(config, out=tmp_path / "run")) == course(straight)


def test_a_damaged_state_is_named(settings, tmp_path, monkeypatch):
    config = settings()
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stop):
            train(config, out=tmp_path / "run")
    file = states(tmp_path / "run")[6] / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=r"optimizer.safetensors is missing or damaged"):
        train(config, out=tmp_path / "run")


def test_the_callers_generators_are_given_back(settings, tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    train(settings(steps=2), out=tmp_path / "run")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"train": "nowhere/at-all.jsonl"}}, "nowhere"),
        ({"data": {"block_size": 128}}, "at most 64 positions"),
        ({"data": {"weights": {"sums": 1.0}}}, "no value for the domain 'tales'"),
        ({"data": {"weights": "sheared"}}, "not 'sums'"),
        ({"device": "cuda:7"}, "cuda"),
        ({"batch": {"micro": 3}}, "does not divide"),
        ({"steps": None}, "exactly one of 'tokens' and 'steps'"),
        ({"tokens": 64, "steps": None}, "less than one update"),
        ({"model": "no/such/dir"}, "no/such/dir"),
        ({"data": {"dynamic": {"reference": {"sums": 1.0}}}}, "'tales'"),
        (
            {"data": {"dynamic": {"rule": "sheared_llama_paper", "reference": {}, "rate": 2}}},
            "no effect",
        ),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(changes, words, settings, tmp_path):
    with pytest.raises(UserError, match=r"(?i)" + words):
        train(settings(**changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_refused_restart_costs_nothing(settings, tmp_path):
    out = train(settings(steps=3), out=tmp_path / "run")
    before = sorted(path for path in out.rglob("*"))
    with pytest.raises(UserError, match="nowhere"):
        train(settings(data={"train": "nowhere/x.jsonl"}), out=out, resume=False)
    assert sorted(path for path in out.rglob("*")) == before


def test_damaged_weights_and_foreign_tokenizers_are_refused(settings, checkpoint, tmp_path):
    import shutil

    from safetensors.torch import save_file

    broken = shutil.copytree(checkpoint(models.dense), tmp_path / "nan")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN"):
        train(settings(model=str(broken)), out=tmp_path / "run")

    models.dense(vocab_size=100).save_pretrained(tmp_path / "small")
    config = settings(model=str(tmp_path / "small"), tokenizer=str(checkpoint(models.dense)))
    with pytest.raises(UserError, match="300 tokens but the model's vocabulary has 100"):
        train(config, out=tmp_path / "run")
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        train(settings(model=str(broken)), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_coefficient_on_a_dense_model_is_refused(settings, tmp_path):
    with pytest.raises(UserError, match="has no effect"):
        train(settings(models.dense, balance={"coefficient": 0.1}), out=tmp_path / "run")


def test_a_folder_of_something_else_is_not_touched(settings, tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(UserError, match="no training run"):
        train(settings(), out=tmp_path, resume=False)
    assert (tmp_path / "precious.txt").read_text() == "x"


def test_master_weights_run_resumes_too(settings, tmp_path, monkeypatch):
    config = settings(precision="bf16", save_dtype="bfloat16", steps=9)
    straight = train(config, out=tmp_path / "straight")
    assert math.isfinite(log(straight)[-1]["loss"])
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stop):
            train(config, out=tmp_path / "run")
    assert course(train(config, out=tmp_path / "run")) == course(straight)
    assert {t.dtype for t in weights(straight).values()} == {torch.bfloat16}


def test_the_public_functions(settings, tmp_path):
    import moesaic

    assert moesaic.train is train
    assert moesaic.train(settings(steps=2), out=tmp_path / "a") == tmp_path / "a"
    assert moesaic.init("llama-4m", out=tmp_path / "m") == tmp_path / "m"


def test_checkpointed_activations_give_the_same_run(settings, tmp_path):
    plain = train(settings(steps=4), out=tmp_path / "plain")
    saving = train(settings(steps=4, gradient_checkpointing=True), out=tmp_path / "saving")
    a, b = ([line["loss"] for line in log(path)] for path in (plain, saving))
    assert b == pytest.approx(a, rel=1e-5)
