"""Files read and written past the page cache: same bytes as the ordinary way."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moesaic.models import direct
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.direct import BLOCK, Arena, DirectReader, DirectWriter


@pytest.fixture(params=["direct", "refused", "refused later"])
def access(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With direct access, where opening for it fails, and where each transfer fails."""
    if request.param == "refused":
        monkeypatch.setattr(direct, "_DIRECT", 0)
    if request.param == "refused later":
        direct_files: set[int] = set()
        open_, read, write, close = os.open, os.preadv, os.pwrite, os.close

        def opens(path: object, flags: int, *rest: int) -> int:
            descriptor = open_(path, flags, *rest)  # type: ignore[arg-type]
            if flags & direct._DIRECT:
                direct_files.add(descriptor)
            return descriptor

        def closes(descriptor: int) -> None:
            direct_files.discard(descriptor)
            close(descriptor)

        def refused(transfer):
            def call(descriptor: int, *rest):
                if descriptor in direct_files:
                    raise OSError(22, "Invalid argument")
                return transfer(descriptor, *rest)

            return call

        monkeypatch.setattr(os, "open", opens)
        monkeypatch.setattr(os, "close", closes)
        monkeypatch.setattr(os, "preadv", refused(read))
        monkeypatch.setattr(os, "pwrite", refused(write))
    return str(request.param)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 100_000])
def test_any_range_is_read_as_it_is(access: str, size: int, tmp_path: Path) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    file = tmp_path / "file"
    file.write_bytes(data.tobytes())
    os.sync()
    reader = DirectReader(file)
    arena = Arena()
    draw = np.random.default_rng(1)
    for _ in range(20):
        begin, end = sorted(draw.integers(0, size + 1, 2))
        memory = arena.reserve(reader.room(end - begin))
        assert np.array_equal(reader.read(begin, end - begin, memory), data[begin:end])
    assert np.array_equal(reader.read(0, size, arena.reserve(reader.room(size))), data)
    with pytest.raises(OSError, match="ended"):
        reader.read(0, size + 1, arena.reserve(reader.room(size + 1)))


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
@pytest.mark.parametrize("gathered", [BLOCK, 1 << 20])
def test_any_order_of_writes_gives_the_same_file(
    access: str, order: str, gathered: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_AT_ONCE", 4 * gathered)
    size = 150_001
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    cuts = sorted({0, size, *np.random.default_rng(2).integers(0, size, 25).tolist(), 8192, 16384})
    parts = list(itertools.pairwise(cuts))
    if order == "backward":
        parts.reverse()
    if order == "shuffled":
        np.random.default_rng(3).shuffle(parts)
    writer = DirectWriter(tmp_path / "file", size)
    for begin, end in parts:
        writer.write(begin, data[begin:end])
    writer.sync()
    writer.close()
    assert (tmp_path / "file").read_bytes() == data.tobytes()


def test_fetched_tensors_are_the_read_ones(access: str, tmp_path: Path) -> None:
    wanted = {
        "a": torch.randn(300, 70),
        "b": torch.randn(3, 5).bfloat16(),
        "c": torch.zeros(0),
        "d": torch.arange(4),
    }
    save_file(wanted, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    os.sync()
    checkpoint, arena = Checkpoint(tmp_path), Arena()
    for keys in (["d", "a", "b", "c"], ["b"], ["a"]):
        found = checkpoint.fetch(keys, arena)
        assert list(found) == keys
        assert all(torch.equal(found[key], wanted[key]) for key in keys)
        assert found[keys[0]].shape == wanted[keys[0]].shape
    checkpoint.release(["a", "b", "c", "d"])
    assert torch.equal(checkpoint.read("a"), wanted["a"])
    checkpoint.release(["a", "b", "c", "d"])
    assert torch.equal(checkpoint.read("a"), wanted["a"])
