import json

import pytest

from moesaic.core.config import to_yaml
from moesaic.training.loop import read_config
from tests.helpers import assert_user_error, run_cli
from tests.training import models


@pytest.fixture
def recipe(settings, tmp_path):
    def write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(to_yaml(settings(**changes)))
        return path

    return write


def test_train_prints_the_path_last_and_json_alone(recipe, tmp_path):
    path = recipe(steps=2)
    shown = run_cli("train", path, "-o", tmp_path / "run")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == str(tmp_path / "run")
    assert "tales" in shown.stdout
    again = run_cli("train", path, "-o", tmp_path / "run", "--json")
    assert again.json["updates"] == 2
    assert set(again.json["held_out_loss"]) == {"mean", "sums", "tales"}


def test_set_and_model_win_over_the_file(recipe, checkpoint, tmp_path):
    dense = checkpoint(models.dense)
    options = ["--set", "steps=3", "--set", "optimizer.lr=1e-4", "--model", dense]
    result = run_cli("train", recipe(), "-o", tmp_path / "run", "--json", *options)
    assert result.exit_code == 0, result.stderr
    lineage = json.loads((tmp_path / "run" / "moesaic.json").read_text())
    assert lineage["config"]["optimizer"]["lr"] == 1e-4
    assert lineage["parent"] == str(dense)
    assert result.json["updates"] == 3


@pytest.mark.parametrize(
    "setting",
    [
        "optimizer.lr=.inf",
        "optimizer.betas=[0.9,1.5]",
        f"seed={2**70}",
        "data.weights=evn",
        "data.weights={tales: -1}",
    ],
)
def test_values_out_of_range_name_their_key(recipe, tmp_path, setting):
    key = setting.partition("=")[0].rpartition(".")[2]
    result = run_cli("train", recipe(), "-o", tmp_path / "run", "--set", setting)
    assert_user_error(result, key)
    assert "literal[" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_shipped_recipes_and_paths_are_taken_from_python(settings, tmp_path):
    assert read_config("recipes/cpt-tiny.yaml", model="m") == read_config("cpt-tiny", model="m")
    given = settings()
    data = {**given["data"], "train": {"a": tmp_path / "a.txt", "b": [tmp_path / "b.txt"]}}
    read = read_config({**given, "data": data})
    assert read.data.train == {"a": str(tmp_path / "a.txt"), "b": [str(tmp_path / "b.txt")]}


def test_dry_run_tells_the_plan_and_writes_nothing(recipe, tmp_path):
    result = run_cli("train", recipe(), "-o", tmp_path / "run", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    plan = result.json
    assert plan["updates"] == 12
    assert plan["tokens"] == 12 * 4 * 32
    assert plan["parameters"] > plan["active_parameters"] > 0
    total = sum(d["epochs"] * d["tokens"] for d in plan["domains"].values())
    assert total == pytest.approx(plan["tokens"], rel=0.01)
    assert not (tmp_path / "run").exists()
    assert run_cli("train", recipe(), "-o", tmp_path / "run", "--dry-run").exit_code == 0


def test_wrong_yaml_is_one_line_with_the_cure(recipe, tmp_path):
    path = recipe()
    out = tmp_path / "run"
    assert_user_error(
        run_cli("train", path, "-o", out, "--set", "optimizer.learning_rate=1"), "learning_rate"
    )
    assert_user_error(
        run_cli("train", path, "-o", out, "--set", "shedule.warmup=1"),
        "unknown key 'shedule'",
        "did you mean 'schedule'",
    )
    assert_user_error(
        run_cli("train", path, "-o", out, "--set", "data.blocksize=1"), "did you mean 'block_size'"
    )
    assert_user_error(run_cli("train", "cpt-tinny", "-o", out), "did you mean 'cpt-tiny'")
    assert_user_error(run_cli("train", tmp_path / "no.yaml", "-o", out), "no.yaml", "no such file")
    assert_user_error(run_cli("train", "cpt-tiny", "-o", out), "no model to train", "--model")
    assert not out.exists()


def test_bad_data_is_named_with_file_and_line(recipe, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 3}\n')
    result = run_cli("train", recipe(), "-o", tmp_path / "run", "--set", f"data.train={bad}")
    assert_user_error(result, "bad.jsonl:2")
    assert not (tmp_path / "run" / "config.json").exists()


def test_tensorboard_gets_the_numbers(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = recipe(steps=4, log={"tensorboard": True, "every": 2}, checkpoint={"every": None})
    assert run_cli("train", path, "-o", tmp_path / "run").exit_code == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]
    assert [event.step for event in events.Scalars("evaluate/loss/tales")] == [0, 4]
    assert {"train/load_cv", "train/weights/sums", "train/lr"} <= set(events.Tags()["scalars"])
