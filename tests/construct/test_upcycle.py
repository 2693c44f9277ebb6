"""Upcycling: what equals the dense model does, what differs says so, routers tell texts apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.construct.upcycle import upcycle
from moesaic.core.errors import MoesaicError, UserError
from moesaic.core.lineage import read_lineage
from moesaic.models.checkpoint import Checkpoint
from tests.construct.dense_family_models import FAMILIES, write_family
from tests.construct.dense_models import write_dense, write_text_tokenizer
from tests.helpers import assert_user_error, run_cli


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense") / "model", tie_word_embeddings=True)


def load(path: Path, **config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    import moesaic.models  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **config).eval()


def logits(path: Path, **config: Any) -> torch.Tensor:
    ids = torch.arange(1, 61).view(2, 30)
    with torch.inference_mode():
        return load(path, **config)(input_ids=ids).logits


EXACT: dict[str, dict[str, Any]] = {
    "copies": {"method": "copies", "experts": 4, "top_k": 2},
    "copies, top 1": {"method": "copies", "experts": 3, "top_k": 1},
    "two shared": {"method": "copies", "experts": 5, "shared": 2, "top_k": 3},
    "groups": {"method": {"method": "virtual-groups", "granularity": 2}, "experts": 6, "top_k": 2},
    "two groups": {
        "method": {"method": "virtual-groups", "granularity": 3},
        "experts": 9,
        "top_k": 6,
    },
    "groups, one shared": {
        "method": {"method": "virtual-groups", "granularity": 4},
        "experts": 9,
        "shared": 1,
        "top_k": 5,
    },
}


@pytest.mark.parametrize("layout", ["llama_moe", "mixtral"])
@pytest.mark.parametrize("case", EXACT)
def test_copies_and_virtual_groups_equal_the_dense_model(
    dense: Path, tmp_path: Path, case: str, layout: str
) -> None:
    wanted = EXACT[case]
    if layout == "mixtral" and "shared" in wanted:
        with pytest.raises(UserError, match="no shared experts"):
            upcycle(dense, out=tmp_path / "moe", layout=layout, **wanted)
        return
    path = upcycle(dense, out=tmp_path / "moe", layout=layout, seed=3, **wanted)
    torch.testing.assert_close(logits(path), logits(dense), atol=1e-4, rtol=0)
    record = read_lineage(path)
    assert record["exact"] is True
    assert record["difference"] < 1e-4
    layers = upcycle(dense, out=tmp_path / "l", layout=layout, seed=3, verify="layers", **wanted)
    assert read_lineage(layers)["exact"] is True
    model = load(path)
    assert sum(p.numel() for p in model.parameters()) == record["parameters_total"]
    if not wanted.get("shared"):
        assert type(model).__name__.startswith("LlamaMoE" if layout == "llama_moe" else "Mixtral")


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "llama"])
@pytest.mark.parametrize("case", ["copies", "two shared", "groups, one shared"])
def test_every_dense_family_is_upcycled_with_its_own_layers(
    kind: str, case: str, tmp_path: Path
) -> None:
    dense = write_family(tmp_path / "dense", kind)
    path = upcycle(dense, out=tmp_path / "moe", seed=3, **EXACT[case])
    assert Checkpoint(path).config["model_type"] == "moesaic_moe"
    torch.testing.assert_close(logits(path), logits(dense), atol=1e-4, rtol=0)
    record = read_lineage(path)
    assert record is not None
    assert (record["exact"], record["difference_of"]) == (True, "logits")
    model = load(path)
    assert sum(p.numel() for p in model.parameters()) == record["parameters_total"]
    # the routed experts are copies that routers choose among: other weights, another model
    model.model.layers[0].mlp.experts.down_proj.data[0] += 1
    ids = torch.arange(1, 61).view(2, 30)
    with torch.inference_mode():
        assert float((model(input_ids=ids).logits - logits(dense)).abs().max()) > 1e-3
    by_layer = upcycle(dense, out=tmp_path / "l", seed=3, verify="layers", **EXACT[case])
    assert read_lineage(by_layer)["exact"] is True
    with pytest.raises(UserError, match="Use the layout moesaic_moe"):
        upcycle(dense, out=tmp_path / "x", layout="llama_moe", **EXACT[case])


@pytest.mark.parametrize("kind", ["gemma2", "qwen3", "olmo2"])
def test_other_families_are_joined_on_the_stream_they_really_have(
    kind: str, tmp_path: Path
) -> None:
    """Routers are fitted on the joined model's own inputs: transformers' hooks see the same."""
    models, texts = [], []
    for number, words in enumerate((["red", "green"], ["one", "two"])):
        models.append(write_family(tmp_path / f"dense{number}", kind, seed=number))
        write_text_tokenizer(models[-1])
        texts.append(tmp_path / f"{number}.jsonl")
        lines = (json.dumps({"text": " ".join(words * 40)}) for _ in range(20))
        texts[-1].write_text("\n".join(lines) + "\n")
    method = {"method": "join", "tokens": 512, "context": 32}
    path = upcycle(models, out=tmp_path / "moe", method=method, data=texts, top_k=1)
    record = read_lineage(path)
    assert record is not None
    from moesaic.models.tokenizer import load_tokenizer

    tokenizer, model = load_tokenizer(models[0]), load(path)
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, given, out: chosen.append(out.ids))
    for number, text in enumerate(texts):
        chosen.clear()
        line = json.loads(text.read_text().splitlines()[0])["text"]
        ids = tokenizer(line, return_tensors="pt")["input_ids"][:, :32]
        with torch.inference_mode():
            model(input_ids=ids)
        shares = [float((layer == number).float().mean()) for layer in chosen]
        assert shares == pytest.approx(record["own_text_first"], abs=0.2)


@pytest.mark.parametrize("top_k", [2, 4, 6])
def test_virtual_groups_hold_for_every_number_of_whole_copies(
    dense: Path, tmp_path: Path, top_k: int
) -> None:
    method = {"method": "virtual-groups", "granularity": 2}
    for layout in ("llama_moe", "mixtral"):
        path = upcycle(
            dense, out=tmp_path / layout, method=method, experts=6, top_k=top_k, layout=layout
        )
        torch.testing.assert_close(logits(path), logits(dense), atol=1e-4, rtol=0)


def test_a_cut_group_and_megatrons_scaling_state_their_difference(
    dense: Path, tmp_path: Path
) -> None:
    cases = [({"granularity": 2}, 3), ({"granularity": 2, "scaling": "megatron"}, 2)]
    for number, (settings, top_k) in enumerate(cases):
        method = {"method": "virtual-groups", **settings}
        path = upcycle(dense, out=tmp_path / str(number), method=method, experts=4, top_k=top_k)
        record = read_lineage(path)
        assert record["exact"] is False
        apart = float((logits(path) - logits(dense)).abs().max())
        assert apart > 1e-3
        assert record["difference"] > 1e-3


def expert(path: Path, layer: int, number: int) -> list[torch.Tensor]:
    checkpoint = Checkpoint(path)
    start = f"model.layers.{layer}.mlp.calculator.experts.weight_"
    return [checkpoint.read(f"{start}{part}.{number}") for part in ("gate", "up", "down")]


def dense_layer(path: Path, layer: int) -> list[torch.Tensor]:
    checkpoint = Checkpoint(path)
    start = f"model.layers.{layer}.mlp."
    return [checkpoint.read(f"{start}{part}_proj.weight") for part in ("gate", "up", "down")]


def test_drop_upcycling_renews_whole_neurons_with_the_old_mean_and_spread(tmp_path: Path) -> None:
    source = write_dense(tmp_path / "dense", intermediate_size=512, num_hidden_layers=1)
    file = source / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] += 0.5  # a mean to be kept
    save_file(tensors, file, metadata={"format": "pt"})
    path = upcycle(
        source, out=tmp_path / "moe", method={"method": "drop", "ratio": 0.25}, experts=4, top_k=2
    )
    old = dense_layer(source, 0)
    renewed = []
    for number in range(4):
        new = expert(path, 0, number)
        gate_F, up_F = [(a != b).any(1) for a, b in zip(new[:2], old[:2], strict=True)]
        down_F = (new[2] != old[2]).any(0)
        assert gate_F.sum() == 128
        assert torch.equal(gate_F, up_F)
        assert torch.equal(gate_F, down_F)
        renewed.append(gate_F)
        for index, dim in enumerate((0, 0, 1)):
            kept = old[index].index_select(dim, gate_F.nonzero()[:, 0])
            fresh = new[index].index_select(dim, gate_F.nonzero()[:, 0])
            assert abs(float(fresh.mean() - kept.mean())) < 0.02
            assert float(fresh.std() / kept.std()) == pytest.approx(1, abs=0.05)
    assert not torch.equal(renewed[0], renewed[1])
    record = read_lineage(path)
    assert record["exact"] is False
    assert record["difference"] > 1e-2


def test_noise_is_a_share_of_the_weights_spread_and_follows_the_seed(
    dense: Path, tmp_path: Path
) -> None:
    made = [
        upcycle(
            dense,
            out=tmp_path / str(number),
            method={"method": "copies", "noise": 0.1},
            experts=2,
            seed=seed,
        )
        for number, seed in enumerate((1, 1, 2))
    ]
    for new, again, other, old in zip(
        *(expert(path, 1, 0) for path in made), dense_layer(dense, 1), strict=True
    ):
        assert torch.equal(new, again)
        assert not torch.equal(new, other)
        assert float((new - old).std() / old.std()) == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(expert(made[0], 1, 0)[0], expert(made[0], 1, 1)[0])
    assert read_lineage(made[0])["exact"] is False


def test_an_expert_that_is_no_copy_is_caught(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesaic.construct.upcycles.copies import Copies

    right = Copies.expert

    def wrong(self: Any, inputs: Any, layer: int, number: int, layers: Any) -> Any:
        made = right(self, inputs, layer, number, layers)
        return made._replace(up_FD=made.up_FD * 1.01) if layer else made

    monkeypatch.setattr(Copies, "expert", wrong)
    for verify in ("layers", "full"):
        with pytest.raises(MoesaicError, match="differs from the dense model"):
            upcycle(dense, out=tmp_path / verify, experts=2, top_k=2, verify=verify)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three models of one shape, and a text for each in letters of its own."""
    folder = tmp_path_factory.mktemp("family")
    models, texts = [], []
    for number, letters in enumerate(("abcd", "efgh", "ijkl")):
        path = folder / f"model{number}"
        path.mkdir()
        write_text_tokenizer(path)
        models.append(write_dense(path, seed=number))
        text = "".join(letters[(i * i + number) % 4] for i in range(40))
        file = folder / f"text{number}.jsonl"
        file.write_text("\n".join(json.dumps({"text": text[i:] + text}) for i in range(30)))
        texts.append(file)
    return {"models": models, "texts": texts}


