"""The original's files: both label formats, every way torch writes them, and nothing else."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.construct.legacy import import_split, read_plain, read_score_folders
from moesaic.construct.split import split
from moesaic.core.errors import UserError
from tests.helpers import GOLDEN, assert_user_error, run_cli

DENSE = GOLDEN / "llama_moe_v1" / "dense"
UP = "layers.{}.mlp.up_proj.weight"

VALUES: dict[str, Any] = {
    "list": [0, 1, 2],
    "numpy ints": [np.int32(3), np.int64(300)],
    "doubles": np.array([1.0, 2.0, 0.0]),
    "big-endian": np.array([1, 2, 700], ">i4"),
    "columns first": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "lists": [[1, 2], [3]],
    "arrays": [np.array([1, 2]), np.array([3.0], np.float32)],
    "tensor": torch.arange(6, dtype=torch.int32).reshape(2, 3).T,
    "tensors": [torch.tensor([1, 2]), torch.tensor([0.5])],
}


@pytest.mark.parametrize("protocol", [2, 4, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("name", list(VALUES))
def test_plain_values_are_read_as_they_were(name: str, protocol: int, tmp_path: Path) -> None:
    value = VALUES[name]
    files = {"torch": tmp_path / "a", "old torch": tmp_path / "b", "pickle": tmp_path / "c"}
    torch.save(value, files["torch"], pickle_protocol=protocol)
    if "tensor" not in name:
        torch.save(
            value, files["old torch"], pickle_protocol=protocol,
            _use_new_zipfile_serialization=False,
        )  # fmt: skip
        files["pickle"].write_bytes(pickle.dumps(value, protocol=protocol))
    for file in files.values():
        if file.exists():
            read = read_plain(file)
            pairs = zip(read, value, strict=True) if isinstance(value, list) else [(read, value)]
            assert all(np.array_equal(a, np.asarray(b)) for a, b in pairs)


class Runs:
    """A pickle of this writes a file when it is opened by an ordinary reader."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


class Thing:
    pass


@pytest.mark.parametrize("modern", [True, False])
def test_anything_else_is_refused_before_it_runs(modern: bool, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for value in ([Runs(str(trap))], Thing(), {"a": Thing}, np.array([Thing()], object)):
        torch.save(value, tmp_path / "x", _use_new_zipfile_serialization=modern)
        with pytest.raises(UserError, match=r"x (asks for|is not a readable file)"):
            read_plain(tmp_path / "x")
    assert not trap.exists()


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none cannot be read"):
        read_plain(tmp_path / "none")
    torch.save([1, 2, 3], tmp_path / "x")
    for data in (b"", b"text", (tmp_path / "x").read_bytes()[:-100]):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(UserError, match="x is not a readable file"):
            read_plain(tmp_path / "x")


def save_layers(folder: Path, layers: list[Any], template: str = UP) -> Path:
    folder.mkdir(exist_ok=True)
    for layer, value in enumerate(layers):
        file = folder / template.format(layer)
        torch.save(value, file, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    return folder


def test_labels_and_neuron_lists_give_the_same_split(tmp_path: Path) -> None:
    made = split(DENSE, method="random", experts=4, seed=2)
    labels = [made.labels(0).tolist(), made.labels(1).astype(np.float64)]
    a = import_split(save_layers(tmp_path / "a", labels), layers=2, width=64)
    lists = [[ids.tolist() for ids in layer] for layer in made.experts]
    gate = "layers.{}.mlp.gate_proj.weight"
    b = import_split(save_layers(tmp_path / "b", lists, gate), layers=2, width=64)
    for read in (a, b):
        for layer in range(2):
            assert (read.labels(layer) == made.labels(layer)).all()


def test_order_and_overlaps_of_neuron_lists_are_kept(tmp_path: Path) -> None:
    layers = [[[9, 1, 4], [4, 63], [0]], [[2, 3], [3], [8]]]
    read = import_split(save_layers(tmp_path / "x", layers), layers=2, width=64, shared=1)
    assert read.shared[0][0].tolist() == [9, 1, 4]
    assert [ids.tolist() for ids in read.experts[1]] == [[3], [8]]
    assert not read.exact


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    labels = [[0, 1] * 32]
    folder = save_layers(tmp_path / "x", labels)
    with pytest.raises(UserError, match="cannot be read"):
        import_split(folder, layers=2, width=64)
    with pytest.raises(UserError, match="holds 64 labels"):
        import_split(folder, layers=1, width=60)
    with pytest.raises(UserError, match="no expert is shared"):
        import_split(folder, layers=1, width=64, shared=1)
    save_layers(folder, labels, "layers.{}.mlp.gate_proj.weight")
    with pytest.raises(UserError, match="holds both of"):
        import_split(folder, layers=1, width=64)
    with pytest.raises(UserError, match="needs its layer"):
        import_split(folder, layers=1, width=64, template="up")
    with pytest.raises(UserError, match="neither"):
        import_split(tmp_path, layers=1, width=64)
    save_layers(folder, [[0.5, 1.0] * 32])
    with pytest.raises(UserError, match="whole numbers"):
        import_split(folder, layers=1, width=64, template=UP)
    save_layers(folder, [[0, 10**9] * 32])  # once a loop over a thousand million experts
    with pytest.raises(UserError, match="to 1000000000"):
        import_split(folder, layers=1, width=64, template=UP)
    save_layers(folder, [[0, 2] * 32])  # no neuron for expert 1
    with pytest.raises(UserError, match="holds no neuron"):
        import_split(folder, layers=1, width=64, template=UP)


def test_score_folders_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for cluster in (10, 2, 0):
        save_layers(
            tmp_path / str(cluster),
            [torch.full((4,), cluster + layer / 10) for layer in range(2)],
            "layers.{}.mlp.gate_proj.weight.change",
        )
    scores = read_score_folders(tmp_path, layers=2, hook="gate")
    assert scores[1, :, 0].tolist() == pytest.approx([0.1, 2.1, 10.1])
    with pytest.raises(UserError, match="0 files of scores for layer 0, up_proj"):
        read_score_folders(tmp_path, layers=2, hook="up")


def test_the_command_imports_a_folder(tmp_path: Path) -> None:
    made = split(DENSE, method="random", experts=4, seed=2)
    folder = save_layers(tmp_path / "x", [made.labels(0).tolist(), made.labels(1).tolist()])
    arguments = ["split", DENSE, "--method", "imported", "--set", f"folder={folder}"]
    result = run_cli(*arguments, "--experts", 4, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.json["exact"] is True
    wrong = run_cli(*arguments, "--experts", 8, "-o", tmp_path / "out2")
    assert_user_error(wrong, "holds 4 experts a layer", "experts=8")
    torch.save(Runs(str(tmp_path / "trap")), folder / UP.format(1))
    evil = run_cli(*arguments, "--experts", 4, "-o", tmp_path / "out3")
    assert_user_error(evil, "plain lists")
    assert not (tmp_path / "trap").exists()
