"""Which tokens of a batch count, where a sequence ends, and a call's share of an optimizer step.

B batch, S sequence, T = B*S tokens.
"""

from __future__ import annotations

import torch

from moesaic.core.errors import UserError


def valid_tokens(
    attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor
) -> torch.Tensor | None:
    """Which of the present tokens are not padding: bool [T], or None when nothing says so.

    `attention_mask` [B, past + S] (a 4-D or other mask says nothing); `inputs_embeds` [B, S, D].
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    batch, length = inputs_embeds.shape[:2]
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        return None
    return attention_mask[:, -length:].to(inputs_embeds.device).bool().flatten()


def share_of_step(labels: torch.Tensor, items: int | torch.Tensor | None) -> torch.Tensor | float:
    """Return this call's share of the targets of an optimizer step that has `items` of them.

    `labels` [B, S] are shifted by the caller's loss; -100 is no target. 1 when `items` is None.
    """
    if items is None:
        return 1.0
    if isinstance(items, torch.Tensor):
        items = items.to(labels.device)
    return (labels[..., 1:] != -100).sum() / items


def last_tokens(
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    hidden: torch.Tensor,
    *,
    pad_token_id: int | None,
) -> torch.Tensor:
    """Position of each sequence's last token: int64 [B]; padding may be on either side.

    The last 1 of `attention_mask` [B, S], else the last id that is not `pad_token_id`, else the
    last position. Raises UserError for several sequences of which nothing says where they end.
    """
    batch, length = hidden.shape[:2]
    if attention_mask is not None and attention_mask.dim() == 2:
        present_BS = attention_mask[:, -length:] != 0
    elif input_ids is not None and pad_token_id is not None:
        present_BS = input_ids != pad_token_id
    else:
        if batch > 1 and input_ids is not None:
            raise UserError(
                "A batch of several sequences needs an attention_mask or config.pad_token_id "
                "to tell where each one ends."
            )
        return torch.full((batch,), length - 1, device=hidden.device)
    place_S = torch.arange(length, device=hidden.device)
    return (place_S * present_BS.to(hidden.device)).argmax(dim=-1)