def test_join_takes_each_models_layers_and_the_mean_of_the_rest(
    family: dict[str, Any], tmp_path: Path
) -> None:
    models = family["models"]
    path = upcycle(models, out=tmp_path / "moe", method={"method": "join", "router": "random"})
    for number, model in enumerate(models):
        for layer in range(2):
            for new, old in zip(
                expert(path, layer, number), dense_layer(model, layer), strict=True
            ):
                assert torch.equal(new, old)
    name = "model.layers.1.self_attn.q_proj.weight"
    mean = torch.stack([Checkpoint(model).read(name) for model in models]).mean(0)
    torch.testing.assert_close(Checkpoint(path).read(name), mean)
    method = {"method": "join", "router": "random", "others": "first"}
    path = upcycle(models, out=tmp_path / "first", method=method)
    assert torch.equal(Checkpoint(path).read(name), Checkpoint(models[0]).read(name))


def test_joining_a_model_with_itself_equals_it(family: dict[str, Any], tmp_path: Path) -> None:
    model = family["models"][0]
    join_at_random = ("--method", "join", "--set", "router=random")
    for layout in ("llama_moe", "mixtral"):
        path = upcycle(
            [model] * 3, out=tmp_path / layout, method="join", data=family["texts"], layout=layout
        )
        torch.testing.assert_close(logits(path), logits(model), atol=1e-4, rtol=0)
        assert read_lineage(path)["exact"] is True
    copy = shutil.copytree(model, tmp_path / "copy")
    shown = run_cli("upcycle", model, copy, "-o", tmp_path / "cli", *join_at_random)
    assert "exact        yes: logits differ by" in shown.stdout, shown.stderr
    shown = run_cli("upcycle", model, family["models"][1], "-o", tmp_path / "two", *join_at_random)
    assert "exact        no: logits differ by" in shown.stdout, shown.stderr


