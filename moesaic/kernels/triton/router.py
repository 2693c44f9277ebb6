"""A router's choice in one kernel each way: scores, the K highest, their weights, and the gradient.

T tokens, E experts, K chosen experts of a token. A program holds BLOCK tokens as rows of a tile and
all experts as its columns: groups one after the other, each filled up to a power of two. Every
score becomes an integer of the same order, so that an exact maximum and the lowest column that has
it are taken K times; each chosen score then remembers its rank and is stored there. No atomics, and
nothing is kept for the backward pass but logits and ids.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.language.extra import libdevice

from moesaic.kernels.router import Scheme, by_score, columns
from moesaic.kernels.triton.launch import Launcher

_TILE = 2048  # scores of one program
_MOST_ROWS = 64
_SOFTMAX, _SIGMOID = tl.constexpr(0), tl.constexpr(1)
_SCORES = {"softmax": 0, "sigmoid": 1, "softmax of chosen": 2}
_NONE = tl.constexpr(-(2**31))  # below the integer of every number
_NAN = tl.constexpr(2**31 - 1)
_PACKED = tl.constexpr(-(2**13))  # what a bfloat16 or float16 leaves free in a float32


def choose(
    logits_TE: torch.Tensor, scheme: Scheme, *, bias_E: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what `kernels.router.reference` computes; differentiable in the logits, once."""
    logits_TE = logits_TE.contiguous()
    if bias_E is not None:
        bias_E = bias_E.detach().contiguous()
    if torch.compiler.is_compiling():
        weights_TK, ids_TK = torch.ops.moesaic.fused_router(logits_TE, bias_E, dtype, *scheme)
    elif torch.is_grad_enabled() and logits_TE.requires_grad:
        weights_TK, ids_TK = _Choice.apply(logits_TE, bias_E, dtype, *scheme)
    else:
        weights_TK, ids_TK = _forward(logits_TE, bias_E, dtype, *scheme)
    return weights_TK, ids_TK


