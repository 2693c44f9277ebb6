from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from moesaic.core import config as cfg
from moesaic.core.config import Config
from moesaic.core.errors import UserError


class Schedule(Config):
    warmup: int = 10
    """Steps of warm-up."""
    kind: Literal["cosine", "constant"] = "cosine"


class Run(Config):
    model: str
    learning_rate: float = 1e-3
    schedule: Schedule = Schedule()
    weights: dict[str, float] = Field(default={})
    data: Literal["a", "b"] | dict[str, str] = "a"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_floats_without_a_dot_are_numbers(tmp_path):
    run = cfg.load(
        Run, write(tmp_path, "model: m\nlearning_rate: 1e-5\nweights: {on: 2, no: .5}\n")
    )
    assert run.learning_rate == 1e-5
    assert run.weights == {"on": 2.0, "no": 0.5}


def test_round_trip(tmp_path):
    run = Run(model="m", schedule=Schedule(warmup=3), weights={"a": 0.25})
    assert cfg.load(Run, write(tmp_path, cfg.to_yaml(run))) == run


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: m\nlearning_rat: 1\n", ["unknown key 'learning_rat'", "'learning_rate'"]),
        ("model: m\nschedule: {warmpu: 1}\n", ["schedule.warmpu", "'warmup'"]),
        ("learning_rate: 1\n", ["'model' is required"]),
        ("model: m\nlearning_rate: fast\n", ["learning_rate", "'fast'"]),
        ("model: m\nschedule: {kind: linear}\n", ["schedule.kind", "'cosine' or 'constant'"]),
        ("model: m\ndata: c\n", ["'data' is 'c'"]),
        ("model: m\ndata: {x: 5}\n", ["'data' is {'x': 5}"]),
        ("model: [\n", ["not valid YAML", "run.yaml:2"]),
        ("- a\n- b\n", ["not a mapping"]),
        ("model: m\nmodel: n\n", ["given twice", "line 2"]),
    ],
)
def test_bad_input_is_one_line_with_the_cure(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        cfg.load(Run, write(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_missing_file_names_a_sibling(tmp_path):
    write(tmp_path, "model: m\n")
    with pytest.raises(UserError, match=r"Did you mean 'run.yaml'"):
        cfg.load(Run, tmp_path / "rnu.yaml")


def test_overrides_reach_nested_keys(tmp_path):
    path = write(tmp_path, "model: m\n")
    run = cfg.load(Run, path, overrides=["schedule.warmup=7", "learning_rate=2e-4", "weights.a=1"])
    assert (run.schedule.warmup, run.learning_rate, run.weights) == (7, 2e-4, {"a": 1.0})
    with pytest.raises(UserError, match="'model' is a value, not a section"):
        cfg.load(Run, path, overrides=["model.x=1"])
    with pytest.raises(UserError, match="write key=value"):
        cfg.load(Run, path, overrides=["learning_rate"])
