"""Every shipped YAML file is a test case."""

import pytest

from moesaic.core.config import load, parse_yaml
from moesaic.recipes import recipes, summary
from moesaic.training.config import TrainConfig
from tests.helpers import assert_user_error, run_cli


@pytest.mark.parametrize("name", sorted(recipes("train")))
def test_a_training_recipe_parses_and_says_what_it_is_for(name):
    path = recipes("train")[name]
    config = load(TrainConfig, path)
    assert config.total_steps > 1
    assert len(summary(path)) > 30
    assert config.schedule.warmup < config.total_steps


def test_no_name_stands_twice():
    names = [name for kind in ("train", "init", "construct") for name in recipes(kind)]
    assert len(names) == len(set(names))


def test_the_released_recipe_is_the_released_one():
    config = load(TrainConfig, recipes("train")["cpt-llama-moe"])
    assert config.tokens_per_step == 14_680_064
    assert config.total_steps == 13_623


def test_list_show_copy(tmp_path):
    listed = run_cli("recipe", "list", "--json").json
    assert set(listed["train"]) == set(recipes("train"))
    assert set(listed["init"]) == set(recipes("init"))
    assert set(listed["construct"]) == set(recipes("construct"))
    assert run_cli("recipe", "list").exit_code == 0
    shown = run_cli("recipe", "show", "llama-4m")
    assert parse_yaml(shown.stdout, source="stdout")["model_type"] == "llama"
    copied = run_cli("recipe", "copy", "cpt-tiny", "-o", tmp_path)
    assert copied.stdout.strip() == str(tmp_path / "cpt-tiny.yaml")
    assert (tmp_path / "cpt-tiny.yaml").read_text() == recipes("train")["cpt-tiny"].read_text()
    assert_user_error(run_cli("recipe", "copy", "cpt-tiny", "-o", tmp_path), "exists")
    assert_user_error(run_cli("recipe", "show", "cpt-tin"), "did you mean 'cpt-tiny'")


def test_the_tiny_recipe_runs(tmp_path):
    from moesaic.data.tokenizer import train_tokenizer

    text = tmp_path / "words.txt"
    text.write_text("def f(x): return x\n" * 50)
    tokenizer = train_tokenizer(text, out=tmp_path / "tok", vocabulary=270)
    model = tmp_path / "model"
    made = run_cli("init", "llama-moe-tiny", "-o", model, "--tokenizer", tokenizer)
    assert made.exit_code == 0, made.stderr
    # Its own data would take a minute to tokenise; the recipe's other settings are run as they
    # stand.
    short = ["data.train", "data.valid"]
    options = [x for key in short for x in ("--set", f"{key}={text}")]
    options += ["--set", f"data.cache={tmp_path / 'cache'}", "--set", "tokens=4096"]
    result = run_cli(
        "train", "cpt-tiny", "-o", tmp_path / "run", "--model", model, "--json", *options
    )
    assert result.exit_code == 0, result.stderr
    assert result.json["tokens"] == 4096