def _forward(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, dtype: torch.dtype, *parts: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    scheme = Scheme(*parts)
    tokens, experts = logits_TE.shape
    weights_TK = logits_TE.new_empty(tokens, scheme.top_k, dtype=dtype)
    ids_TK = logits_TE.new_empty(tokens, scheme.top_k, dtype=torch.int64)
    if tokens:
        groups, width = columns(scheme, experts)
        ranked_by_score = by_score(scheme, biased=bias_E is not None)
        block, warps = _tile(width)
        with _on(logits_TE):
            _start_choose(
                (triton.cdiv(tokens, block),),
                logits_TE, bias_E, weights_TK, ids_TK, tokens,
                EXPERTS=experts, TOP_K=scheme.top_k, SCORE=_SCORES[scheme.score],
                GROUPS=scheme.groups if scheme.limited else 1, KEPT_GROUPS=scheme.kept_groups,
                TWO_HIGHEST=scheme.group_rule == "two highest",
                BIASED=bias_E is not None, BY_SCORE=ranked_by_score,
                SHORT=not ranked_by_score and logits_TE.dtype != torch.float32,
                RENORMALISE=scheme.renormalise, EPSILON=float(scheme.epsilon),
                SCALE=float(scheme.scale), ROUNDED=_rounds(scheme, logits_TE),
                ROUNDED_RANK=_rounds(scheme, logits_TE, bias_E),
                FILLED=groups, WIDTH=width, BLOCK=block, EXACT=_EXACT,
                num_warps=warps,
            )  # fmt: skip
    return weights_TK, ids_TK


def _backward(
    grad_TK: torch.Tensor, logits_TE: torch.Tensor, ids_TK: torch.Tensor, *parts: Any
) -> torch.Tensor:
    scheme = Scheme(*parts)
    tokens, experts = logits_TE.shape
    d_logits_TE = torch.empty_like(logits_TE)
    if tokens:
        width = triton.next_power_of_2(experts)
        block, warps = _tile(width)
        with _on(logits_TE):
            _start_gradient(
                (triton.cdiv(tokens, block),),
                logits_TE, ids_TK.contiguous(), grad_TK.contiguous(), d_logits_TE, tokens,
                EXPERTS=experts, TOP_K=scheme.top_k, SCORE=_SCORES[scheme.score],
                RENORMALISE=scheme.renormalise, EPSILON=float(scheme.epsilon),
                SCALE=float(scheme.scale), WIDTH=width, BLOCK=block,
                EXACT=_EXACT, num_warps=warps,
            )  # fmt: skip
    return d_logits_TE


def _tile(width: int) -> tuple[int, int]:
    """Rows and warps of a program whose rows are so wide."""
    rows = max(1, min(_MOST_ROWS, _TILE // width))
    return rows, max(1, min(4, rows * width // 512))


def _rounds(scheme: Scheme, *tensors: torch.Tensor | None) -> bool:
    """Whether arithmetic on these tensors rounds after every step."""
    given = [t.dtype for t in tensors if t is not None]
    return scheme.rounded and all(dtype != torch.float32 for dtype in given)


def _on(tensor: torch.Tensor) -> Any:
    from moesaic.kernels.triton.layer import _on as on

    return on(tensor.device)


@triton.jit
def _integer(x):
    """The integer in whose order float32 numbers lie; the two zeros are one, NaN is the highest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, _NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    # exact: CUDA's own, whose bits torch has too; Triton's is an approximation
    if EXACT:
        return libdevice.exp(x)
    return tl.exp(x)


@triton.jit
def _rounded(x, dtype: tl.constexpr, ROUNDED: tl.constexpr):
    if ROUNDED:
        return x.to(dtype).to(tl.float32)
    return x


@triton.jit
def _score(logits, among, SCORE: tl.constexpr, EXACT: tl.constexpr):
    """Sigmoid, or softmax over `among`: zero elsewhere."""
    if SCORE == _SIGMOID:
        return tl.math.div_rn(1.0, 1.0 + _exp(-logits, EXACT))
    highest = tl.max(tl.where(among, logits, float("-inf")), 1)
    raised = tl.where(among, _exp(logits - highest[:, None], EXACT), 0.0)
    return tl.math.div_rn(raised, tl.sum(raised, 1)[:, None])


@triton.jit
def _choose(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, tokens,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SCORE: tl.constexpr, GROUPS: tl.constexpr,
    KEPT_GROUPS: tl.constexpr, TWO_HIGHEST: tl.constexpr, BIASED: tl.constexpr,
    BY_SCORE: tl.constexpr, SHORT: tl.constexpr, RENORMALISE: tl.constexpr,
    EPSILON: tl.constexpr, SCALE: tl.constexpr, ROUNDED: tl.constexpr,
    ROUNDED_RANK: tl.constexpr, FILLED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    low: tl.constexpr = logits_ptr.dtype.element_ty
    size: tl.constexpr = EXPERTS // GROUPS
    room: tl.constexpr = WIDTH // FILLED
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    expert = column // room * size + column % room
    is_expert = (column % room < size) & (column // room < GROUPS)
    real = is_expert[None, :]
    inside = (token < tokens)[:, None] & real
    where = logits_ptr + token[:, None] * EXPERTS + expert[None, :]
    logits = tl.load(where, mask=inside, other=0.0).to(tl.float32)

    ranked = logits
    score = logits
    if SCORE <= _SIGMOID:
        score = _rounded(_score(logits, real, SCORE, EXACT), low, ROUNDED)
    if BY_SCORE:
        ranked = score
        if BIASED:
            bias = tl.load(bias_ptr + expert, mask=is_expert, other=0.0)
            ranked = _rounded(score + bias.to(tl.float32)[None, :], low, ROUNDED_RANK)
    if GROUPS > 1:
        ranked = _in_kept_groups(
            tl.where(real, ranked, float("-inf")), GROUPS, KEPT_GROUPS, TWO_HIGHEST, FILLED, WIDTH,
            BLOCK,
        )  # fmt: skip

    key = _integer(ranked)
    if SHORT:  # value and column in one integer
        key = (key & _PACKED) | (WIDTH - 1 - column)[None, :]
    key = tl.where(real, key, _NONE)
    rank = tl.full((BLOCK, WIDTH), TOP_K, tl.int32)
    for k in range(TOP_K):
        hit = key == tl.max(key, 1)[:, None]
        if not SHORT:
            first = tl.min(tl.where(hit, column[None, :], WIDTH), 1)
            hit = column[None, :] == first[:, None]
        rank = tl.where(hit, k, rank)
        key = tl.where(hit, _NONE, key)

    chosen = rank < TOP_K
    if SCORE > _SIGMOID:
        score = _score(logits, chosen, SCORE, EXACT)
    score = tl.where(chosen, score, 0.0)
    if RENORMALISE:
        total = (tl.sum(score, 1) + EPSILON)[:, None]
        score = _rounded(tl.math.div_rn(score, total), low, ROUNDED)
    if SCALE != 1.0:
        score = _rounded(score * SCALE, low, ROUNDED)
    place = token[:, None] * TOP_K + rank
    inside = inside & chosen
    tl.store(weights_ptr + place, score.to(weights_ptr.dtype.element_ty), mask=inside)
    ids = tl.zeros((BLOCK, WIDTH), tl.int64) + expert[None, :]
    tl.store(ids_ptr + place, ids, mask=inside)


@triton.jit
def _in_kept_groups(
    ranked, GROUPS: tl.constexpr, KEPT_GROUPS: tl.constexpr, TWO_HIGHEST: tl.constexpr,
    FILLED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`ranked`, and -inf in all but each row's best groups."""
    of_group = tl.reshape(ranked, (BLOCK, FILLED, WIDTH // FILLED))
    value = tl.max(of_group, 2)
    if TWO_HIGHEST:
        member = tl.arange(0, WIDTH // FILLED)[None, None, :]
        is_highest = of_group == value[:, :, None]
        first = tl.min(tl.where(is_highest, member, WIDTH), 2)
        others = tl.where(member == first[:, :, None], float("-inf"), of_group)
        value += tl.max(others, 2)
    group = tl.arange(0, FILLED)[None, :]
    key = tl.where(group < GROUPS, _integer(value), _NONE)
    kept = tl.zeros((BLOCK, FILLED), tl.int32)
    for _ in range(KEPT_GROUPS):
        best = tl.min(tl.where(key == tl.max(key, 1)[:, None], group, FILLED), 1)
        hit = group == best[:, None]
        kept = tl.where(hit, 1, kept)
        key = tl.where(hit, _NONE, key)
    return tl.reshape(tl.where(kept[:, :, None] == 1, of_group, float("-inf")), (BLOCK, WIDTH))


@triton.jit
def _gradient(
    logits_ptr, ids_ptr, grad_ptr, d_logits_ptr, tokens,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SCORE: tl.constexpr, RENORMALISE: tl.constexpr,
    EPSILON: tl.constexpr, SCALE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, WIDTH)[None, :]
    inside = (token < tokens)[:, None] & (expert < EXPERTS)
    place = token[:, None] * EXPERTS + expert
    logits = tl.load(logits_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.zeros((BLOCK, WIDTH), tl.float32)
    picked = tl.zeros((BLOCK, WIDTH), tl.int32)
    for k in range(TOP_K):
        id_ = tl.load(ids_ptr + token * TOP_K + k, mask=token < tokens, other=-1).to(tl.int32)
        value = tl.load(grad_ptr + token * TOP_K + k, mask=token < tokens, other=0.0)
        hit = expert == id_[:, None]
        grad = tl.where(hit, value.to(tl.float32)[:, None], grad)
        picked = tl.where(hit, 1, picked)
    chosen = picked == 1
    grad *= SCALE
    among = chosen if SCORE > _SIGMOID else expert < EXPERTS
    score = _score(logits, among, SCORE, EXACT)
    if RENORMALISE:  # w = s / (sum of s + epsilon)
        taken = tl.where(chosen, score, 0.0)
        total = (tl.sum(taken, 1) + EPSILON)[:, None]
        mean = tl.sum(grad * taken, 1)[:, None] / total
        grad = tl.where(chosen, (grad - mean) / total, 0.0)
    if SCORE == _SIGMOID:
        d_logits = grad * score * (1.0 - score)
    else:
        d_logits = score * (grad - tl.sum(tl.where(chosen, grad * score, 0.0), 1)[:, None])
    tl.store(d_logits_ptr + place, d_logits.to(d_logits_ptr.dtype.element_ty), mask=inside)


_start_choose, _start_gradient = Launcher(_choose), Launcher(_gradient)
_EXACT = isinstance(_choose, triton.JITFunction)  # the interpreter has no libdevice


class _Choice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: torch.Tensor, bias_E: torch.Tensor | None, dtype: Any, *parts: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights_TK, ids_TK = _forward(logits_TE, bias_E, dtype, *parts)
        ctx.parts = parts
        ctx.save_for_backward(logits_TE, ids_TK)
        ctx.mark_non_differentiable(ids_TK)
        ctx.set_materialize_grads(False)
        return weights_TK, ids_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TK: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
        return _gradients(ctx, grad_TK, _backward)


def _gradients(ctx: Any, grad_TK: torch.Tensor | None, backward: Any) -> tuple[Any, ...]:
    rest = (None,) * (2 + len(ctx.parts))
    if grad_TK is None:
        return None, *rest
    return backward(grad_TK, *ctx.saved_tensors, *ctx.parts), *rest


# Under torch.compile both passes are opaque operators, as those of the experts are.
_SCHEMA = (
    "int top_k, str score, int groups, int kept_groups, str group_rule, bool renormalise, "
    "float epsilon, float scale, bool rounded"
)
_forward_op = torch.library.custom_op(
    "moesaic::fused_router",
    _forward,
    mutates_args=(),
    schema=f"(Tensor logits, Tensor? bias, ScalarType dtype, {_SCHEMA}) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "moesaic::fused_router_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor logits, Tensor ids, {_SCHEMA}) -> Tensor",
)


@_forward_op.register_fake
def _forward_shapes(
    logits: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, top_k: int, *parts: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    size = logits.shape[0], top_k
    return logits.new_empty(size, dtype=dtype), logits.new_empty(size, dtype=torch.int64)


@_backward_op.register_fake
def _backward_shapes(
    grad: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, *parts: Any
) -> torch.Tensor:
    return torch.empty_like(logits)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits_TE, _, _, *parts = inputs
    ctx.parts = tuple(parts)
    ctx.save_for_backward(logits_TE, output[1])
    ctx.set_materialize_grads(False)


def _backward_through_op(ctx: Any, grad_TK: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
    return _gradients(ctx, grad_TK, torch.ops.moesaic.fused_router_backward)


_forward_op.register_autograd(_backward_through_op, setup_context=_save_for_backward)
