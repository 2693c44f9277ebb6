"""Whole conversations side by side in one row, and what keeps them apart.

    ids_T, labels_T   tokens of a row and what is learned of them (IGNORED: nothing)
    segment_T         number of the conversation a token belongs to, 1, 2, ...; 0 is padding
    position_T        0, 1, ... anew in every conversation, and in the padding

Given position_ids that begin anew, no attention mask and `use_cache=False`, transformers' models
(sdpa, eager) let no token see another conversation. Attention of variable length wants `unpad`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moesaic.core.errors import UserError
from moesaic.data.chat import IGNORED, Conversation

if TYPE_CHECKING:
    import torch


class Row(NamedTuple):
    """Conversations in a row; int64 [T] each, as the module's docstring says."""

    ids: np.ndarray
    labels: np.ndarray
    segment: np.ndarray
    position: np.ndarray


class Unpadded(NamedTuple):
    """Tokens that are no padding, as attention of variable length takes them.

    `indices` (int64 [N]) are their places in the flattened batch; segment s is tokens
    cu_seqlens[s]:cu_seqlens[s + 1] of those (int32 [S + 1]); the longest has `max_seqlen`.
    """

    indices: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int


def first_fit(lengths: Iterable[int], *, limit: int) -> list[list[int]]:
    """Group the items, in their order, so that no group is longer than `limit` in all.

    A group is closed by the first item that does not fit, as in LLaMA-MoE-v2, but never empty.
    Raises UserError for an item longer than `limit`.
    """
    groups: list[list[int]] = []
    room = -1
    for item, length in enumerate(lengths):
        if length > limit:
            raise UserError(
                f"item {item} has {length} tokens but a row holds {limit}. Leave it out, or make "
                "rows longer."
            )
        if length > room:
            groups.append([])
            room = limit
        groups[-1].append(item)
        room -= length
    return groups


def pack(conversations: Sequence[Conversation], *, length: int | None = None, pad: int = 0) -> Row:
    """Put conversations into one row, filled up with the id `pad` to `length` tokens.

    The first label of each is IGNORED: no token of its own comes before it. Raises UserError when
    they are longer than `length`.
    """
    sizes = [len(conversation.ids) for conversation in conversations]
    total = sum(sizes)
    if length is None:
        length = total
    if total > length:
        raise UserError(f"{total} tokens do not fit into a row of {length}. Pack fewer.")
    rest = length - total
    ids = [token for conversation in conversations for token in conversation.ids]
    labels = [
        label
        for conversation in conversations
        for label in [IGNORED] * (len(conversation.labels) > 0) + list(conversation.labels[1:])
    ]
    return Row(
        np.array(ids + [pad] * rest, dtype=np.int64),
        np.array(labels + [IGNORED] * rest, dtype=np.int64),
        np.repeat([*range(1, len(sizes) + 1), 0], [*sizes, rest]).astype(np.int64),
        np.concatenate([np.arange(size, dtype=np.int64) for size in [*sizes, rest]]),
    )


def unpad(segment_BT: torch.Tensor) -> Unpadded:
    """Tell where the segments of a batch are, from their numbers (0 is padding).

    Segments are runs of one number; a row's end ends its last. Unlike LLaMA-MoE-v2's, whose model
    drops a mask without padding and lets conversations see one another, this holds for full rows.
    """
    import torch

    segment_N = segment_BT.flatten()
    indices = segment_N.nonzero().flatten()
    row_N, kept_N = indices // segment_BT.shape[1], segment_N[indices]
    begins_N = torch.ones_like(kept_N, dtype=torch.bool)
    begins_N[1:] = (kept_N.diff() != 0) | (row_N.diff() != 0)
    starts_S = begins_N.nonzero().flatten()
    ends = starts_S.new_tensor([len(indices)])
    cu_seqlens = torch.cat([starts_S, ends]).to(torch.int32)
    longest = int(cu_seqlens.diff().max()) if len(starts_S) else 0
    return Unpadded(indices, cu_seqlens, longest)
