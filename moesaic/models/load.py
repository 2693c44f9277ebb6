"""Load a model by path, hub id or alias: every weight accounted for, no remote code."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as hub_logging

from moesaic import kernels
from moesaic.core.console import note
from moesaic.core.errors import UserError
from moesaic.models.catalog import Source, find, refusal
from moesaic.models.checkpoint import Checkpoint, irregular_experts
from moesaic.models.device_map import NAME as DEVICE_MAP
from moesaic.models.device_map import check_device_map, read_device_map
from moesaic.models.families import families
from moesaic.models.overrides import corrected

HARMLESS = {
    "": ("rotary_emb.inv_freq",),
    "nllb-moe": ("embed_positions.weights",),
}
"""Endings of tensor names that released files may hold and that are computed, never read.

By model_type of transformers ("": every family); our own families declare theirs in `FAMILY`.
"""
TOP_K = (
    "num_selects",
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "router_topk",
    "top_k_experts",
    "top_k",
)
"""What configs call the number of experts a token visits."""
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_BAR_FROM = 2 * 10**9  # bytes: smaller models load before a progress bar is worth a line
_NOT_OF_THE_CONFIG = (  # of from_pretrained, though a config may have an attribute of that name
    "attn_implementation",
    "dtype",
    "experts_implementation",
    "quantization_config",
    "torch_dtype",
)
_ELSEWHERE = ("variant", "gguf_file", "state_dict", "use_safetensors")  # weights lie elsewhere


def load(model: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model in eval mode: the class that config.json names, with all of its weights.

    Args:
        model: a directory, a hub id (organisation/name) or an alias of the catalog.
        kwargs: every keyword of transformers' `from_pretrained` (`dtype`, `device_map`,
            `attn_implementation`, ...). `experts_implementation` defaults to "moesaic" where the
            class has replaceable experts. `fuse_routers=True` lets routers choose in one kernel on
            a GPU (`kernels.fuse_routers`). Without a `device_map`, or with "auto", the
            `device_map.json` in the model's directory is used, if there is one. `load_in_4bit` and
            `load_in_8bit` stand for the `quantization_config` of bitsandbytes.

    Raises:
        UserError: no such model; a family that this version does not load right; a missing,
            truncated or unreadable file; a weight that is missing, unexpected, of another shape
            or left at its random start (the tensors are listed; `ignore_mismatched_sizes=True`
            accepts other shapes); a device_map.json that does not fit model or machine;
            `trust_remote_code=True`, since remote code is never run.
    """
    if kwargs.pop("trust_remote_code", False):
        raise UserError("trust_remote_code=True: moesaic never runs remote code. Leave it out.")
    source = find(model, **kwargs)
    reason = refusal(source.config)
    if reason is not None:
        raise UserError(f"{source.name} is not loaded: {reason}.")
    cls = model_class(source.fields, source=source.name)
    size = 0
    if source.directory is not None and not any(kwargs.get(key) for key in _ELSEWHERE):
        size = sum(file.stat().st_size for file in Checkpoint(source.directory).files)
    if source.directory is not None and kwargs.get("device_map", "auto") == "auto":
        kwargs |= _beside(source, cls)
    _quantization(kwargs)
    fused = kwargs.pop("fuse_routers", False)
    if cls._can_set_experts_implementation():
        kwargs.setdefault("experts_implementation", kernels.NAME)
    tolerant = kwargs.pop("ignore_mismatched_sizes", False)
    with _quiet(bar=size >= _BAR_FROM or source.directory is None) as report:
        loaded, info = _from_pretrained(cls, source, kwargs, report)
    _check_weights(info, cls, source, tolerant=tolerant)
    if getattr(loaded, "is_quantized", False):
        _say_what_stayed(loaded, source)
    if fused:
        kernels.fuse_routers(loaded)
    return loaded


