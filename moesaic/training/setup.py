"""What a run is made of, built once before the first update: device, model, tokenizer, data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moesaic.core.console import note
from moesaic.core.errors import UserError
from moesaic.data import MixtureStream, Source, open_domains, open_mixture
from moesaic.data.dynamic import reference_losses
from moesaic.kernels.fuse import fuse_routers
from moesaic.kernels.options import configure, reset
from moesaic.measure import held_out_loss
from moesaic.measure.rows import evaluating
from moesaic.models.anatomy import anatomy, build
from moesaic.models.catalog import find
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.load import load
from moesaic.models.tokenizer import load_tokenizer
from moesaic.training.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moesaic.routing.online import RoutingWatch

Precision = Literal["fp32", "mixed", "bf16"]


@dataclass
class Data:
    """The training stream and the held-out text."""

    stream: MixtureStream
    valid: dict[str, Source] | None

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of one pass over each domain."""
        return {name: packed.epoch_tokens for name, packed in self.stream.domains.items()}

    def epochs(self, drawn: Counter[str]) -> dict[str, float]:
        """Return how often each domain has been read, from the number of its blocks drawn."""
        return {
            name: round(drawn[name] * self.stream.block / tokens, 4)
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
    """Load the model in the type it trains in. Raises UserError where there is none."""
    model: Any = load(_given(config), **load_options(config, how), **experts_options(config))
    check_length(config, model)
    check_finite(_given(config), model)
    if config.gradient_checkpointing:
        recompute_activations(model)
    model = model.to(where)
    configure_kernels(config, model, where, how)
    return model


def load_options(config: TrainConfig, how: Precision) -> dict[str, Any]:
    """Return how every model of the run is loaded, as keywords of `models.load.load`."""
    return {
        "dtype": torch.bfloat16 if how == "bf16" else torch.float32,
        "attn_implementation": config.attention,
        "device_map": None,  # a device_map.json beside the model is for using it, not for training
    }


def experts_options(config: TrainConfig) -> dict[str, Any]:
    """Return the experts implementation asked for, if any, as a keyword of `models.load.load`."""
    if config.experts is not None:
        return {"experts_implementation": config.experts}
    if config.kernels is not None:
        return {"experts_implementation": config.kernels.implementation}
    return {}


def configure_kernels(
    config: TrainConfig, model: PreTrainedModel, where: torch.device, how: Precision
) -> None:
    """Put `config.kernels` in force. Raises UserError for an option that would have no effect."""
    if config.kernels is None:
        reset()  # a run before this one in the same process may have said otherwise
        return
    experts = [model.get_submodule(layer.experts) for layer in anatomy(model).layers]
    configure(
        config.kernels,
        model_type=model.config.model_type,
        known_types=list(CONFIG_MAPPING.keys()),
        experts=experts,
        device=where,
        dtype=torch.bfloat16 if how in ("mixed", "bf16") else torch.float32,
    )
    if config.kernels.fuse_routers:
        fused = fuse_routers(model, device=where)
        if not fused.routers:
            reason = next(iter(fused.left.values()), "the model has no routers of their own")
            raise UserError(f"kernels.fuse_routers has no effect here: {reason}. Leave it out.")
        note(f"kernels: {len(fused.routers)} routers choose in one kernel")


def recompute_activations(model: Any) -> None:
    """Turn activation checkpointing on, under its new name where transformers has it (5.23)."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def empty_model(config: TrainConfig) -> PreTrainedModel:
    """Build the model without weights, to check a config against it."""
    source = find(_given(config))
    if source.directory is not None:
        Checkpoint(source.directory)  # its errors name the missing or damaged file
    model = build(source)
    check_length(config, model)
    return model


def source_dtype(config: TrainConfig) -> str:
    """Return the type of the weights on disk, which the result keeps unless told otherwise."""
    source = find(_given(config))
    if source.directory is None:
        return str(source.config.get("dtype") or source.config.get("torch_dtype") or "float32")
    checkpoint = Checkpoint(source.directory)
    types = Counter(str(checkpoint.dtype(name)) for name in list(checkpoint.keys()))
    return types.most_common(1)[0][0].removeprefix("torch.")


def tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """Load `config.tokenizer`, else the model's own. Raises UserError where there is none."""
    return load_tokenizer(config.tokenizer or find(_given(config)).location)


def _given(config: TrainConfig) -> str:
    assert config.model is not None, "read_config makes sure of it"
    return config.model


def check_length(config: TrainConfig, model: PreTrainedModel, what: str = "the model") -> None:
    """Raise UserError when the model reads fewer positions than a sequence has."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.data.block_size > limit:
        raise UserError(
            f"data.block_size={config.data.block_size} but {what} reads at most {limit} "
            "positions. Lower data.block_size."
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise UserError when the tokenizer makes ids that the model has no embedding for."""
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's vocabulary has {rows}. "
            "Give the tokenizer that belongs to the model."
        )