@pytest.mark.parametrize("router", ["ridge", "centroid"])
def test_joined_routers_know_their_texts_on_the_input_they_really_see(
    family: dict[str, Any], tmp_path: Path, router: str
) -> None:
    method = {"method": "join", "router": router, "tokens": 1024, "context": 32}
    path = upcycle(
        family["models"], out=tmp_path / "moe", method=method, data=family["texts"], top_k=1
    )
    stated = read_lineage(path)["own_text_first"]
    model = load(path)
    from moesaic.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    right: list[list[float]] = []
    for number, file in enumerate(family["texts"]):
        ids = tokenizer(json.loads(file.read_text().splitlines()[3])["text"])["input_ids"][:32]
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([ids]), output_router_logits=True)
        chosen = [logits_TE.argmax(-1) for logits_TE in out.router_logits]
        right.append([float((ids_T == number).float().mean()) for ids_T in chosen])
    for layer, share in enumerate(stated):
        measured = sum(row[layer] for row in right) / len(right)
        assert share > 0.9
        assert measured == pytest.approx(share, abs=0.1)


def test_the_model_that_comes_out_trains(dense: Path, tmp_path: Path) -> None:
    path = upcycle(dense, out=tmp_path / "moe", experts=4, shared=1, top_k=3)
    model = load(path).train()
    ids = torch.arange(1, 61).view(2, 30)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(
        p.grad is not None and bool(torch.isfinite(p.grad).all())
        for name, p in model.named_parameters()
        if "weight_noise" not in name
    )


