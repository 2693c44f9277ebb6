"""Routing as arrays: the experts that each token of some samples chose, checked and compact.

Notation: N samples, T tokens of the longest sample, L layers, K experts a token, E experts a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesaic.core.errors import UserError
from moesaic.routing.compiled import compiled

__all__ = ["Samples", "Space", "choose", "read_samples"]

MOST_EXPERTS = 32_767  # ids are kept as int16


@dataclass(frozen=True)
class Space:
    """What a metric counts over: experts of a layer, layers, and the names of the domains."""

    num_experts: int
    layers: int = 1
    domains: tuple[str, ...] = ("all",)


@dataclass(frozen=True, eq=False)
class Samples:
    """A block of samples. Entries past a sample's length, and dropped choices, are -1.

    The optional arrays have one entry a token, at the same places as `experts_NTLK`.
    """

    experts_NTLK: NDArray[np.int16]
    lengths_N: NDArray[np.int64]
    num_experts: int
    layered: bool = True
    """False when the ids were given without an axis of layers."""
    weights_NTLK: NDArray[np.float32] | None = None
    """Gate weights of the choices."""
    tokens_NT: NDArray[np.int64] | None = None
    """Ids of the tokens read; -1 past the end."""
    predicted_NT: NDArray[np.int64] | None = None
    """Ids that the model finds most likely to come next."""
    domain_N: NDArray[np.int64] | None = None
    """Number of each sample's domain; None: all are of domain 0."""
    index_N: NDArray[np.int64] | None = None
    """Number of each sample inside its domain, for bootstrap weights; None: in order of arrival."""

    def __len__(self) -> int:
        return len(self.lengths_N)

    @property
    def layers(self) -> int:
        """L."""
        return int(self.experts_NTLK.shape[2])

    def take(self, rows: NDArray[np.int64]) -> Samples:
        """Return some of the samples (all of them, in order: no copy)."""
        if len(rows) == len(self) and np.array_equal(rows, np.arange(len(self))):
            return self

        def some(array: Any) -> Any:
            return None if array is None else np.ascontiguousarray(array[rows])

        return Samples(
            some(self.experts_NTLK),
            some(self.lengths_N),
            self.num_experts,
            self.layered,
            some(self.weights_NTLK),
            some(self.tokens_NT),
            some(self.predicted_NT),
            some(self.domain_N),
            some(self.index_N),
        )


