"""Tokenizers beside models: read without running or asking for the code of a repository."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from moesaic.core.errors import UserError
from moesaic.models.tokenizer import load_tokenizer
from tests.models.golden import FAMILIES

MINICPM = json.loads((FAMILIES / "minicpm_moe" / "config.json").read_text())
OWN = {"AutoTokenizer": ["evil.Tokenizer", None]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code ran')")
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))

    def write(config, settings):
        for name, content in (("config.json", config), ("tokenizer_config.json", settings)):
            if content is not None:
                (tmp_path / name).write_text(json.dumps(content))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (MINICPM, None),  # no model_type, and code of its own
        (MINICPM, {}),
        (MINICPM, {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": OWN}),
        (MINICPM, {"tokenizer_class": "EvilTokenizer", "auto_map": OWN}),
        (MINICPM, {"auto_map": OWN}),
        ({**MINICPM, "auto_map": {**MINICPM["auto_map"], **OWN}}, {}),
        ({"model_type": "yuan", "auto_map": {"AutoConfig": "evil.C"}}, {}),
        ({"model_type": "of-nobody", "auto_map": {"AutoConfig": "evil.C"}}, {"auto_map": OWN}),
    ],
)
def test_no_code_is_run_nor_asked_about(folder, config, settings):
    assert load_tokenizer(folder(config, settings))("a b")["input_ids"] == [0, 1]


def test_a_tokenizer_that_is_only_code_is_refused(folder):
    directory = folder(MINICPM, {"auto_map": OWN})
    (directory / "tokenizer.json").rename(directory / "tokenizer.model")
    with pytest.raises(UserError, match="code of its own"):
        load_tokenizer(directory)


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_a_tokenizer_of_no_family_is_what_its_file_says(folder, named):
    """transformers would cut text as Qwen2 does, and find none of these words."""
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    tokenizer = load_tokenizer(folder(config, {"tokenizer_class": named, "eos_token": "b"}))
    assert tokenizer("a b")["input_ids"] == [0, 1]
    assert tokenizer.eos_token_id == 1


def test_an_alias_is_looked_for_on_the_hub(monkeypatch):
    asked = []

    def refuse(name, **_):
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(UserError, match="no network"):
        load_tokenizer("olmoe")
    assert asked == ["allenai/OLMoE-1B-7B-0125"]
