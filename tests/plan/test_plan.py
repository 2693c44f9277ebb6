"""Plans: counted sizes equal what is really made, times follow from the rates, errors help."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from moesaic.construct.convert import convert
from moesaic.construct.refits.down import ENOUGH
from moesaic.core.config import read_yaml
from moesaic.models.anatomy import anatomy
from moesaic.models.checkpoint import Checkpoint
from moesaic.plan import machine as machines
from moesaic.plan.machine import Machine, data_sheet, measure
from moesaic.plan.predict import plan
from moesaic.recipes import find, recipes
from moesaic.training import setup
from moesaic.training.distill import load_teacher
from moesaic.training.loop import read_config
from moesaic.training.step import build_pass
from tests.construct.dense_family_models import FAMILIES as DENSE_FAMILIES
from tests.construct.dense_family_models import write_family
from tests.construct.dense_models import write_dense
from tests.helpers import assert_user_error, run_cli

MACHINE = Machine(
    name="round numbers",
    source="test",
    float32=1e11,
    model=1e12,
    double=1e10,
    memory_rate=1e10,
    disk_rate=1e9,
    memory=10**11,
)
# Released: LLaMA-MoE 3.5B (4/16), 3.0B (2/16), 3.5B (2/8); v2 3.8B, whose authors count so too.
ACTIVE = {
    "llama-2-7b-4of16": 3.5,
    "llama-2-7b-2of16": 3.0,
    "llama-2-7b-2of8": 3.5,
    "llama-3-8b-2of8": 3.8,
    "llama-3-8b-1plus1of7": 3.8,
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("plan") / "dense")


@pytest.mark.parametrize("name", sorted(ACTIVE))
def test_shipped_constructions_have_the_released_sizes(name: str) -> None:
    found = plan(name, machine=MACHINE)
    shape = {"llama-2": 6_738_415_616, "llama-3": 8_030_261_248}[name[:7]]
    routers = found.parts["routers"]
    assert round(found.active / 1e9, 1) == ACTIVE[name]
    # what the mixture adds to the dense model: routers, and a gate of the one shared expert
    shared_gates = 32 * 4096 if "plus" in name else 0
    assert found.parameters == shape + routers + shared_gates
    assert sum(found.parts.values()) == found.parameters
    assert found.peak == {use: sum(parts.values()) for use, parts in found.memory.items()}
    assert found.memory["run, 1 x 4096 tokens"]["weights"] == 2 * found.parameters


@pytest.mark.parametrize("name", sorted(recipes("construct")))
def test_every_shipped_construction_can_be_planned(name: str) -> None:
    found = plan(name, machine=MACHINE, model=None if name in ACTIVE else "llama-2-7b")
    assert found.kind == "construct"
    assert sum(found.seconds["construct"].values()) > 0


@pytest.mark.parametrize("name", sorted(ACTIVE))
def test_one_gpu_is_foretold_to_make_them_in_ten_minutes(name: str) -> None:
    found = plan(name, machine=data_sheet("h200", disk_rate=1e9))
    assert sum(found.seconds["construct"].values()) < 600
    host = found.peak.pop("construct, host")
    assert host < 24e9
    assert max(v for use, v in found.peak.items() if use.startswith("construct")) < 80e9
    # the refit has what it asks for, so that it does not warn
    width = 11008 if "llama-2" in name else 14336
    assert read_yaml(find(name, kind="construct"))["tokens"] == ENOUGH * width
    assert "predicted" in " ".join(found.notes)


def test_refining_and_the_attention_cost_more() -> None:
    name = "llama-2-7b-2of8"
    keys = ["refine={method: layerwise, passes: 3}", "attention=1.0"]
    plain = plan(name, machine=MACHINE, overrides=["attention=null"])
    more = plan(name, machine=MACHINE, overrides=keys)
    added = more.seconds["construct"].keys() - plain.seconds["construct"].keys()
    assert added == {"refine", "attention refit"}
    twice = [*keys[1:], "refine={method: layerwise, passes: 6}"]
    longer = plan(name, machine=MACHINE, overrides=twice).seconds["construct"]
    assert longer["refine"] == pytest.approx(2 * more.seconds["construct"]["refine"])


def test_experts_per_layer_cost_streams_and_time() -> None:
    name = "llama-2-7b-2of8"
    plain = plan(name, machine=MACHINE)
    more = plan(name, machine=MACHINE, overrides=["experts_per_layer=allotted"])
    seconds = more.seconds["construct"]
    assert seconds.keys() - plain.seconds["construct"].keys() == {"experts per layer"}
    # seven numbers in 32 layers, 2,048 tokens through half the model each
    assert seconds["experts per layer"] > 7 * 32 * 2048 * 6.5e9 / MACHINE.float32
    (held,) = (parts for use, parts in more.memory.items() if "experts per layer" in use)
    assert held["streams of changed models"] == 32 * 7 * 2048 * 4096 * 4
    assert more.active == plain.active


@pytest.mark.parametrize("shared", [0, 2])
def test_a_plan_counts_what_the_conversion_makes(dense: Path, tmp_path: Path, shared: int) -> None:
    made = convert(dense, out=tmp_path / "moe", experts=6, top_k=3, shared=shared, gate="linear")
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {dense}\nexperts: 6\ntop_k: 3\nshared: {shared}\n")
    found, real = plan(file, machine=MACHINE), anatomy(made)
    assert (found.parameters, found.active) == (real.params_total, real.params_active)
    model = plan(made, machine=MACHINE, batch=3, context=20)
    assert model.parameters == Checkpoint(made).parameters
    memory = model.memory["run, 3 x 20 tokens"]
    assert memory["weights"] == 4 * Checkpoint(made).parameters  # the files are float32
    from moesaic.models.load import load

    with torch.inference_mode():
        cache = load(made)(input_ids=torch.ones(3, 20, dtype=torch.long)).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory["key-value cache"] == kept


@pytest.mark.parametrize("kind", DENSE_FAMILIES)
def test_every_dense_family_can_be_planned(kind: str, tmp_path: Path) -> None:
    dense = write_family(tmp_path / "dense", kind)
    made = convert(dense, out=tmp_path / "moe", experts=4, top_k=3, shared=1, gate="linear")
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {dense}\nexperts: 4\ntop_k: 3\nshared: 1\n")
    found, real = plan(file, machine=MACHINE), anatomy(made)
    assert (found.parameters, found.active) == (real.params_total, real.params_active)
    assert found.seconds["construct"]["run the text"] > 0


def test_parts_are_what_they_are_called(dense: Path) -> None:
    parts = plan(dense, machine=MACHINE).parts
    assert parts == {
        "embeddings": 2 * 61 * 32,
        "attention": 2 * (2 * 32 * 32 + 2 * 32 * 16),
        "dense FFN": 2 * 3 * 32 * 48,
        "other": 5 * 32,
    }


def test_times_follow_from_the_rates() -> None:
    name = "llama-2-7b-2of8"
    plain = plan(name, machine=MACHINE).seconds["construct"]
    rates = ("float32", "double", "memory_rate", "disk_rate")
    fast = dataclasses.replace(MACHINE, **{rate: 4 * getattr(MACHINE, rate) for rate in rates})
    quick = plan(name, machine=fast).seconds["construct"]
    assert quick["split"] < plain.pop("split")  # neurons are assigned on the host, at its own rate
    for stage, seconds in plain.items():
        assert quick[stage] == pytest.approx(seconds / 4)
    more = plan(name, machine=MACHINE, overrides=["tokens=352256"]).seconds["construct"]
    assert 1.9 < more["run the text"] / plain["run the text"] < 2.1
    # factors of 11008 neurons for 12 strengths, whatever the tokens: n^3 / 3 operations a layer
    assert plain["refit"] > 32 * 12 * 11008**3 / 3 / MACHINE.double
    without = plan(name, machine=MACHINE, overrides=["refit=null"])
    assert "refit" not in without.seconds["construct"]
    assert "construct, refit" not in without.memory
    free = plan(name, machine=MACHINE, overrides=["split=random", "router=random"])
    assert not {"split", "router"} & free.seconds["construct"].keys()


def test_a_split_is_counted_by_its_own_settings(dense: Path) -> None:
    name = "llama-3-8b-2of8"

    def split(machine: Machine = MACHINE, **settings: Any) -> float:
        keys = [f"{key}: {value}" for key, value in {"method": "energy", **settings}.items()]
        found = plan(name, machine=machine, overrides=[f"split={{{', '.join(keys)}}}"])
        return found.seconds["construct"]["split"]

    usual = split()
    assert usual == pytest.approx(plan(name, machine=MACHINE).seconds["construct"]["split"])
    # on a machine without other costs, assignments alone: ten rounds after two k-means of 20
    endless = dataclasses.replace(
        MACHINE, float32=1e30, double=1e30, memory_rate=1e30, disk_rate=1e30
    )
    assert split(endless, rounds=20, starts=6) == pytest.approx(split(endless) * 140 / 50)
    assert split(endless, rounds=0, starts=1) == pytest.approx(split(endless) * 20 / 50)
    assert split(tokens=32_768) < 0.7 * usual
    assert 0.5 * usual < split(rounds=5) < usual
    # every round reads the energies twice and fits a router anew
    more, less = split(rounds=12), split(rounds=10)
    assert more - less > 32 * 2 * 2 * 65_536 * 14_336 * 4 / MACHINE.memory_rate
    own = plan(name, machine=MACHINE, overrides=["split=gradient-plus", "router=hidden-clusters"])
    assert "split does on text" in " ".join(own.notes)
    assert "on text" not in " ".join(plan(name, machine=MACHINE).notes)


def test_a_training_run_is_counted_from_its_recipe(dense: Path) -> None:
    moe = "llama-moe-tiny"
    found = plan("cpt-llama-moe", machine=MACHINE, model=moe)
    operations = 8 * found.active * 13_623 * 14_680_064  # activations are recomputed
    assert found.seconds["train, 13,623 steps"]["forward and backward"] == pytest.approx(
        operations / MACHINE.model
    )
    memory = found.memory["train, 8 x 4096 tokens at a time"]
    weights = sum(memory[part] for part in ("weights", "gradients", "optimizer"))
    assert weights == 16 * found.parameters
    small = plan("cpt-llama-moe", machine=MACHINE, model=moe, overrides=["batch.micro=4"]).memory[
        "train, 4 x 4096 tokens at a time"
    ]
    assert small["activations"] * 2 == memory["activations"]


@pytest.mark.parametrize(("precision", "rate"), [("fp32", 1e11), ("mixed", 1e12), ("bf16", 1e12)])
def test_a_teacher_takes_what_is_foretold(
    dense: Path, tmp_path: Path, precision: Literal["fp32", "mixed", "bf16"], rate: float
) -> None:
    moe = convert(dense, out=tmp_path / "moe", experts=6, top_k=3, gate="linear")
    keys = {"data": {"train": "text", "block_size": 16}, "batch": {"sequences": 4, "micro": 2}}
    taught = {**keys, "steps": 5, "precision": precision, "distill": {"model": str(moe)}}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({**taught, "model": str(dense)}))
    found = plan(file, machine=MACHINE)
    alone = plan(file, machine=MACHINE, overrides=["distill=null"])
    (memory,), (without,) = found.memory.values(), alone.memory.values()
    (seconds,), (base,) = found.seconds.values(), alone.seconds.values()
    used = 2 * anatomy(moe).params_active * 5 * 4 * 16 / rate
    assert seconds == base | {"teacher's forward": pytest.approx(used)}

    config, cpu = read_config({**taught, "model": str(dense)}), torch.device("cpu")
    student = setup.load_model(config, cpu, precision)
    teacher = load_teacher(config, student, None, cpu, precision)  # type: ignore[arg-type]
    assert teacher is not None
    logits: list[torch.Tensor] = []
    teacher.model.register_forward_hook(lambda *args: logits.append(args[-1].logits))
    kept: dict[bool, int] = {}
    for asked in (False, True):
        sizes: list[int] = []
        run_pass = build_pass(student, teacher=teacher if asked else None)
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.nbytes), x)[1], lambda x: x
        )
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
            run_pass(torch.arange(32).view(2, 16))
        kept[asked] = sum(sizes)
    temporary = 3 * 4 * logits[0].numel()  # fewer than the limit
    assert memory == without | {
        "teacher's weights": sum(p.nbytes for p in teacher.model.parameters()),
        "teacher's logits and divergence": logits[0].nbytes + kept[True] - kept[False] + temporary,
    }
    large = plan(file, machine=MACHINE, overrides=["batch.micro=1", "data.block_size=1048576"])
    (huge,) = large.memory.values()
    whole = 2 * 2**20 * 61 * logits[0].itemsize
    assert huge["teacher's logits and divergence"] == whole + 3 * 2**26


def test_a_graphics_card_by_its_data_sheet() -> None:
    card = data_sheet("h200", disk_rate=1e9)
    assert card.model == pytest.approx(0.7 * 989e12)
    assert "not measured" in card.source


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure()
    rates = dataclasses.astuple(found)[2:-1]
    assert all(rate > 1e6 for rate in rates)
    assert found.source == "measured"
    monkeypatch.setattr(machines, "measure", lambda: MACHINE)
    shown = run_cli("plan", "llama-2-7b-4of16")
    assert shown.exit_code == 0, shown.stderr
    assert "parameters   6,742,609,920" in shown.stdout
    assert "round numbers; test" in shown.stdout
    data = run_cli("plan", "llama-2-7b-4of16", "--gpu", "a100", "--json").json
    assert data["machine"]["name"] == "a100"
    assert data["kind"] == "construct"


def test_bad_names_and_files(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "measure", lambda: MACHINE)

    def bad(*arguments: Any, words: tuple[str, ...]) -> None:
        assert_user_error(run_cli("plan", *arguments), *words)

    def recipe(text: str) -> Path:
        file = tmp_path / "file.yaml"
        file.write_text(text)
        return file

    bad("llama-2-7b-4of1", words=("did you mean 'llama-2-7b-4of16'",))
    bad(recipe("a: 1\n"), words=("model_type", "experts", "data"))
    bad(recipe("experts: 8\ntop_k: 2\n"), words=("names no model",))
    bad(recipe(f"model: {dense}\nexperts: 7\ntop_k: 2\n"), words=("48 neurons",))
    bad(recipe(f"model: {dense}\nexperts: 4\ntop_k: 5\n"), words=("top_k=5",))
    bad(recipe(f"model: {dense}\nexperts: 4\ntop_k: 2\nsplt: x\n"), words=("splt", "split"))
    bad(recipe(f"model: {dense}\nexperts: 4\ntop_k: 2\nsplit: enrgy\n"), words=("energy",))
    bad("llama-2-7b-2of8", "--set", "refine=all", words=("layerwise",))
    bad("llama-2-7b-2of8", "--model", "qwen2-moe-1b", words=("qwen2_moe",))
    bad(dense, "--set", "tokens=5", words=("--set",))
    bad("llama-2-7b-2of8", "--gpu", "h20", words=("h200",))
    bad("cpt-llama-moe", words=("names no model",))