def read_samples(
    experts: ArrayLike | Sequence[ArrayLike],
    *,
    num_experts: int,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    tokens: ArrayLike | None = None,
    predicted: ArrayLike | None = None,
    domain: ArrayLike | None = None,
    index: ArrayLike | None = None,
) -> Samples:
    """Check the experts that tokens chose and return them as `Samples`.

    `experts` holds integers, [samples, tokens, layers, k] or [samples, tokens, k], the highest
    score first; or is a list of arrays [tokens, layers, k] or [tokens, k] of different lengths.
    A negative id is a choice that was dropped: it is skipped, its token stays. `mask` [samples,
    tokens] is true where a token counts: others are taken out as if they had not been there.
    `lengths` [samples] says how many tokens at the start of each sample count. With neither, tokens
    without any id at the end of a sample are padding. An expert that a token names twice counts
    once.

    Raises UserError for anything but integers, an id of num_experts or more, wrong shapes, and
    samples in which no token counts.
    """
    if not isinstance(num_experts, (int, np.integer)) or not 1 <= num_experts <= MOST_EXPERTS:
        raise UserError(
            f"num_experts={num_experts!r} was given. Give the number of experts of a layer, "
            f"1 to {MOST_EXPERTS}."
        )
    if isinstance(experts, (list, tuple)):
        experts, found_N = _stack(experts)
        if found_N is not None and (lengths is not None or mask is not None):
            raise UserError(
                "mask or lengths was given with samples of different lengths. They say themselves "
                "how long they are; to leave tokens out of them, give one array and a mask."
            )
        lengths = found_N if lengths is None else lengths
    ids = np.asarray(experts)
    if ids.size == 0:
        raise UserError(f"experts is empty: its shape is {ids.shape}. Give at least one token.")
    if ids.dtype.kind not in "iu":
        raise UserError(
            f"experts has the dtype {ids.dtype}. Give the ids of the chosen experts as integers, "
            "[samples, tokens, layers, k] or [samples, tokens, k]."
        )
    if ids.ndim not in (3, 4):
        raise UserError(
            f"experts has the shape {ids.shape}. Give [samples, tokens, layers, k] or "
            "[samples, tokens, k]."
        )
    layered = ids.ndim == 4
    shape_NTLK = ids.shape if layered else (*ids.shape[:2], 1, ids.shape[2])
    least, most = int(ids.min()), int(ids.max())
    if most >= num_experts:
        raise UserError(
            f"experts holds the id {most}, but num_experts={num_experts} allows 0 to "
            f"{num_experts - 1}. Give the number of experts of the model that was recorded."
        )
    if least < -1:
        ids = np.maximum(ids, -1)
    ids_NTLK = np.ascontiguousarray(ids.reshape(shape_NTLK), dtype=np.int16)
    if _repeats(ids_NTLK.reshape(-1, shape_NTLK[3])):
        ids_NTLK = ids_NTLK.copy()  # it may be the caller's
        _drop_repeats(ids_NTLK.reshape(-1, shape_NTLK[3]))
    count, length = shape_NTLK[:2]
    counts_NT = _counting(ids_NTLK, least < 0, mask, lengths)
    lengths_N = np.full(count, length) if counts_NT is None else counts_NT.sum(1)
    if not lengths_N.any():
        raise UserError("no token counts: every one is masked or has no expert. Give some tokens.")

    def at_tokens(name: str, values: ArrayLike | None, shape: tuple[int, ...], fill: Any) -> Any:
        if values is None:
            return None
        array = np.asarray(values)
        if array.shape not in (shape, shape[:2] + shape[3:]):
            raise UserError(f"{name} has the shape {array.shape}, but experts asks for {shape}.")
        array = array.reshape(shape)
        return array if counts_NT is None else _compact(array, counts_NT, fill)

    if counts_NT is not None:
        ids_NTLK = _compact(ids_NTLK, counts_NT, -1)
    weights_NTLK = at_tokens("weights", weights, shape_NTLK, 0)
    return Samples(
        ids_NTLK,
        lengths_N.astype(np.int64),
        int(num_experts),
        layered,
        None if weights_NTLK is None else weights_NTLK.astype(np.float32),
        _as_ids("tokens", at_tokens("tokens", tokens, shape_NTLK[:2], -1)),
        _as_ids("predicted", at_tokens("predicted", predicted, shape_NTLK[:2], -1)),
        _each_sample("domain", domain, count),
        _each_sample("index", index, count),
    )


def choose(scores: ArrayLike, top_k: int) -> NDArray[np.int16]:
    """Return the ids of the top_k largest scores [..., E], highest first: int16 [..., top_k].

    Among equal scores the larger id ranks higher, as in the programs of the routing study.
    """
    values = np.asarray(scores)
    if not 1 <= top_k <= values.shape[-1]:
        raise UserError(
            f"top_k={top_k} was asked of {values.shape[-1]} scores. Use 1 to {values.shape[-1]}."
        )
    return np.argsort(values, axis=-1, kind="stable")[..., : -top_k - 1 : -1].astype(np.int16)


def _stack(samples: Sequence[ArrayLike]) -> tuple[NDArray[Any], NDArray[np.int64] | None]:
    """One array of all samples, and their lengths where they differ."""
    arrays = [np.asarray(sample) for sample in samples]
    if len({array.shape for array in arrays}) <= 1:
        return np.asarray(arrays), None
    kinds = {(array.shape[1:], array.dtype.kind in "iu") for array in arrays}
    if len(kinds) > 1 or arrays[0].ndim not in (2, 3) or arrays[0].dtype.kind not in "iu":
        raise UserError(
            "experts is a list, but not of integer arrays that differ in length only: "
            f"{sorted({f'{array.dtype} {array.shape}' for array in arrays})}. "
            "Give arrays [tokens, layers, k] or [tokens, k]."
        )
    lengths_N = np.array([len(array) for array in arrays])
    stacked = np.full((len(arrays), lengths_N.max(), *arrays[0].shape[1:]), -1, dtype=np.int64)
    for row, array in zip(stacked, arrays, strict=True):
        row[: len(array)] = array
    return stacked, lengths_N


