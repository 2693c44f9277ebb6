"""Checkpoints read and written tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.core.errors import MoesaicError, UserError
from moesaic.models.checkpoint import Checkpoint, CheckpointWriter, copy_companions


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "a.weight": torch.randn(5, 7),
        "b.weight": torch.randn(3, 9).to(torch.bfloat16),
        "c.bias": torch.randn(1).half(),
        "d.ids": torch.arange(4),
        "e.empty": torch.zeros(0, 3),
        "f.scalar": torch.tensor(2.5),
    }


def directory(path: Path, weights: dict[str, torch.Tensor] | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text('{"model_type": "x"}')
    if weights is not None:
        save_file(weights, path / "model.safetensors")
    return path


def same(checkpoint: Checkpoint, wanted: dict[str, torch.Tensor]) -> None:
    assert checkpoint.keys() == sorted(wanted)
    for name, tensor in wanted.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.parameters == sum(tensor.numel() for tensor in wanted.values())


@pytest.mark.parametrize("limit", [10**9, 80, 1])
def test_what_is_written_in_any_order_is_read_back_by_us_and_by_safetensors(
    tmp_path: Path, limit: int
) -> None:
    wanted = tensors()
    plan = [(name, t.dtype, tuple(t.shape)) for name, t in wanted.items()]
    directory(tmp_path)
    with CheckpointWriter(tmp_path, plan, max_shard_bytes=limit) as writer:
        for name in reversed(wanted):
            writer.write(name, wanted[name])
    same(Checkpoint(tmp_path), wanted)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (limit == 10**9)
    merged = {name: t for file in files for name, t in load_file(file).items()}
    assert all(torch.equal(merged[name], t) for name, t in wanted.items())
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert sorted(index["weight_map"]) == sorted(wanted)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in wanted.values())
        assert {file.name for file in files} == set(index["weight_map"].values())


def test_a_tensor_that_was_planned_and_not_written_is_an_error(tmp_path: Path) -> None:
    plan = [("a", torch.float32, (2,)), ("b", torch.float32, (2,))]
    writer = CheckpointWriter(tmp_path, plan)
    with pytest.raises(ValueError, match="planned"):
        writer.write("a", torch.zeros(3))
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="b"):
        writer.close()


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match="No space left") as caught:
        CheckpointWriter(tmp_path, [("a", torch.float32, (10**9, 10**9))])
    assert not isinstance(caught.value, UserError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["bin", "old bin", "sharded bin"])
def test_pickled_checkpoints_are_read(tmp_path: Path, form: str) -> None:
    wanted = tensors()
    directory(tmp_path)
    if form == "sharded bin":
        names = sorted(wanted)
        parts = {"x-1.bin": names[:3], "x-2.bin": names[3:]}
        for file, held in parts.items():
            torch.save({name: wanted[name] for name in held}, tmp_path / file)
        weight_map = {name: file for file, held in parts.items() for name in held}
        (tmp_path / "pytorch_model.bin.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )
    else:
        zipped = form == "bin"
        torch.save(wanted, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    same(Checkpoint(tmp_path), wanted)


def test_safetensors_with_a_header_of_odd_length_are_read(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * ((-len(header)) % 8 + 3)
    body = torch.tensor([1.0, -2.0]).numpy().tobytes()
    directory(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + body)
    assert Checkpoint(tmp_path).read("a").tolist() == [1.0, -2.0]


def test_changing_a_tensor_that_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    directory(tmp_path, {"a": torch.ones(3)})
    Checkpoint(tmp_path).read("a").zero_()
    assert Checkpoint(tmp_path).read("a").tolist() == [1, 1, 1]


def test_tied_heads_and_rotary_tables_are_not_counted(tmp_path: Path) -> None:
    weights = {
        "model.embed_tokens.weight": torch.ones(4, 2),
        "lm_head.weight": torch.ones(4, 2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
    }
    directory(tmp_path, weights)
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    assert Checkpoint(tmp_path).parameters == 8


def truncated(path: Path) -> None:
    file = directory(path, tensors()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def cut_header(path: Path) -> None:
    file = directory(path, tensors()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:40])


def empty_file(path: Path) -> None:
    (directory(path) / "model.safetensors").write_bytes(b"")


def no_weights(path: Path) -> None:
    directory(path)


def no_config(path: Path) -> None:
    directory(path, tensors())
    (path / "config.json").unlink()


def bad_config(path: Path) -> None:
    directory(path, tensors())
    (path / "config.json").write_text("{")


def missing_shard(path: Path) -> None:
    directory(path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_tensor(path: Path) -> None:
    directory(path)
    save_file({"a": torch.ones(1)}, path / "m.safetensors")
    index = {"weight_map": {"a": "m.safetensors", "lost": "m.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_index(path: Path) -> None:
    directory(path)
    save_file({"a": torch.ones(1)}, path / "model-00001-of-00002.safetensors")


def pickle_of_code(path: Path) -> None:
    torch.save({"a": Path("x")}, directory(path) / "pytorch_model.bin")


def pickle_of_numbers(path: Path) -> None:
    torch.save({"a": 1}, directory(path) / "pytorch_model.bin")


def truncated_pickle(path: Path) -> None:
    file = directory(path) / "pytorch_model.bin"
    torch.save({"a": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:1000])


def plain_bytes(path: Path) -> None:
    (directory(path) / "pytorch_model.bin").write_bytes(b"hello world")


def index_of_nothing(path: Path) -> None:
    (directory(path) / "model.safetensors.index.json").write_text('{"weight_map": []}')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "model.safetensors is truncated"),
        (cut_header, "model.safetensors is truncated"),
        (empty_file, "model.safetensors is truncated"),
        (no_weights, "holds no model.safetensors"),
        (no_config, "config.json is missing"),
        (bad_config, "no valid JSON"),
        (missing_shard, "model-00001-of-00002.safetensors is missing"),
        (missing_tensor, "lost"),
        (missing_index, "index.json is missing"),
        (pickle_of_code, "other than plain tensors"),
        (pickle_of_numbers, "other than a dict of plain tensors"),
        (plain_bytes, "pytorch_model.bin is truncated or no checkpoint"),
        (index_of_nothing, "holds no weight_map"),
        (truncated_pickle, "pytorch_model.bin is truncated"),
    ],
)
def test_damaged_directories_are_named_in_one_line(tmp_path: Path, damage, words: str) -> None:
    damage(tmp_path / "x")
    with pytest.raises(UserError, match=words.replace(".", r"\.")) as caught:
        Checkpoint(tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "x") in str(caught.value)


def test_a_missing_directory_and_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Checkpoint(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Checkpoint(tmp_path / "file")


def test_tokenizer_licence_and_generation_config_go_along_and_weights_do_not(
    tmp_path: Path,
) -> None:
    source, target = directory(tmp_path / "a", tensors()), tmp_path / "b"
    target.mkdir()
    wanted = ["LICENSE", "generation_config.json", "tokenizer.json", "tokenizer.model"]
    for name in [*wanted, "notes.md", "optimizer.pt"]:
        (source / name).write_text(name)
    assert copy_companions(source, target) == wanted
    assert sorted(p.name for p in target.iterdir()) == wanted
