"""A construction holds a few layers, whatever the number of layers of the model."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from moesaic.construct.layer_maker import LayerMaker
from moesaic.construct.mixture_writer import MixtureWriter
from moesaic.construct.pipeline import Recipe, run
from tests.construct.dense_models import write_dense, write_text_tokenizer

HIDDEN, WIDTH = 64, 256
ONE_LAYER = 3 * HIDDEN * WIDTH * 4
"""Bytes of the feed-forward part of a layer in float32."""


def held_bytes():
    """Bytes of all tensors that Python can reach, each storage once."""
    found = {}
    for thing in gc.get_objects():
        # the type is asked, not the object: some objects warn when they are looked at
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def peak(folder, layers, refine, monkeypatch):
    """The most that was held beyond what there was before, where layers are made and handed on."""
    path = write_dense(
        folder / f"dense-{layers}",
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
    )
    write_text_tokenizer(path)
    settings = Recipe(
        experts=8,
        top_k=2,
        tokens=512,
        context=32,
        data=str(folder / "text.txt"),
        device="cpu",
        refine=refine,
    )
    gc.collect()
    before, seen = held_bytes(), []

    def watched(kind):
        inner = kind.layer

        def layer(self, *given):
            made = inner(self, *given)
            seen.append(held_bytes() - before)
            return made

        return layer

    with monkeypatch.context() as patch:
        for kind in (LayerMaker, MixtureWriter):
            patch.setattr(kind, "layer", watched(kind))
        made = run(path, settings, folder=folder / f"moe-{layers}")
    assert len(made.layers) == layers
    return max(seen)


@pytest.mark.parametrize(
    "refine", [None, {"method": "layerwise", "passes": 1, "batch": 128, "ahead": 1}]
)
def test_what_is_held_does_not_grow_with_the_layers(tmp_path, monkeypatch, refine):
    words = np.random.default_rng(0).choice(list("abcdefgh "), 1000)
    (tmp_path / "text.txt").write_text("".join(words))
    # from the second layer on, what a layer reads is mapped: three of these are held at most
    few, many = (peak(tmp_path, layers, refine, monkeypatch) for layers in (4, 10))
    assert few > 2 * ONE_LAYER  # weights of a layer are among what was counted
    routers = 6 * (HIDDEN + 1) * 8 * 4  # what is kept of every layer beside its facts
    assert many - few < routers + ONE_LAYER / 4