def _counting(
    ids_NTLK: NDArray[np.int16], dropped: bool, mask: ArrayLike | None, lengths: ArrayLike | None
) -> NDArray[np.bool_] | None:
    """Which tokens count, [N, T]; None when all do."""
    shape = ids_NTLK.shape[:2]
    if mask is not None and lengths is not None:
        raise UserError("mask and lengths were both given. Give one of them.")
    if mask is not None:
        kept_NT = np.asarray(mask)
        if kept_NT.shape != shape:
            raise UserError(f"mask has the shape {kept_NT.shape}, but experts asks for {shape}.")
        return None if kept_NT.all() else kept_NT.astype(bool)
    if lengths is not None:
        lengths_N = np.asarray(lengths)
        if lengths_N.shape != shape[:1] or lengths_N.dtype.kind not in "iu":
            raise UserError(
                f"lengths is {lengths_N.dtype} {lengths_N.shape}. Give {shape[0]} integers."
            )
        if lengths_N.min() < 0 or lengths_N.max() > shape[1]:
            raise UserError(
                f"lengths reaches from {lengths_N.min()} to {lengths_N.max()}, but the samples "
                f"have {shape[1]} tokens. Use 0 to {shape[1]}."
            )
    elif not dropped:
        return None
    else:
        some_NT = np.any(ids_NTLK >= 0, axis=(2, 3))
        lengths_N = np.where(some_NT.any(1), shape[1] - some_NT[:, ::-1].argmax(1), 0)
    if (lengths_N == shape[1]).all():
        return None
    return np.asarray(np.arange(shape[1]) < lengths_N[:, None])


def _compact(values: NDArray[Any], kept_NT: NDArray[np.bool_], fill: int) -> NDArray[Any]:
    """Move the tokens that count to the front, in order, and put `fill` behind them."""
    to_NT = np.argsort(~kept_NT, axis=1, kind="stable")
    index = to_NT.reshape(to_NT.shape + (1,) * (values.ndim - 2))
    moved = np.take_along_axis(values, index, axis=1)
    past_NT = np.arange(kept_NT.shape[1]) >= kept_NT.sum(1)[:, None]
    if moved.dtype.kind == "u" and fill < 0:
        moved = moved.astype(np.int64)
    moved[past_NT] = fill
    return np.ascontiguousarray(moved[:, : max(1, int(kept_NT.sum(1).max()))])


def _as_ids(name: str, values: Any) -> Any:
    if values is None:
        return None
    if values.dtype.kind not in "iu":
        raise UserError(f"{name} has the dtype {values.dtype}. Give token ids as integers.")
    return values.astype(np.int64)


def _each_sample(name: str, values: ArrayLike | None, count: int) -> Any:
    if values is None:
        return None
    array = np.asarray(values)
    if array.shape != (count,) or array.dtype.kind not in "iu" or (count and array.min() < 0):
        raise UserError(f"{name} must be {count} whole numbers, one a sample, from 0 on.")
    return array.astype(np.int64)


@compiled
def _repeats(ids_RK):  # type: ignore[no-untyped-def]
    found = 0
    for row in range(ids_RK.shape[0]):
        for k in range(1, ids_RK.shape[1]):
            for earlier in range(k):
                found += (ids_RK[row, earlier] == ids_RK[row, k]) & (ids_RK[row, k] >= 0)
    return found > 0


@compiled
def _drop_repeats(ids_RK):  # type: ignore[no-untyped-def]
    for row in range(ids_RK.shape[0]):
        for k in range(1, ids_RK.shape[1]):
            for earlier in range(k):
                if ids_RK[row, earlier] == ids_RK[row, k]:
                    ids_RK[row, k] = -1
                    break
