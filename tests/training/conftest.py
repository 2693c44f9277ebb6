"""A tokenizer, text of two domains and tiny checkpoints, made once."""

from __future__ import annotations

import json
import random

import pytest

from moesaic.data.tokenizer import train_tokenizer
from tests.training import models

VOCABULARY = 300


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folders train/ and valid/ with the domains `sums` and `tales`."""
    root = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["the", "a", "cat", "dog", "king", "sees", "likes", "finds", "old", "tree", "river"]

    def sums():
        a, b = rng.randrange(50), rng.randrange(50)
        return " ".join(f"{a} plus {b + i} is {a + b + i} ." for i in range(rng.randrange(2, 12)))

    def tale():
        return " ".join(rng.choices(words, k=rng.randrange(20, 90))) + "."

    for split, count in (("train", 120), ("valid", 8)):
        (root / split).mkdir()
        for name, make in (("sums", sums), ("tales", tale)):
            lines = [json.dumps({"text": make()}) for _ in range(count)]
            (root / split / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def tokenizer_folder(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer") / "bpe"
    return train_tokenizer(corpus / "train", out=out, vocabulary=VOCABULARY)


@pytest.fixture(scope="session")
def checkpoint(tokenizer_folder, tmp_path_factory):
    """Function from a builder of `models` to a directory with that model and the tokenizer."""
    import shutil

    made = {}

    def make(build):
        if build not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / build.__name__
            build(vocab_size=VOCABULARY).save_pretrained(folder)
            for file in tokenizer_folder.glob("tokenizer*"):
                shutil.copy(file, folder)
            made[build] = folder
        return made[build]

    return make


@pytest.fixture
def settings(corpus, checkpoint, tmp_path_factory):
    """Function from a builder and overrides to the mapping of a short run with everything in it."""
    cache = tmp_path_factory.mktemp("cache")

    def make(build=models.llama_moe, **changes):
        base = {
            "model": str(checkpoint(build)),
            "data": {
                "train": str(corpus / "train"),
                "valid": str(corpus / "valid"),
                "block_size": 32,
                "cache": str(cache),
            },
            "steps": 12,
            "batch": {"sequences": 4, "micro": 2},
            "optimizer": {"lr": 3e-3},
            "schedule": {"warmup": 2},
            "log": {"every": 1},
            "evaluate": {"every": 4},
            "checkpoint": {"every": 3, "keep_last": 2},
            "device": "cpu",
        }
        for key, value in changes.items():
            merged = base.get(key)
            base[key] = {**merged, **value} if isinstance(merged, dict) else value
        return base

    return make