def on_meta(config: PreTrainedConfig, cls: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """Build a model on the meta device: its modules and shapes, no memory."""
    if cls is None:
        cls = model_class({"model_type": config.model_type, "architectures": config.architectures})
    make: Any = cls._from_config
    with torch.device("meta"):
        model: PreTrainedModel = make(config, attn_implementation="eager")
    return model


def _beside(source: Source, cls: type[PreTrainedModel]) -> dict[str, Any]:
    """The device map beside a model, checked, as a keyword of from_pretrained."""
    assert source.directory is not None
    device_map = read_device_map(source.directory)
    if device_map is None:
        return {}
    config, _ = config_of(source)
    check_device_map(device_map, on_meta(config, cls), file=source.directory / DEVICE_MAP)
    note(f"{source.name}: {DEVICE_MAP} decides where its parts go.")
    return {"device_map": device_map}


def _quantization(kwargs: dict[str, Any]) -> None:
    """Turn load_in_4bit=True and load_in_8bit=True into the config that transformers 5 wants."""
    asked = [name for name in ("load_in_4bit", "load_in_8bit") if kwargs.pop(name, False)]
    if len(asked) > 1 or (asked and kwargs.get("quantization_config") is not None):
        raise UserError(
            f"{' and '.join([*asked, *(['quantization_config'] if len(asked) < 2 else [])])} were "
            "given. Give one of load_in_4bit, load_in_8bit and quantization_config."
        )
    if asked:
        kwargs["quantization_config"] = BitsAndBytesConfig(**{asked[0]: True})


def _say_what_stayed(model: PreTrainedModel, source: Source) -> None:
    """Say that experts in one tensor stay as they are: bitsandbytes takes linear layers only."""
    stacks = [p for p in model.parameters() if p.dim() == 3 and p.is_floating_point()]
    if stacks:
        size = sum(p.numel() for p in stacks) / 1e9
        note(
            f"{source.name}: quantization covers linear layers; {size:.2f} B weights of experts "
            f"stay in {str(stacks[0].dtype).removeprefix('torch.')}."
        )


def model_class(config: Mapping[str, Any], *, source: str = "config.json") -> type[PreTrainedModel]:
    """Return the class that a config.json names in `architectures`, or its family's causal LM.

    Capitals do not count: JetMoE's own files say JetMoEForCausalLM for JetMoeForCausalLM. Raises
    UserError when neither moesaic nor transformers has the class.
    """
    config_class = CONFIG_MAPPING[config["model_type"]]
    registered = [
        auto._model_mapping[config_class]
        for name, auto in vars(modeling_auto).items()
        if name.startswith("AutoModel")
        and hasattr(auto, "_model_mapping")
        and config_class in auto._model_mapping
    ]
    classes = [
        cls for entry in registered for cls in (entry if isinstance(entry, tuple) else (entry,))
    ]
    names = config.get("architectures") or []
    if names:
        wanted = names[0].lower()
        found = [cls for cls in classes if cls.__name__.lower() == wanted]
        named = getattr(transformers, names[0], None)  # a class without an Auto class of its own
        if not found and isinstance(named, type) and issubclass(named, PreTrainedModel):
            found = [named]
    else:
        causal = [cls for cls in classes if cls.__name__.endswith("ForCausalLM")]
        found = causal or classes
    if not found:
        known = ", ".join(sorted({cls.__name__ for cls in classes}))
        raise UserError(
            f"{source}: there is no class {names[0] if names else 'for this model'}. "
            f"model_type {config['model_type']} has: {known}."
        )
    chosen: type[PreTrainedModel] = found[0]
    return chosen


def config_of(source: Source, **kwargs: Any) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Build a model's config; of `kwargs`, its fields are set and the others returned.

    So `load(..., output_router_logits=True)` sets what `from_pretrained` would set.
    """
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[source.fields["model_type"]]
    for override in source.overrides.values():
        config_class = override.config or config_class
    config = config_class.from_dict(dict(source.fields))
    rest = {}
    for key, value in kwargs.items():
        if key in _NOT_OF_THE_CONFIG or not hasattr(config, key):
            rest[key] = value
        else:
            setattr(config, key, value)
    _check_top_k(config)
    return config, rest


def _check_top_k(config: PreTrainedConfig) -> None:
    text = config.get_text_config()
    # not top_k: old config.json files hold that of sampling under this name
    chosen = _first(text, [name for name in TOP_K if name != "top_k"])
    experts = _first(text, NUM_EXPERTS)
    if chosen is not None and experts is not None and chosen[1] > experts[1] > 1:
        raise UserError(
            f"{chosen[0]}={chosen[1]} but the model has {experts[1]} experts. "
            f"Give 1 to {experts[1]}."
        )


def _first(config: PreTrainedConfig, names: Iterable[str]) -> tuple[str, int] | None:
    found = ((name, getattr(config, name, None)) for name in names)
    return next(((name, value) for name, value in found if isinstance(value, int)), None)


def _from_pretrained(
    cls: type[PreTrainedModel], source: Source, kwargs: dict[str, Any], report: _Report
) -> tuple[PreTrainedModel, dict[str, Any]]:
    if source.directory is not None:
        kwargs.pop("subfolder", None)
    try:
        if "config" not in kwargs and "gguf_file" not in kwargs:
            config, kwargs = config_of(source, **kwargs)
            kwargs["config"] = config
        elif isinstance(kwargs.get("config"), PreTrainedConfig):
            _check_top_k(kwargs["config"])
        # Mismatched sizes are taken here and refused below, where all of them are listed.
        result: Any = corrected(cls, source.overrides).from_pretrained(
            source.location,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **kwargs,
        )
    except torch.OutOfMemoryError:
        raise
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from error
    except KeyError as error:  # an activation or rope type that transformers looks up
        raise UserError(
            f"{source.name} cannot be loaded: its config names {error}, which transformers does "
            "not know. Correct it."
        ) from error
    except (OSError, ValueError, TypeError, ImportError, StrictDataclassError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the machine's failure: no space for offloading, no permission
        raise UserError(f"{source.name} cannot be loaded: {_one_line(error)}") from error
    except RuntimeError as error:
        detail = report.conversions()
        if not detail and "state_dict" not in str(error):
            raise
        if detail and source.directory is not None:
            detail = irregular_experts(Checkpoint(source.directory)) or detail
        raise UserError(
            f"{source.name}: its weights do not fit {cls.__name__}: {detail or _one_line(error)}"
        ) from error
    loaded, info = result
    return loaded, info


def _check_weights(
    info: Mapping[str, Any], cls: type[PreTrainedModel], source: Source, *, tolerant: bool
) -> None:
    other_shape = {key for key, *_ in info["mismatched_keys"]}
    model_type = getattr(cls.config_class, "model_type", "")
    family = families().get(model_type)
    ours = family.harmless if family is not None else ()
    harmless = (*HARMLESS[""], *HARMLESS.get(model_type, ()), *ours)
    problems = {
        "missing": set(info["missing_keys"]) - other_shape,
        "unexpected": {key for key in info["unexpected_keys"] if not key.endswith(harmless)},
        "of another shape": {
            f"{key} {list(found)} for {list(wanted)}"
            for key, found, wanted in info["mismatched_keys"]
        },
    }
    if tolerant:
        del problems["of another shape"]
    told = [f"{len(keys)} {what} ({_listed(keys)})" for what, keys in problems.items() if keys]
    if told:
        raise UserError(
            f"{source.name}: its weights do not fit {cls.__name__}: {'; '.join(told)}. "
            "Check that config.json belongs to these weights and that no file is missing."
        )


def _listed(keys: Iterable[str], most: int = 20) -> str:
    keys = sorted(keys)
    more = f", and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


class _Report(logging.Filter):
    """Keeps transformers' report on the weights to itself: here what it tells is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if "LOAD REPORT" not in record.getMessage():
            return True
        plain = re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())
        self.lines = [line.strip() for line in plain.splitlines()]
        return False

    def conversions(self) -> str:
        """What could not be converted, on one line."""
        rows = [line for line in self.lines if "CONVERSION" in line and "|" in line]
        return "; ".join(" ".join(row.replace("|", " ").split()) for row in rows)[:1000]


@contextlib.contextmanager
def _quiet(*, bar: bool) -> Iterator[_Report]:
    """Catch transformers' report on the weights and drop its short-lived progress bars."""
    logger, report = logging.getLogger("transformers.modeling_utils"), _Report()
    bars = hub_logging.is_progress_bar_enabled()
    logger.addFilter(report)
    if not bar:
        hub_logging.disable_progress_bar()
    try:
        yield report
    finally:
        logger.removeFilter(report)
        if bars:
            hub_logging.enable_progress_bar()
