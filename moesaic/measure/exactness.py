"""Is a mixture the dense model it was made from? Compare them with all experts on and scores off.

Notation: T tokens, D hidden size, I neurons of a block. Everything is computed in float32.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moesaic.core.errors import MoesaicError
from moesaic.models.checkpoint import Checkpoint

Activation = Callable[[torch.Tensor], torch.Tensor]


class FeedForward(NamedTuple):
    """down(act(gate x + gate_bias) * (up x + up_bias)), without down's own bias."""

    gate_FD: torch.Tensor
    up_FD: torch.Tensor
    down_DF: torch.Tensor
    gate_bias_F: torch.Tensor | None = None
    up_bias_F: torch.Tensor | None = None

    def scaled(self, factor: float) -> FeedForward:
        """With a factor on what it gives, rounded to the type of the weights."""
        if factor == 1:
            return self
        return self._replace(down_DF=(self.down_DF.float() * factor).to(self.down_DF.dtype))

    def part(self, start: int, stop: int) -> FeedForward:
        """The neurons from `start` up to `stop`."""
        one, two = (None if b is None else b[start:stop] for b in self[3:])
        rows, columns = slice(start, stop), (slice(None), slice(start, stop))
        return FeedForward(self.gate_FD[rows], self.up_FD[rows], self.down_DF[columns], one, two)


TOLERANCE = 1e-4
"""Largest difference, relative to the largest value (but not to less than 1), called exact."""

# Neurons in float32 at a time; matrix products of 16 MB run at full speed.
_BLOCK = 1024


def fixed_tokens(hidden: int, *, tokens: int = 256) -> torch.Tensor:
    """The random inputs of the per-layer comparison, [T, D] from N(0, 1), the same every time."""
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(20240624))


@torch.inference_mode()
def feed_forward(x_TD: torch.Tensor, weights: FeedForward, activation: Activation) -> torch.Tensor:
    """Output of a feed-forward layer in float32, [T, D], a block of neurons at a time.

    Only a block is ever copied to float32, so the weights may be mapped from a file.
    """
    width, hidden = weights.gate_FD.shape
    out_TD = torch.zeros(len(x_TD), hidden)
    step = math.ceil(width / math.ceil(width / _BLOCK))
    rows, columns = torch.empty(step, hidden), torch.empty(hidden, step)
    for start in range(0, width, step):
        gate, up, down, gate_bias, up_bias = weights.part(start, min(start + step, width))
        size = len(gate)
        gate_TI = x_TD @ rows[:size].copy_(gate).T
        gate_TI = activation(gate_TI if gate_bias is None else gate_TI + gate_bias.float())
        up_TI = x_TD @ rows[:size].copy_(up).T
        gate_TI *= up_TI if up_bias is None else up_TI + up_bias.float()
        out_TD.addmm_(gate_TI, columns[:, :size].copy_(down).T)
    return out_TD


def layer_difference(
    dense: FeedForward,
    experts: Sequence[FeedForward],
    *,
    activation: Activation,
    x_TD: torch.Tensor,
) -> tuple[float, float]:
    """Compare a dense layer with the sum of its experts.

    Returns the largest absolute difference and the largest absolute value of the dense output.
    """
    return begin_layer_difference(dense, experts, activation=activation, x_TD=x_TD)()