def test_bf16_and_shards(tmp_path: Path) -> None:
    source = write_dense(tmp_path / "dense", dtype=torch.bfloat16, shard="20KB")
    method = {"method": "virtual-groups", "granularity": 3}
    path = upcycle(
        source,
        out=tmp_path / "moe",
        method=method,
        experts=6,
        top_k=3,
        max_shard_bytes=20_000,
    )
    checkpoint = Checkpoint(path)
    assert len(checkpoint.files) > 1
    assert {checkpoint.dtype(key) for key in checkpoint.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert read_lineage(path)["exact"] is True
    # Mixtral has no scale: 3 is folded into bf16 weights, which rounds them, and that is said.
    folded = upcycle(
        source, out=tmp_path / "mix", method=method, experts=6, top_k=3, layout="mixtral"
    )
    record = read_lineage(folded)
    assert 1e-4 < record["difference"] / max(1, record["largest_value"]) < 0.05
    assert record["exact"] is False


def test_the_command_prints_the_proof(dense: Path, tmp_path: Path) -> None:
    shown = run_cli("upcycle", dense, "-o", tmp_path / "a", "--experts", 4)
    assert shown.exit_code == 0, shown.stderr
    assert "exact        yes: logits differ by" in shown.stdout
    assert shown.stdout.strip().splitlines()[-1] == str(tmp_path / "a")
    drop = run_cli(
        "upcycle", dense, "-o", tmp_path / "b", "--method", "drop", "--set", "ratio=0.3",
        "--experts", 4, "--json",
    )  # fmt: skip
    assert drop.exit_code == 0, drop.stderr
    assert drop.json["exact"] is False
    assert drop.json["difference"] > 0
    assert read_lineage(tmp_path / "b")["config"]["method"]["ratio"] == 0.3


def test_bad_input(dense: Path, family: dict[str, Any], tmp_path: Path) -> None:
    def bad(*arguments: object, words: tuple[str, ...]) -> None:
        assert_user_error(run_cli("upcycle", *arguments, "-o", tmp_path / "x"), *words)

    one, two = family["models"][:2]
    bad(dense, words=("experts is missing",))
    bad(dense, "--experts", 4, "--top-k", 5, words=("top_k=5", "1 to 4"))
    bad(dense, "--experts", 2, "--shared", 2, words=("shared=2",))
    bad(dense, "--experts", 4, "--method", "copy", words=("copies",))
    bad(dense, "--experts", 4, "--set", "nois=0.1", words=("nois", "noise"))
    bad(dense, "--experts", 4, "--layout", "mixtrl", words=("mixtral",))
    groups = ("--method", "virtual-groups", "--set", "granularity=5")
    bad(dense, "--experts", 10, *groups, words=("granularity=5", "48 neurons"))
    bad(one, two, "--experts", 2, words=("join",))
    bad(one, "--method", "join", "--top-k", 1, words=("two or more",))
    bad(one, two, "--method", "join", words=("0 texts", "2 models"))
    wide = write_dense(tmp_path / "wide", intermediate_size=64)
    texts = [item for file in family["texts"][:2] for item in ("--data", file)]
    bad(one, wide, "--method", "join", *texts, words=("intermediate_size=64",))
    bad(one, wide, "--method", "join", "--set", "router=random", words=("one shape",))
    bad(tmp_path / "none", "--experts", 4, words=("does not exist",))
