"""What a run is made of, built once before the first update: device, model, tokenizer, data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from moesaic.core.errors import UserError
from moesaic.train.config import TrainConfig
from moesaic.train.weights import domain_weights, reference_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moesaic.train.loop import Run

Precision = Literal["fp32", "mixed", "bf16"]


@dataclass
class Data:
    """The training stream, the domains' first weights and the held-out text."""

    stream: Any
    weights: dict[str, float]
    tokens: dict[str, int]
    block_size: int
    valid: Any

    def epochs(self, drawn: Counter[str]) -> dict[str, float]:
        """Return how often each domain has been read, from the number of its blocks drawn."""
        return {
            name: round(drawn[name] * self.block_size / tokens, 4)
            for name, tokens in self.tokens.items()
        }


def device(name: str) -> torch.device:
    """Return the device called `name`. Raises UserError for one that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise UserError(f"device '{name}' is unknown. Use auto, cpu, cuda or cuda:N.") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is '{name}' but this machine has no CUDA GPU. Use auto or cpu.")
    return found


def precision(name: Literal["auto", "fp32", "mixed", "bf16"], where: torch.device) -> Precision:
    """Return the precision to train in; see `TrainConfig.precision`."""
    if name != "auto":
        return name
    return "mixed" if where.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def load_model(config: TrainConfig, where: torch.device, how: Precision) -> PreTrainedModel:
    """Load the model in the type it trains in. Raises UserError for a directory that is no model."""
    from moesaic.models.load import load

    options: dict[str, Any] = {"attn_implementation": config.attention}
    if config.experts is not None:
        options["experts_implementation"] = config.experts
    model = load(
        config.model, dtype=torch.bfloat16 if how == "bf16" else torch.float32, **options
    )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.data.block_size > limit:
        raise UserError(
            f"data.block_size={config.data.block_size} but the model reads at most {limit} positions. "
            "Lower data.block_size."
        )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(where)


def source_dtype(config: TrainConfig) -> str:
    """Return the type of the weights on disk, which the result keeps unless told otherwise."""
    from moesaic.models.checkpoint import Checkpoint

    checkpoint = Checkpoint(config.model)
    names = Counter(str(checkpoint.dtype(key)) for key in checkpoint.keys())
    return names.most_common(1)[0][0].removeprefix("torch.")


def load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `config.tokenizer`, else of the model. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    folder = config.tokenizer or config.model
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{folder} holds no tokenizer. Give tokenizer: DIR in the config, or copy tokenizer.json there."
        ) from None


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Return total and active parameters."""
    from moesaic.models.anatomy import anatomy

    found = anatomy(model)
    return found.params_total, found.params_active
