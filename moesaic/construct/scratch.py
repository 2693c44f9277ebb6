"""A new model with random weights, from a YAML file: any causal model of transformers, or ours.

The file names a ``model_type`` and, under ``config``, that type's own fields. The config is built
through its constructor (a field set afterwards may be ignored: ``rope_theta`` is) and then compared
with what was asked for; a field that the type does not have, or that came out different, is an
error.
"""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from moesaic.core.config import Config, load
from moesaic.core.errors import UserError, check_seed, nearest
from moesaic.core.files import check_output, output_directory
from moesaic.core.lineage import write_lineage
from moesaic.recipes import find

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

# Fields that older configs spell flat and transformers 5 keeps inside `rope_parameters`.
_ROPE_FIELDS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


class InitConfig(Config):
    """A model to build with random weights."""

    model_type: str
    """The transformers model type: llama, mixtral, deepseek_v3, llama_moe, ..."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of that type's config class; those left out keep the class's defaults."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights written."""
    tokenizer: Path | None = None
    """A folder whose tokenizer files are copied beside the model."""
    seed: int = 0
    """Seed of the weights."""


@dataclass(frozen=True)
class Built:
    """What `init` made: where, of which class, with how many parameters."""

    path: Path
    architecture: str
    parameters: int
    active: int


def read_preset(preset: Path | str, *, overrides: Sequence[str] = ()) -> InitConfig:
    """Read a preset by its name or a YAML file by its path. Raises UserError for neither."""
    return load(InitConfig, find(preset, kind="init"), overrides=overrides)


def init(
    preset: Path | str | InitConfig,
    *,
    out: Path | str,
    seed: int | None = None,
    tokenizer: Path | str | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Write a new model with random weights to the directory `out` and return its path.

    `seed` and `tokenizer` win over the file's. The same seed gives the same weights. Raises
    UserError for an unknown preset, model type or field, a field whose value the class does not
    keep, a tokenizer with more tokens than the model's vocabulary, or an output directory that is
    not empty.
    """
    return build(preset, out=out, seed=seed, tokenizer=tokenizer, overrides=overrides).path


def build(
    preset: Path | str | InitConfig,
    *,
    out: Path | str,
    seed: int | None = None,
    tokenizer: Path | str | None = None,
    overrides: Sequence[str] = (),
) -> Built:
    """Do what `init` does and return the figures too."""
    import torch

    from moesaic.models.save import save

    wanted = preset if isinstance(preset, InitConfig) else read_preset(preset, overrides=overrides)
    if seed is not None:
        wanted = wanted.model_copy(update={"seed": seed})
    check_seed(wanted.seed)
    if tokenizer is not None:
        wanted = wanted.model_copy(update={"tokenizer": Path(tokenizer)})
    path = check_output(out)
    config = model_config(wanted)
    files = _tokenizer_files(wanted.tokenizer, vocabulary=getattr(config, "vocab_size", None))
    with _seeded(wanted.seed):
        model = _construct(config, getattr(torch, wanted.dtype))
    with output_directory(path) as partial:
        save(model, partial)
        for file in files:
            shutil.copyfile(file, partial / file.name)
        total, active = parameters(model)
        write_lineage(
            partial,
            step="init",
            parent=None,
            config={"preset": str(preset) if not isinstance(preset, InitConfig) else None}
            | wanted.model_dump(mode="json"),
            seed=wanted.seed,
            parameters=total,
            active_parameters=active,
        )
    return Built(path, type(model).__name__, total, active)


def model_config(wanted: InitConfig) -> PreTrainedConfig:
    """Build the transformers config that `wanted` describes and check that it came out as asked."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    _register_ours()
    known = list(CONFIG_MAPPING.keys())
    if wanted.model_type not in known:
        raise UserError(
            f"model_type '{wanted.model_type}' is unknown.{nearest(wanted.model_type, known)} "
            "Give a model type of transformers or of moesaic (llama_moe, llama_moe_residual)."
        )
    cls = type(AutoConfig.for_model(wanted.model_type))
    fields = _fields(cls)
    for name in wanted.config:
        if name not in fields:
            raise UserError(
                f"config.{name}: {cls.__name__} has no such field.{nearest(name, fields)} "
                "Correct or remove it."
            )
    try:
        config = cls(**wanted.config)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{cls.__name__} refuses these fields: {detail} Correct them.") from None
    for name, asked in wanted.config.items():
        got = _effective(config, name)
        if not _same(asked, got):
            raise UserError(
                f"config.{name}: asked for {asked!r}, {cls.__name__} made it {got!r}. "
                "Remove the field or give a value that the class keeps."
            )
    return config


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the causal model of `config` on the meta device: shapes and names, no memory."""
    import torch

    with torch.device("meta"):
        return _construct(config, torch.float32)


def parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Return how many parameters a model has, and how many of them one token uses."""
    from moesaic.models.anatomy import anatomy

    found = anatomy(model)
    return found.params_total, found.params_active


def _construct(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, RuntimeError, LookupError, TypeError, AssertionError) as error:
        if _out_of_memory(error):
            raise
        if "Unrecognized configuration class" in str(error):
            raise UserError(
                f"model_type '{config.model_type}' has no causal language model in transformers. "
                "Choose a type that has one."
            ) from None
        reason = f"unknown {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(
            f"{type(config).__name__}: no model can be built from these fields: {reason}. "
            "Correct config."
        ) from None


def _out_of_memory(error: Exception) -> bool:
    return "not enough memory" in str(error) or "out of memory" in str(error).lower()


def _fields(cls: type) -> set[str]:
    """Names that a config class's constructor understands, its aliases included."""
    names: set[str] = set(getattr(cls, "attribute_map", {}))
    if dataclasses.is_dataclass(cls):
        names |= {field.name for field in dataclasses.fields(cls)}
    for base in cls.__mro__:
        constructor = base.__dict__.get("__init__")
        if constructor is not None and base is not object:
            kinds = inspect.signature(constructor).parameters.values()
            names |= {p.name for p in kinds if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if "rope_parameters" in names:
        names |= set(_ROPE_FIELDS)
    return names - {"self"}


def _effective(config: PreTrainedConfig, name: str) -> Any:
    rope = getattr(config, "rope_parameters", None)
    if name in _ROPE_FIELDS and isinstance(rope, Mapping):
        return rope if name == "rope_scaling" else rope.get(name)
    return getattr(config, name, None)


def _same(asked: Any, got: Any) -> bool:
    """Compare a requested value with what the config holds; a mapping may have gained keys."""
    if isinstance(asked, Mapping) and isinstance(got, Mapping):
        return all(key in got and _same(value, got[key]) for key, value in asked.items())
    if isinstance(asked, (list, tuple)) and isinstance(got, (list, tuple)):
        return len(asked) == len(got) and all(map(_same, asked, got))
    if isinstance(asked, bool) or isinstance(got, bool):
        return asked is got
    return bool(asked == got) or str(got).removeprefix("torch.") == asked


def _tokenizer_files(folder: Path | None, *, vocabulary: int | None) -> list[Path]:
    if folder is None:
        return []
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    from moesaic.models.tokenizer import load_tokenizer

    size = len(load_tokenizer(folder))
    if vocabulary is not None and size > vocabulary:
        raise UserError(
            f"the tokenizer of {folder} has {size} tokens but config.vocab_size is {vocabulary}. "
            "Raise vocab_size."
        )
    return files


def _register_ours() -> None:
    import moesaic.models  # noqa: F401 - registers our model types with transformers


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the block and leave the caller's generator as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
