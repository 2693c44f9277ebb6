"""What a router does with its logits: scores, the best K experts, their weights.

`reference` is the meaning, in plain torch. `choose` computes the same, in one Triton kernel each
way (`triton.router`) where that runs, else through `reference`. Which models' routers follow which
`Scheme` is told in `fuse`.

The choice goes by what is exact: scores that grow with the logit are not compared themselves, the
logits are. Of equals the lowest id comes first; NaN counts as the highest. `torch.topk` promises no
order among equals, so that ids equal a model's own wherever its own are determined.

T tokens, E experts, K chosen experts of a token.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

Score = Literal["softmax", "sigmoid", "softmax of chosen"]
GroupRule = Literal["highest", "two highest"]
MOST_EXPERTS = 512
MOST_CHOSEN = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Scheme(NamedTuple):
    """How logits [T, E] become weights and ids [T, K]; all arithmetic in float32."""

    top_k: int
    score: Score = "softmax"
    """Over all experts; "softmax of chosen": over the K highest logits alone."""
    groups: int = 1
    """Experts are so many groups of neighbours (DeepSeek), ..."""
    kept_groups: int = 1
    """... of which a token keeps the best: the others' experts come last."""
    group_rule: GroupRule = "highest"
    """A group is as good as its highest score, or as the sum of its two highest."""
    renormalise: bool = False
    """Divide weights by (their sum + epsilon)."""
    epsilon: float = 0.0
    scale: float = 1.0
    """Factor on the weights, in the end."""
    rounded: bool = False
    """Round scores, quotients and products (not sums) to the logits' dtype, as code without a cast
    does under autocast on a GPU."""

    @property
    def limited(self) -> bool:
        """Whether a token is kept from some of the groups."""
        return self.kept_groups < self.groups


def reference(
    logits_TE: torch.Tensor,
    scheme: Scheme,
    *,
    bias_E: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [T, K] of `dtype` and ids [T, K] int64, the highest first.

    `bias_E` is added to the scores for the choice, not to the weights (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2).
    """
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    low = logits_TE.dtype if scheme.rounded else wide
    exact_TE = logits_TE.to(wide)
    if scheme.score == "sigmoid":
        scores_TE = exact_TE.sigmoid().to(low)
    else:
        scores_TE = exact_TE.softmax(-1).to(low)
    ranked_TE = exact_TE
    if by_score(scheme, biased=bias_E is not None):
        ranked_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if scheme.limited:
        ranked_TE = ranked_TE.masked_fill(~_in_kept_groups(ranked_TE, scheme), -torch.inf)
    ids_TK = _highest(ranked_TE, scheme.top_k)
    if scheme.score == "softmax of chosen":
        weights_TK = exact_TE.gather(1, ids_TK).softmax(-1).to(low)
    else:
        weights_TK = scores_TE.gather(1, ids_TK)
    if scheme.renormalise:
        total_T1 = weights_TK.sum(-1, keepdim=True, dtype=wide)
        weights_TK = (weights_TK / (total_T1 + scheme.epsilon)).to(low)
    return (weights_TK * scheme.scale).to(dtype), ids_TK


def by_score(scheme: Scheme, *, biased: bool) -> bool:
    """Whether experts are ranked by their scores; else by their logits, which is the same order."""
    return biased or (scheme.limited and scheme.group_rule == "two highest")


def choose(
    logits_TE: torch.Tensor,
    scheme: Scheme,
    *,
    bias_E: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what `reference` computes, in one kernel where that runs.

    Differentiable in the logits, once; nothing is kept for it but logits and ids.
    """
    experts = logits_TE.shape[1]
    if logits_TE.dtype in _DTYPES and why_not(scheme, experts, logits_TE.device) is None:
        return _triton().choose(logits_TE, scheme, bias_E=bias_E, dtype=dtype)
    return reference(logits_TE, scheme, bias_E=bias_E, dtype=dtype)


def why_not(scheme: Scheme, experts: int, device: torch.device | None = None) -> str | None:
    """Say in a few words why the kernel does not take this choice (on `device`), or return None."""
    if scheme.top_k > min(MOST_CHOSEN, experts):
        return f"it chooses {scheme.top_k} of {experts} experts, not up to {MOST_CHOSEN}"
    if experts > MOST_EXPERTS:
        return f"it has {experts} experts, not up to {MOST_EXPERTS}"
    if scheme.limited:
        size = experts // scheme.groups
        if size * scheme.groups != experts or (size < 2 and scheme.group_rule == "two highest"):
            return f"its {experts} experts are no {scheme.groups} groups"
    return None if device is None else _why_not_on(device)


def _why_not_on(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the kernel needs a GPU, not a {device.type.upper()}"
    try:
        _triton()
    except ImportError as error:
        return f"the kernel cannot be imported ({error})"
    return None


def columns(scheme: Scheme, experts: int) -> tuple[int, int]:
    """Return the powers of two that hold the groups, and all experts group by group."""
    groups = scheme.groups if scheme.limited else 1
    filled = _power_of_two(groups)
    return filled, filled * _power_of_two(experts // groups)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _highest(values_TE: torch.Tensor, count: int) -> torch.Tensor:
    """The ids of the highest values, the lowest id first among equals."""
    return values_TE.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _in_kept_groups(ranked_TE: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    of_group_TGS = ranked_TE.unflatten(1, (scheme.groups, -1))
    if scheme.group_rule == "highest":
        value_TG = of_group_TGS.amax(-1)
    else:
        value_TG = of_group_TGS.topk(2, dim=-1).values.float().sum(-1)
    kept_TG = torch.zeros_like(value_TG, dtype=torch.bool)
    kept_TG = kept_TG.scatter(1, _highest(value_TG, scheme.kept_groups), True)
    return kept_TG[:, :, None].expand_as(of_group_TGS).flatten(1)


def _triton() -> Any:
    import moesaic.kernels.triton.router as fused

    return fused
