from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from moesaic.core.errors import UserError
from moesaic.generation import generate
from moesaic.models.tokenizer import load_tokenizer
from tests.helpers import assert_user_error, run_cli

VOCABULARY = 256 + 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA whose tokenizer is one id a byte, so that characters span several ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<eos>", "<bos>", "<pad>", *letters]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(tiny: Path):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny), load_tokenizer(tiny)


class _Scripted(torch.nn.Module):
    """Stands for a model that writes given ids; only what `generate` touches."""

    def __init__(self, model, ids: list[int]) -> None:
        super().__init__()
        self.device, self.config = torch.device("cpu"), model.config
        self.generation_config = model.generation_config
        self._ids = ids

    def generate(self, ids_1T, *, streamer, generation_config, **_):
        streamer.put(ids_1T)
        for index in self._ids:
            streamer.put(torch.tensor([index]))
        return torch.cat([ids_1T, torch.tensor([self._ids])], dim=1)


def _greedy(model, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


def test_greedy_takes_the_likeliest_token_every_time(loaded):
    model, tokenizer = loaded
    ids = tokenizer("def f(")["input_ids"]
    expected = _greedy(model.eval(), ids, 20)[len(ids) :]
    assert 0 not in expected, "the fixture must not end early for this test"
    result = generate(model, "def f(", tokenizer=tokenizer, max_new_tokens=20)
    assert result.text == tokenizer.decode(expected)
    assert (result.prompt_tokens, result.new_tokens, result.stopped) == (6, 20, "length")


def test_sampling_follows_the_seed_and_leaves_the_callers_randomness_alone(loaded):
    model, tokenizer = loaded

    def sample(seed: int) -> str:
        options = {"temperature": 1.0, "max_new_tokens": 30}
        return generate(model, "a", tokenizer=tokenizer, seed=seed, **options).text

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = sample(0)
    assert torch.equal(torch.rand(3), expected)
    assert sample(0) == first
    assert sample(1) != first


def test_top_k_one_and_tiny_top_p_are_greedy(loaded):
    model, tokenizer = loaded
    greedy = generate(model, "a", tokenizer=tokenizer, max_new_tokens=15).text
    for choice in ({"top_k": 1}, {"top_p": 1e-6}):
        sampled = generate(
            model, "a", tokenizer=tokenizer, max_new_tokens=15, temperature=2.0, **choice
        )
        assert sampled.text == greedy


def test_plain_sampling_is_not_cut_to_transformers_default_of_fifty_tokens(loaded):
    model, tokenizer = loaded
    logits = model(torch.tensor([tokenizer("a")["input_ids"]])).logits[0, -1]
    top = set(logits.topk(50).indices.tolist())
    seen = set()
    for seed in range(40):  # at this temperature the 259 tokens are about equally likely
        result = generate(
            model, "a", tokenizer=tokenizer, max_new_tokens=1, temperature=1e4, seed=seed
        )
        seen.update(tokenizer(result.text)["input_ids"])
    assert seen - top


@pytest.mark.parametrize("text", ["naïve 中文 🙂!", "a\tb\n  c", "end with 中"])
def test_stream_gives_whole_characters_and_all_of_them(loaded, text: str):
    model, tokenizer = loaded
    pieces: list[str] = []
    writer = _Scripted(model, tokenizer(text)["input_ids"])
    result = generate(writer, "p", tokenizer=tokenizer, stream=pieces.append)
    assert "".join(pieces) == result.text == text
    assert not any("�" in piece for piece in pieces)
    assert len(pieces) == len(text), "every character as soon as it is complete"


def test_bytes_that_are_no_character_are_shown_at_the_end(loaded):
    model, tokenizer = loaded
    broken = tokenizer("中")["input_ids"][:2]
    result = generate(_Scripted(model, broken), "p", tokenizer=tokenizer)
    assert result.text == "�"


def test_stops_at_the_end_token_and_does_not_show_it(loaded):
    model, tokenizer = loaded
    result = generate(
        _Scripted(model, [*tokenizer("ab")["input_ids"], 0]), "p", tokenizer=tokenizer
    )
    assert (result.text, result.stopped, result.new_tokens) == ("ab", "end", 3)


def test_an_empty_prompt_begins_a_document(loaded):
    model, tokenizer = loaded
    expected = _greedy(model.eval(), [1], 5)[1:]
    result = generate(model, "", tokenizer=tokenizer, max_new_tokens=5)
    assert result.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_the_context_limits_the_length_and_training_mode_is_restored(loaded):
    model, tokenizer = loaded
    model.train()
    result = generate(model, "x" * 60, tokenizer=tokenizer, max_new_tokens=100)
    assert model.training
    assert result.settings["max_new_tokens"] == 4
    assert result.new_tokens <= 4
    with pytest.raises(UserError, match=r"64 tokens but the model's context is 64.*at most 63"):
        generate(model, "x" * 64, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 5}, "temperature above 0"),
    ],
)
def test_settings_out_of_range_are_refused(loaded, settings: dict, words: str):
    model, tokenizer = loaded
    with pytest.raises(UserError, match=words):
        generate(model, "a", tokenizer=tokenizer, **settings)


@pytest.fixture
def without_tokenizer(tiny: Path, tmp_path: Path) -> Path:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, bare)
    return bare


def test_command_streams_and_gives_json(tiny: Path, loaded):
    model, tokenizer = loaded
    expected = generate(model, "def", tokenizer=tokenizer, max_new_tokens=8).text
    shown = run_cli("generate", tiny, "-p", "def", "--max-new-tokens", 8)
    assert shown.exit_code == 0, shown
    assert shown.stdout == f"def{expected}\n"
    result = run_cli("generate", tiny, "-p", "def", "--max-new-tokens", 8, "--json")
    assert json.loads(result.stdout)["text"] == expected
    assert len(result.stdout.splitlines()) == 1


def test_command_without_tokenizer(without_tokenizer: Path, tiny: Path):
    result = run_cli("generate", without_tokenizer, "-p", "def")
    assert_user_error(result, "holds no tokenizer", "name another folder")
    assert result.stdout == ""
    arguments = ("-p", "def", "--max-new-tokens", 3, "--json", "--tokenizer", tiny)
    assert run_cli("generate", without_tokenizer, *arguments).exit_code == 0


def test_command_refuses_a_broken_tokenizer(without_tokenizer: Path):
    (without_tokenizer / "tokenizer.json").write_text("{")
    result = run_cli("generate", without_tokenizer, "-p", "def")
    assert_user_error(result, "cannot be read", "name another")


def test_nan_in_the_weights_is_said(loaded):
    model, tokenizer = loaded
    spoilt = copy.deepcopy(model)
    spoilt.get_input_embeddings().weight.data[3] = float("nan")
    prompt = tokenizer.decode([3])
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="NaN"):
            generate(spoilt, prompt, tokenizer=tokenizer, temperature=temperature)


def test_command_refuses_a_missing_model(tmp_path: Path):
    result = run_cli("generate", tmp_path / "nowhere", "-p", "def")
    assert_user_error(result, "nowhere")
