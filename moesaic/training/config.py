"""Everything a training run can be told, as typed YAML. A key that is not here is an error.

A *sequence* is one packed block of `data.block_size` tokens; a *step* is one optimizer update over
`batch.sequences` sequences, computed `batch.micro` at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from moesaic.core.config import Config
from moesaic.kernels.options import SEED_KEYS, KernelsConfig

DataSource = str | dict[str, str | list[str]]


class DynamicConfig(Config):
    """Change the domain weights after each evaluation, from losses against a reference model."""

    rule: Literal["sheared_llama", "sheared_llama_paper"] = "sheared_llama"
    """`sheared_llama`: smoothed, excess of either sign; `sheared_llama_paper`: only positive."""
    reference: str | dict[str, float]
    """Held-out loss of the reference model per domain (nats a token): a mapping, a JSON file with
    one, or `llama2-7b` (LLaMA-MoE's table; it fits LLaMA-2's tokenizer only)."""
    rate: float | None = Field(default=None, gt=0)
    """Step size of the rule `sheared_llama`; None: 1."""
    smoothing: float | None = Field(default=None, ge=0, lt=1)
    """Share that `sheared_llama` spreads evenly, so that no domain vanishes; None: 1e-4."""

    @model_validator(mode="after")
    def _options_have_effect(self) -> DynamicConfig:
        if self.rule != "sheared_llama" and self.options:
            name = next(iter(self.options))
            raise ValueError(f"{name} has no effect on the rule '{self.rule}'. Leave it out.")
        return self

    @property
    def options(self) -> dict[str, float]:
        """Options of the rule that were given."""
        given = {"rate": self.rate, "smoothing": self.smoothing}
        return {name: value for name, value in given.items() if value is not None}


class DataConfig(Config):
    """What to train on, and in which proportions."""

    train: DataSource
    """A file, a folder, a dataset name, or a mapping of domain to source."""
    valid: DataSource | None = None
    """Held-out text in the same forms; None: no evaluation."""
    weights: Literal["llama", "sheared", "uniform", "size"] | dict[str, float] = "uniform"
    """Share of the blocks drawn from each domain; `size`: in proportion to the domain's tokens."""
    conversations: bool = False
    """`train` and `valid` hold conversations (`conversations` or `messages`), not text: only what
    the assistant says is learned and scored; a sequence is whole ones, kept apart."""
    dynamic: DynamicConfig | None = None
    """Adapt the weights after each evaluation; None: they stay."""
    block_size: int = Field(default=512, ge=2)
    """Tokens in a sequence."""
    max_epochs: float | None = Field(default=None, gt=0)
    """Stop with an error once a domain has been read this often; None: shuffle it anew forever."""
    cache: Path | None = None
    """Folder for tokenised text; None: $MOESAIC_CACHE, else the user's cache folder."""

    @field_validator("train", "valid", mode="before")
    @classmethod
    def _paths_are_text(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            return {name: cls._paths_are_text(value) for name, value in given.items()}
        if isinstance(given, list | tuple):
            return [str(item) if isinstance(item, Path) else item for item in given]
        return str(given) if isinstance(given, Path) else given


class BatchConfig(Config):
    """How many sequences make one optimizer update."""

    sequences: int = Field(default=32, ge=1)
    """Sequences in an update."""
    micro: int | None = Field(default=None, ge=1)
    """Sequences in one forward pass, a divisor of `sequences`; None: all. The loss is the same."""

    @model_validator(mode="after")
    def _divides(self) -> BatchConfig:
        if self.micro is not None and self.sequences % self.micro:
            raise ValueError(
                f"batch.micro={self.micro} does not divide batch.sequences={self.sequences}. "
                "Choose a divisor."
            )
        return self

    @property
    def size(self) -> int:
        """Sequences in one forward pass."""
        return self.micro or self.sequences

    @property
    def accumulation(self) -> int:
        """Forward passes in an update."""
        return self.sequences // self.size


class OptimizerConfig(Config):
    """AdamW; weight decay leaves out biases and norm weights."""

    lr: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay, per unit of learning rate."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient; None: no clipping."""
    router_lr: float | None = Field(default=None, gt=0)
    """Factor on the learning rate of the routers' weights; None: 0.1 where a construction fitted
    them (weights of chosen experts that start at one), else 1."""

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{list(betas)} was given. Give two numbers from 0 to below 1.")
        return betas


class ScheduleConfig(Config):
    """Linear warm-up, then a cosine that is cut off at a floor."""

    warmup: int = Field(default=100, ge=0)
    """Updates of linear warm-up from 0."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """Lowest share of the peak rate after warm-up."""


class BalanceConfig(Config):
    """What keeps expert load even. The loss is averaged over an update's passes, never summed."""

    coefficient: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Weight of the balance loss; None: the model's own. Where the model's class computes no loss,
    one is made of its routers' scores, by default with what the config names (`aux_loss_alpha`),
    else 1e-3, or 1e-4 where a bias is moved."""
    bias_rate: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Step of the routers' correction bias after each update, up where an expert got less than the
    mean, else down; None: 1e-3 for models that have the bias (DeepSeek-V3, GLM-4-MoE); 0: off."""


class DistillConfig(Config):
    """Learn from a frozen model's distribution over the next token, beside the token itself."""

    model: Path
    """Directory of the teacher, a causal language model with the same vocabulary: the dense model
    that a mixture was made of."""
    weight: float = Field(default=0.5, gt=0, le=1)
    """Share of KL(teacher || student) in the loss, in nats a token; cross-entropy has the rest."""


class LogConfig(Config):
    """What is reported while training."""

    every: int = Field(default=10, ge=1)
    """Updates between two lines of log.jsonl."""
    tensorboard: bool = False
    """Also write TensorBoard events into OUT/tensorboard (needs the extra `track`)."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak TFLOP/s of the device for MFU; None: from a table of GPUs, n/a on a CPU."""


class RoutingConfig(Config):
    """What is logged about routing: load and its entropy every update, the rest on samples."""

    every: int = Field(default=50, ge=1)
    """Updates between two samples, which give SRP and cache hit rates."""
    sequences: int = Field(default=2, ge=1)
    """Sequences of an update in a sample."""
    segments: tuple[Annotated[int, Field(ge=1)], ...] = (16,)
    """Segment lengths of SRP, in tokens."""
    caches: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 2.0)
    """Cache sizes of hit rates: experts of a layer over top_k."""
    policies: tuple[Literal["lru", "lfu", "fixed", "belady"], ...] = ("lru",)
    """Cache policies of hit rates."""