def check_apart(
    model: PreTrainedModel, *, cure: str = "Train another family on conversations"
) -> None:
    """Raise UserError when a model lets conversations that are packed into one row see each other.

    Told from one pass over two: what the second says may not change with the first at all.
    """
    embeddings: Any = model.get_input_embeddings()
    kept: list[torch.Tensor] = []
    hook = embeddings.register_forward_hook(lambda _, args, output: kept.append(output))
    half = 4
    weight = embeddings.weight
    ids_BT = torch.arange(2 * half, device=weight.device)[None] % weight.shape[0]
    try:
        with evaluating(model), torch.enable_grad():
            outputs = model(input_ids=ids_BT, position_ids=ids_BT % half, use_cache=False)
            said = outputs.logits[:, half:].float().logsumexp(-1).sum()
            (change_BTD,) = torch.autograd.grad(said, kept[:1])
    finally:
        hook.remove()
    if bool(change_BTD[:, :half].any()):
        raise UserError(
            f"{type(model).__name__} does not keep conversations apart that share a row: the "
            f"second of two depends on the first. {cure}."
        )


def check_finite(given: Path | str, model: PreTrainedModel) -> None:
    """Raise UserError when a weight of the model, loaded from `given`, is not a number."""
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise UserError(
                f"{given}: the weight {name} holds NaN or infinity. Give a sound checkpoint."
            )


def routing_watch(config: TrainConfig, model: PreTrainedModel) -> RoutingWatch | None:
    """Return what listens to the routers, if asked for. Raises UserError for a dense model."""
    if config.routing is None:
        return None
    from moesaic.routing.online import RoutingWatch  # numba is needed here only

    return RoutingWatch(model, **config.routing.model_dump())


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Return total and active parameters."""
    found = anatomy(model)
    return found.params_total, found.params_active


def open_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Open the training stream and the held-out text; tokenise what is not in the cache yet.

    Raises UserError for faults in the data, and when dynamic weights lack a loss for some domain.
    """
    data = config.data
    valid = None if data.valid is None else open_domains(data.valid)
    stream = open_mixture(
        data.train,
        tokenizer,
        block=data.block_size,
        weights=data.weights,
        seed=config.seed,
        cache=data.cache,
        max_epochs=data.max_epochs,
        conversations=data.conversations,
    )
    if data.dynamic is not None:
        names = list(stream.domains)
        reference_losses(data.dynamic.reference, names)
        absent = [name for name in names if name not in (valid or {})]
        if absent:
            raise UserError(
                f"data.dynamic needs a held-out loss for '{absent[0]}', but data.valid has only: "
                f"{', '.join(valid or {})}. Add it to data.valid."
            )
    return Data(stream, valid)


def evaluate(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    valid: dict[str, Source],
) -> dict[str, float]:
    """Return held-out loss per domain and its mean, nats a token."""
    return held_out_loss(
        model,
        tokenizer,
        valid,
        context=config.evaluate.context or config.data.block_size,
        batch_size=config.evaluate.batch,
        max_documents=config.evaluate.documents,
        conversations=config.data.conversations,
    )
