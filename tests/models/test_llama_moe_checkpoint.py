"""LLaMA-MoE on disk: released tensor names in and out, bit for bit; the model card's code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

import moesaic.models as families
from moesaic.models.expert_weights import CutExperts, MergeExperts
from tests.models import tiny
from tests.models.golden import FAMILIES, V1

CARD_PROMPT = "Suzhou is famous of"
RELEASED = [
    *(FAMILIES / name for name in ("llama_moe", "llama_moe_uneven", "llama_moe_seqcls")),
    *(V1 / name for name in ("moe_random", "moe_seqcls", "moe_sharing_inner", "moe_sharing_inter")),
]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for file in directory.glob("model*.safetensors") for k, v in load_file(file).items()
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def auto_of(directory: Path) -> type:
    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    classification = name.endswith("SequenceClassification")
    return AutoModelForSequenceClassification if classification else AutoModelForCausalLM


@pytest.mark.parametrize("directory", RELEASED, ids=lambda path: path.name)
@pytest.mark.parametrize("shard_size", ["10GB", "30KB"])
def test_released_files_survive_loading_and_saving_bit_for_bit(tmp_path, directory, shard_size):
    model, info = auto_of(directory).from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "30KB")
    original = {k: v for k, v in tensors(directory).items() if not k.endswith("inv_freq")}
    assert_same(tensors(tmp_path), original)
    saved = json.loads((tmp_path / "config.json").read_text())
    released = json.loads((directory / "config.json").read_text())
    for key in ("model_type", "architectures", "size_experts", "score_scale_factor", "num_selects"):
        assert saved[key] == released[key]
    assert not {"auto_map", "gates"} & saved.keys()
    again, info = auto_of(directory).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(dict(again.state_dict()), dict(model.state_dict()))


NEW = [
    (families.LlamaMoEModel, tiny.config, {}),
    (families.LlamaMoEForCausalLM, tiny.config, {"size_experts": tiny.RAGGED}),
    (families.LlamaMoEForCausalLM, tiny.config, {"size_experts": tiny.RAGGED, "mlp_bias": True}),
    (families.LlamaMoEForCausalLM, tiny.config, {"tie_word_embeddings": True}),
    (families.LlamaMoEForCausalLM, tiny.config, {"add_weight_norm": True, "attention_bias": True}),
    (families.LlamaMoEForSequenceClassification, tiny.config, {}),
    (families.LlamaMoEForQuestionAnswering, tiny.config, {"gate_network": "linear"}),
    (families.LlamaMoEResidualModel, tiny.residual_config, {"size_experts": None}),
    (
        families.LlamaMoEResidualForCausalLM,
        tiny.residual_config,
        {"size_experts_residual": [[4, 12], [10, 6]], "use_weighting": True, "mlp_bias": True},
    ),
    (families.LlamaMoEResidualForSequenceClassification, tiny.residual_config, {}),
    (families.LlamaMoEResidualForQuestionAnswering, tiny.residual_config, {}),
]


@pytest.mark.parametrize(("model_class", "make", "fields"), NEW)
def test_new_models_are_saved_in_the_released_layout(tmp_path, model_class, make, fields):
    model = tiny.build(model_class, make(**fields))
    with torch.no_grad():  # biases and noise start at zero
        for name, parameter in model.named_parameters():
            if not parameter.any() or name.endswith("norm.weight"):
                parameter.normal_()
        for module in model.modules():
            if hasattr(module, "zero_padding"):
                module.zero_padding()
    model.save_pretrained(tmp_path)
    saved = tensors(tmp_path)
    assert not any("_proj" in key for key in saved if "experts" in key)
    base = "" if model_class.__name__.endswith("Model") else "model."
    residual = "Residual" in model_class.__name__
    for layer in range(2):
        blocks = ("moe_layer.", "residual_block.") if residual else ("",)
        for block in blocks:
            module = f"{base}layers.{layer}.mlp.{block}calculator.experts"
            experts = model.get_submodule(module)
            for e, size in enumerate(experts.sizes):
                rows = experts.gate_up_proj[e].split(experts.intermediate_dim)
                for name, part in zip(("gate", "up"), rows, strict=True):
                    assert torch.equal(saved[f"{module}.weight_{name}.{e}"], part[:size])
                down = experts.down_proj[e][:, :size]
                assert torch.equal(saved[f"{module}.weight_down.{e}"], down)
    autos = {
        "Model": AutoModel,
        "CausalLM": AutoModelForCausalLM,
        "Classification": AutoModelForSequenceClassification,
        "Answering": AutoModelForQuestionAnswering,
    }
    (auto,) = (a for ending, a in autos.items() if model_class.__name__.endswith(ending))
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class
    assert not any(info.values())
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert torch.equal(loaded(tiny.ids())[0], model(tiny.ids())[0])


@pytest.mark.parametrize(
    ("model_class", "make"),
    [
        (families.LlamaMoEForCausalLM, tiny.config),
        (families.LlamaMoEResidualForCausalLM, tiny.residual_config),
    ],
)
def test_a_language_model_loads_without_its_head_and_with_another(tmp_path, model_class, make):
    model = tiny.build(model_class, make())
    model.save_pretrained(tmp_path)
    hidden = model.model(tiny.ids()).last_hidden_state
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(tiny.ids()).last_hidden_state, hidden)
    for auto, head in (
        (AutoModelForSequenceClassification, "score"),
        (AutoModelForQuestionAnswering, "qa_outputs"),
    ):
        other, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert all(key.startswith(head) for key in info["missing_keys"])
        assert torch.equal(other.model(tiny.ids()).last_hidden_state, hidden)
        assert type(other) in vars(families).values()
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(again.model(tiny.ids()).last_hidden_state, hidden)


def test_released_pickles_are_read(tmp_path):
    """The released models are float16 pytorch_model.bin files in several shards."""
    state = tensors(V1 / "moe_random")
    files = {key: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, key in enumerate(state)}
    for file in sorted(set(files.values())):
        torch.save({k: v for k, v in state.items() if files[k] == file}, tmp_path / file)
    index = {"metadata": {}, "weight_map": files}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    shutil.copy(V1 / "moe_random" / "config.json", tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.float16
    safe = AutoModelForCausalLM.from_pretrained(V1 / "moe_random")
    assert_same(dict(model.state_dict()), dict(safe.state_dict()))
    assert torch.isfinite(model(tiny.ids()).logits).all()


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "offload"])
def test_device_maps(tmp_path, device_map):
    directory = FAMILIES / "llama_moe_uneven"
    if device_map == "offload":
        parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.0": "cpu"}
        device_map["model.layers.1"] = "disk"
    model = AutoModelForCausalLM.from_pretrained(
        directory, device_map=device_map, offload_folder=tmp_path
    )
    expected = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        assert torch.equal(model(tiny.ids()).logits, expected(tiny.ids()).logits)


def test_a_checkpoint_without_one_expert_does_not_load(tmp_path):
    state = tensors(FAMILIES / "llama_moe")
    del state["model.layers.1.mlp.calculator.experts.weight_up.3"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(FAMILIES / "llama_moe" / "config.json", tmp_path)
    with pytest.raises(RuntimeError, match="conversion"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_noise_weights_of_a_quiet_config_are_left_out(tmp_path):
    model, info = AutoModelForCausalLM.from_pretrained(
        FAMILIES / "llama_moe", gate_add_noise=False, output_loading_info=True
    )
    assert not any(info.values())
    assert not any("weight_noise" in key for key in model.state_dict())


def test_merge_and_cut_are_inverse_for_uneven_widths():
    class Config:
        def expert_sizes(self, block):
            assert block == "layers.7.mlp."
            return (3, 1, 2)

    torch.manual_seed(0)
    names = ["calculator.experts.weight_gate.*", "calculator.experts.weight_up.*"]
    parts = {name: [torch.randn(size, 4) for size in (3, 1, 2)] for name in names}
    copies = {name: list(value) for name, value in parts.items()}
    merged = MergeExperts(0).convert(copies, names, ["gate_up"])["gate_up"]
    assert merged.shape == (3, 6, 4)
    assert torch.equal(merged[1, 0], parts[names[0]][1][0])
    assert torch.equal(merged[2, 3:5], parts[names[1]][2])
    assert (merged == 0).all(-1).sum() == 6
    cut = CutExperts(0).convert(
        {"gate_up": [merged]},
        ["gate_up"],
        names,
        full_layer_name="layers.7.mlp.calculator.experts.weight_gate.*",
        config=Config(),
    )
    for name in names:
        for e, tensor in enumerate(parts[name]):
            assert torch.equal(cut[f"layers.7.mlp.{name[:-1]}{e}"], tensor)
    with pytest.raises(ValueError, match="must be as many"):
        MergeExperts(0).convert({names[0]: [torch.ones(1, 1)]}, names, ["gate_up"])


def card_directory(path: Path) -> Path:
    """A released checkpoint's directory: config.json with auto_map, a tokenizer, no remote code."""
    shutil.copytree(FAMILIES / "llama_moe", path)
    words = ["<unk>", "<s>", "</s>", *CARD_PROMPT.split()]
    words += [f"w{i}" for i in range(96 - len(words))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
    (path / "generation_config.json").write_text(json.dumps(generation))
    assert "auto_map" in json.loads((path / "config.json").read_text())
    return path


def test_the_model_cards_quick_start_runs_as_it_stands(tmp_path, monkeypatch):
    """The code of the released model card, on a local directory; only the device differs."""
    model_dir = str(card_directory(tmp_path / "llama-moe"))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, torch_dtype=torch.bfloat16, trust_remote_code=True
    )
    model.eval()
    model.to("cpu")

    input_text = CARD_PROMPT
    inputs = tokenizer(input_text, return_tensors="pt")
    inputs = inputs.to("cpu")

    pred = model.generate(**inputs, max_length=50, temperature=0.0)
    text = tokenizer.decode(pred.cpu()[0], skip_special_tokens=True)

    assert type(model) is families.LlamaMoEForCausalLM
    assert model.dtype == torch.bfloat16
    assert text.startswith(input_text)
    assert pred.shape[1] == 50 or pred[0, -1] == 2


@pytest.mark.parametrize("trust", [None, False, True])
def test_auto_map_asks_for_no_remote_code(tmp_path, trust):
    directory = card_directory(tmp_path / "llama-moe")
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust)
    assert type(config) is families.LlamaMoEConfig
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        model = auto.from_pretrained(directory, trust_remote_code=trust)
        assert type(model).__module__ == "moesaic.models.llama_moe"