class EvaluateConfig(Config):
    """Held-out loss per domain while training."""

    every: int | None = Field(default=None, ge=1)
    """Updates between evaluations; None: only before the first and after the last update."""
    context: int | None = Field(default=None, ge=2)
    """Tokens of a document that are scored; None: `data.block_size`."""
    batch: int = Field(default=16, ge=1)
    """Documents in one forward pass."""
    documents: int | None = Field(default=None, ge=1)
    """Score only the first so many documents of each domain; None: all."""
    at_start: bool = True
    """Evaluate before the first update."""


class CheckpointConfig(Config):
    """States from which the same command goes on, bit for bit."""

    every: int | None = Field(default=None, ge=1)
    """Updates between two saved states; None: only the last."""
    keep_last: int = Field(default=1, ge=0)
    """Saved states kept. 0: none, once the model is written."""


class TrainConfig(Config):
    """A training run. Relative paths are taken from the current directory."""

    model: str | None = None
    """A model directory; `--model` wins over it."""
    tokenizer: str | None = None
    """Tokenizer directory; None: the model's own."""
    data: DataConfig
    """What to train on."""
    tokens: int | None = Field(default=None, ge=1)
    """Length of the run in tokens, rounded down to whole updates. Give this or `steps`."""
    steps: int | None = Field(default=None, ge=1)
    """Length of the run in updates. Give this or `tokens`."""
    batch: BatchConfig = BatchConfig()
    """How many sequences make one update."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over time."""
    balance: BalanceConfig = BalanceConfig()
    """What keeps expert load even."""
    distill: DistillConfig | None = None
    """A teacher to learn from too; None: from the data alone."""
    precision: Literal["auto", "fp32", "mixed", "bf16"] = "auto"
    """fp32; `mixed`: fp32 weights, bf16 autocast; `bf16`: bf16 weights, fp32 master copies in the
    optimizer. `auto`: `mixed` on a GPU (on small models the casts cost less than a second copy of
    the weights), fp32 on a CPU."""
    device: str = "auto"
    """`auto`: the first GPU if there is one, else the CPU."""
    compile: bool = False
    """Run the model and its loss through torch.compile."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation."""
    experts: str | None = None
    """Experts implementation (`moesaic`, `grouped_mm`, `eager`); None: the model's default."""
    kernels: KernelsConfig | None = None
    """What the run asks of our kernels; None: nothing. Its keys may also stand at the top level,
    where the axolotl plugin had them."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the data order, of routing noise and of dropout."""
    log: LogConfig = LogConfig()
    """What is reported."""
    routing: RoutingConfig | None = None
    """Log routing too; None: only the load that goes with the balance loss."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Held-out loss while training."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """States to resume from."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights in the final model; None: that of the model given."""

    @model_validator(mode="before")
    @classmethod
    def _top_level_kernels(cls, given: Any) -> Any:
        flat = [key for key in SEED_KEYS if isinstance(given, Mapping) and key in given]
        if not flat:
            return given
        if given.get("kernels") is not None:
            raise ValueError(f"give {flat[0]} either at the top level or under kernels, not both.")
        rest = {key: value for key, value in given.items() if key not in flat}
        return {**rest, "kernels": {key: given[key] for key in flat}}

    @model_validator(mode="after")
    def _one_word_on_experts(self) -> TrainConfig:
        if self.kernels is not None and self.experts is not None:
            raise ValueError(
                f"kernels and experts={self.experts} both choose the code of the experts. Leave "
                "one out: moe_kernels: true is experts: moesaic, false is grouped_mm."
            )
        return self

    @model_validator(mode="after")
    def _routing_is_heard(self) -> TrainConfig:
        if self.routing is not None and self.compile:
            raise ValueError(
                "routing listens to the model, and compiled code calls nobody. Leave out routing "
                "or compile."
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("give exactly one of 'tokens' and 'steps'.")
        if self.tokens is not None and self.tokens < self.tokens_per_step:
            raise ValueError(
                f"tokens={self.tokens} is less than one update of {self.tokens_per_step} "
                "(batch.sequences x data.block_size). Raise tokens or lower the batch."
            )
        if self.data.dynamic is not None and (
            self.data.valid is None or self.evaluate.every is None
        ):
            raise ValueError("data.dynamic needs data.valid and evaluate.every. Set both.")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens read by one update."""
        return self.batch.sequences * self.data.block_size

    @property
    def total_steps(self) -> int:
        """Updates in the whole run."""
        return self.steps or (self.tokens or 0) // self.tokens_per_step

    def trajectory(self) -> Mapping[str, Any]:
        """Return what decides the losses: a resumed run must not change it."""
        return self.model_dump(
            mode="json",
            exclude={
                "model": True,
                "tokenizer": True,
                "log": True,
                "routing": True,
                "checkpoint": True,
                "save_dtype": True,
                "data": {"cache"},
            },
        )