def begin_layer_difference(
    dense: FeedForward,
    experts: Sequence[FeedForward],
    *,
    activation: Activation,
    x_TD: torch.Tensor,
    pool: Executor | None = None,
    workers: int = 1,
) -> Callable[[], tuple[float, float]]:
    """Start `layer_difference` on the `workers` threads of a pool; call the result to wait for it.

    The dense layer is cut into ranges of neurons and the experts are dealt out, so that every
    worker has a part; the parts' outputs add up.
    """
    share = max(1, workers // 2)
    width = len(dense.gate_FD)
    cuts = [width * part // share for part in range(share + 1)]
    ranges = [dense.part(a, b) for a, b in pairwise(cuts) if a < b]
    dealt = [experts[part::share] for part in range(share)]

    def total(layers: Sequence[FeedForward]) -> torch.Tensor:
        return torch.stack([feed_forward(x_TD, layer, activation) for layer in layers]).sum(0)

    if pool is None:
        sums = [(total(ranges), total(experts))]
        return lambda: _difference([sums[0][0]], [sums[0][1]])
    wanted = [pool.submit(total, [part]) for part in ranges]
    given = [pool.submit(total, part) for part in dealt if part]
    return lambda: _difference([f.result() for f in wanted], [f.result() for f in given])


def _difference(
    wanted: Sequence[torch.Tensor], given: Sequence[torch.Tensor]
) -> tuple[float, float]:
    wanted_TD, given_TD = torch.stack(list(wanted)).sum(0), torch.stack(list(given)).sum(0)
    return float((wanted_TD - given_TD).abs().max()), float(wanted_TD.abs().max())


@torch.inference_mode()
def logit_difference(
    dense: Path, mixture: Path, *, rows: int = 2, length: int = 48
) -> tuple[float, float]:
    """Compare whole models on fixed random token ids, in float32, one model in memory at a time.

    The mixture (`llama_moe`, `llama_moe_residual` or `llama_moe_v2`) runs with every expert chosen
    and scores switched off, or all equal and scaled to 1. Returns the largest absolute difference
    of the outputs (logits; hidden states for a model without head) and the largest absolute value
    of the dense outputs.

    Raises MoesaicError when either directory does not load completely.
    """
    everything = _all_experts(Checkpoint(mixture).config)
    wanted = _outputs(dense, {}, rows=rows, length=length)
    given = _outputs(mixture, everything, rows=rows, length=length)
    if wanted.keys() != given.keys():
        raise MoesaicError(f"{dense} returns {sorted(wanted)}, {mixture} returns {sorted(given)}.")
    differences = [float((wanted[name] - given[name]).abs().max()) for name in wanted]
    return max(differences), max(float(value.abs().max()) for value in wanted.values())


@torch.inference_mode()
def attention_difference(
    before: Path, after: Path, *, rows: int = 2, length: int = 48
) -> tuple[float, float]:
    """Compare a model with itself after its attention became experts, all on and equal.

    MLP experts are as they are in both. Returns as `logit_difference` does.
    """
    experts = Checkpoint(after).config["attn_experts"]
    everything = {"top_k_attn": experts, "scale_factor_attn": float(experts)}
    wanted = _outputs(before, {}, rows=rows, length=length)
    given = _outputs(after, everything, rows=rows, length=length)
    differences = [float((wanted[name] - given[name]).abs().max()) for name in wanted]
    return max(differences), max(float(value.abs().max()) for value in wanted.values())


def _all_experts(config: dict[str, Any]) -> dict[str, Any]:
    """Config fields under which every expert adds its output as it is."""
    if config["model_type"] == "moesaic_moe":
        every = config["num_experts"]
        return {"num_experts_per_tok": every, "weighting": "one", "routed_scaling_factor": 1.0}
    if config["model_type"] == "llama_moe_v2":  # with the routers silenced: see `_outputs`
        experts = config["num_local_experts"]
        everything = {"num_experts_per_tok": experts, "scale_factor": float(experts)}
        if config.get("use_attn_moe"):
            experts = config["attn_experts"]
            everything |= {"top_k_attn": experts, "scale_factor_attn": float(experts)}
        return everything
    everything = {"num_selects": config["num_experts"], "multiply_gate_scores": False}
    if "num_experts_residual" in config:
        everything["multiply_gate_scores_residual"] = False
    return everything


class Difference(NamedTuple):
    """How far the outputs of two models are apart."""

    difference: float
    """Largest absolute difference."""
    largest: float
    """Largest absolute value of the first model's outputs."""
    typical: float
    """Median over tokens of a token's largest difference."""


@torch.inference_mode()
def running_difference(
    dense: Path, mixture: Path, *, rows: int = 2, length: int = 48
) -> Difference:
    """Compare a dense model with a mixture that routes as it is configured to.

    As `logit_difference`, for mixtures of any family whose chosen experts already make up the
    dense model.
    """
    wanted = _outputs(dense, {}, rows=rows, length=length)
    given = _outputs(mixture, {}, rows=rows, length=length)
    if wanted.keys() != given.keys():
        raise MoesaicError(f"{dense} returns {sorted(wanted)}, {mixture} returns {sorted(given)}.")
    apart = [(wanted[name] - given[name]).abs() for name in wanted]
    return Difference(
        max(float(each.max()) for each in apart),
        max(float(value.abs().max()) for value in wanted.values()),
        max(float(each.amax(-1).median()) for each in apart),
    )


def is_exact(difference: float, largest: float) -> bool:
    """Whether a difference is rounding: within TOLERANCE of the largest value, at least of 1."""
    return difference <= TOLERANCE * max(1.0, largest)


def _outputs(
    path: Path, overrides: dict[str, Any], *, rows: int, length: int
) -> dict[str, torch.Tensor]:
    model = _load(path, overrides).eval()
    # Softmax of zeros: every expert weighs 1 / E.
    silent = {"mlp": "scale_factor" in overrides, "attention": "scale_factor_attn" in overrides}
    for module in model.modules():
        if getattr(module, "is_moe_router", False) and silent[getattr(module, "routes", "mlp")]:
            module.weight.data.zero_()
    vocabulary, longest = model.config.vocab_size, model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(20240624)
    ids = torch.randint(0, vocabulary, (rows, min(length, longest)), generator=generator)
    pad = model.config.pad_token_id
    if pad is None:
        ids = ids[:1]  # a classifier of several rows asks for a pad token, to find their ends
    else:
        ids[ids == pad] = (pad + 1) % vocabulary
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    found = {name: out[name].clone() for name in names if name in out}
    del model, out
    gc.collect()
    return found


def _load(path: Path, overrides: dict[str, Any]) -> Any:
    import transformers

    import moesaic.models  # noqa: F401 - registers the families

    if Checkpoint(path).config.get("model_type") == "mixtral":  # which may be a LLaMA-MoE-v2
        from moesaic.models.load import load

        with _no_bars():
            return load(path, dtype=torch.float32, **overrides)
    named = str((Checkpoint(path).config.get("architectures") or ["ForCausalLM"])[0])
    heads = ("ForCausalLM", "ForSequenceClassification", "ForQuestionAnswering")
    head = next((head for head in heads if named.endswith(head)), "")
    with _no_bars():
        loaded, info = getattr(transformers, f"AutoModel{head}").from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, local_files_only=True, **overrides
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(map(str, info.get(problem) or ())):
            raise MoesaicError(
                f"{path} does not load as a {type(loaded).__name__}: {problem.replace('_', ' ')} "
                f"{found[0]} (and {len(found) - 1} more)."
            )
    if loaded._can_set_experts_implementation():
        # the loop over experts: torch's grouped product, transformers' default, asks for widths
        # that are a multiple of 16 bytes
        loaded.set_experts_implementation("eager")
    return loaded


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    import transformers

    logging: Any = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
