"""Attention whose heads are experts behind a router (LLaMA-MoE-v2, arXiv 2411.15708).

An expert holds one key/value head and the query heads that read it, or a part of them. The router
sends a token to K experts, and an expert's queries see only the earlier tokens that were sent to
the same expert: its keys and values of other tokens do not exist. Positions (RoPE) stay those of
the whole sequence; a sliding window counts the tokens of the expert.

Notation: B batch, S sequence, T = B*S tokens, D hidden size, E experts, K experts a token, H query
heads of one expert, d head size, P the most tokens that any expert has of any sequence, N all
tokens of all experts (at most T*K), L keys of an expert with those cached before.

Tokens are packed to the left, expert by expert and sequence by sequence, so that causal attention
needs no mask: what fills a row up to P comes after every real token. Padding tokens are routed but
belong to no expert.
"""

# transformers' classes are untyped
# mypy: disable-error-code="no-untyped-call, misc"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half

from moesaic.core.errors import UserError
from moesaic.kernels.matmul import ALIGNMENT, why_not_grouped
from moesaic.models.decoder import SoftmaxRouter


class AttentionRouter(SoftmaxRouter):
    """Chooses attention experts: softmax over all, the best K, weights that sum to 1."""

    routes = "attention"

    def __init__(self, hidden: int, experts: int, top_k: int) -> None:
        super().__init__(hidden, experts, top_k, renormalise=True)


class ExpertBias(nn.Module):
    """A bias on every expert's output: `weight` [E, D]."""

    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Sum of the chosen experts' biases, weighted: [T, D]."""
        share_TE = weights_TK.new_zeros(len(ids_TK), len(self.weight))
        return share_TE.scatter(1, ids_TK, weights_TK).to(self.weight.dtype) @ self.weight


@dataclass(frozen=True)
class _Packed:
    """Where the tokens of each expert are.

    N rows are sorted by expert, then sequence, then position. `token_N` is a row's token in T,
    `slot_N` its place in [B, E, P]; `sizes` (host) and `ends_E` count rows
    per expert; `count_BE` counts them per sequence too. `row_TE` is the row of a token at an
    expert, where there is one.
    """

    token_N: torch.Tensor
    slot_N: torch.Tensor
    row_TE: torch.Tensor
    count_BE: torch.Tensor
    ends_E: torch.Tensor
    sizes: list[int]
    longest: int
    """P."""


def pack(member_BSE: torch.Tensor) -> _Packed:
    """Pack tokens by expert, given which expert each token belongs to (bool)."""
    batch, length, experts = member_BSE.shape
    member_EBS = member_BSE.permute(2, 0, 1)
    place_EBS = member_EBS.cumsum(dim=-1) - 1
    count_BE = member_BSE.sum(dim=1)
    counts = count_BE.tolist()  # on a GPU, the one wait for the device
    sizes = [sum(row[e] for row in counts) for e in range(experts)]
    longest = max((count for row in counts for count in row), default=0)
    # the members in order: a stable sort brings them to the front
    flat_N = (~member_EBS).flatten().to(torch.uint8).argsort(stable=True)[: sum(sizes)]
    expert_N, token_N = flat_N // (batch * length), flat_N % (batch * length)
    sequence_N, place_N = token_N // length, place_EBS.flatten()[flat_N]
    row_TE = torch.zeros(batch * length, experts, dtype=torch.long, device=member_BSE.device)
    row_TE[token_N, expert_N] = torch.arange(len(flat_N), device=flat_N.device)
    return _Packed(
        token_N=token_N,
        slot_N=(sequence_N * experts + expert_N) * longest + place_N,
        row_TE=row_TE,
        count_BE=count_BE,
        ends_E=count_BE.sum(dim=0).cumsum(dim=0).to(torch.int32),
        sizes=sizes,
        longest=longest,
    )


class ExpertCacheLayer(DynamicLayer):
    """Keys and values of one layer's attention experts, [B, E, L, d].

    The first `count_BE` of each expert's L entries are real. `get_seq_length` is the number of
    tokens seen, which no expert need hold.
    """

    is_croppable = False
    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.count_BE: torch.Tensor | None = None
        self.longest = 0
        self.seen = 0

    def append(
        self, k_BEPd: torch.Tensor, v_BEPd: torch.Tensor, packed: _Packed
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Add the packed tokens; return keys, values, and how many each expert had before."""
        if self.count_BE is None or self.keys is None:
            self.lazy_initialization(k_BEPd, v_BEPd)
            self.keys, self.values = k_BEPd, v_BEPd
            self.count_BE, self.longest = packed.count_BE, packed.longest
            return k_BEPd, v_BEPd, None
        before_BE = self.count_BE
        self.count_BE = before_BE + packed.count_BE
        room = self.longest + packed.longest
        places_P = torch.arange(packed.longest, device=k_BEPd.device)
        # What fills k up lands after an expert's last real entry, where the next ones overwrite it.
        index_BEPd = (before_BE[..., None] + places_P)[..., None].expand_as(k_BEPd)
        self.longest = int(self.count_BE.max())
        self.keys, self.values = (
            F.pad(old, (0, 0, 0, room - old.shape[2])).scatter(2, index_BEPd, new)[
                :, :, : self.longest
            ]
            for old, new in ((self.keys, k_BEPd), (self.values, v_BEPd))
        )
        return self.keys, self.values, before_BE

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = self.count_BE = None
        self.is_initialized = False
        self.longest = self.seen = 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise UserError(
            "The cache of attention experts cannot be cut back, which assisted generation needs. "
            "Generate without an assistant."
        )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.count_BE is not None:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)
            self.count_BE = self.count_BE.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.count_BE is not None:
            where = indices.to(self.count_BE.device)
            self.keys, self.values = self.keys[where], self.values[where]
            self.count_BE = self.count_BE[where]


def prepare_cache(cache: Any, layers: int) -> Cache:
    """Return a cache that attention experts can use: a new one, or an empty one made so.

    `generate` makes a DynamicCache of its own; while that is empty its layers are exchanged for
    `ExpertCacheLayer`s. Raises UserError for a cache of another kind.
    """
    if cache is None:
        return Cache(layers=[ExpertCacheLayer() for _ in range(layers)])
    if isinstance(cache, Cache) and cache.layers and isinstance(cache.layers[0], ExpertCacheLayer):
        return cache
    if not isinstance(cache, DynamicCache) or cache.get_seq_length() or cache.offloading:
        raise UserError(
            f"A model with attention experts cannot use this {type(cache).__name__}: its cache is "
            "one for each expert. Pass no past_key_values, or those that the model returned, and "
            "no cache_implementation."
        )
    cache.layers = [ExpertCacheLayer() for _ in range(layers)]
    return cache


class ExpertAttention(nn.Module):
    """Attention of `attn_experts` experts, `top_k_attn` a token, each over its own tokens.

    `config` is a LlamaMoEV2Config. The softmax runs as `attn_implementation` says: "eager", or
    torch's scaled dot product attention for every other name.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.gate = AttentionRouter(config.hidden_size, config.attn_experts, config.top_k_attn)
        self.experts = AttentionExperts(config, layer_idx)
        self.output_bias = (
            ExpertBias(config.attn_experts, config.hidden_size) if config.add_rescale_bias else None
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        valid_T: torch.Tensor | None = None,
        document_BS: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the output [B, S, D], the router's logits [T, E] and the ids [T, K].

        `valid_T` (bool) leaves out padding, whose output is 0; `document_BS` keeps documents packed
        into one row from seeing each other.
        """
        batch, length, hidden = hidden_states.shape
        x_TD = hidden_states.reshape(-1, hidden)
        logits_TE, weights_TK, ids_TK = self.gate(x_TD)
        if self.config.scale_factor_attn is not None:
            weights_TK = weights_TK * self.config.scale_factor_attn
        member_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, ids_TK, True)
        if valid_T is not None:
            member_TE = member_TE & valid_T[:, None]
            weights_TK = weights_TK * valid_T[:, None]
        packed = pack(member_TE.view(batch, length, -1))
        if packed.longest == 0:
            y_TD = torch.zeros_like(x_TD)
        else:
            y_ND = self.experts(x_TD, packed, position_embeddings, document_BS, past_key_values)
            y_TKD = y_ND[packed.row_TE.gather(1, ids_TK)]
            # float32: several experts adding into one bf16 token lose bits
            y_TD = (y_TKD * weights_TK.float()[..., None]).sum(dim=1)
        if self.output_bias is not None:
            y_TD = y_TD + self.output_bias(ids_TK, weights_TK)
        if past_key_values is not None:
            cached: Any = past_key_values.layers[self.layer_idx]
            cached.seen += length
        return y_TD.to(hidden_states.dtype).view_as(hidden_states), logits_TE, ids_TK


class AttentionExperts(nn.Module):
    """E attention experts of H query heads and one key/value head.

    `q_proj` [E, H*d, D], `k_proj` and `v_proj` [E, d, D], `o_proj` [E, D, H*d].
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_experts: int = config.attn_experts
        # what transformers' attention functions read of a module; the groups are our H
        self.num_key_value_groups: int = config.num_attention_heads // config.attn_experts
        self.head_dim: int = config.head_dim
        self.scaling: float = self.head_dim**-0.5
        self.is_causal = True
        queries, hidden = self.num_key_value_groups * self.head_dim, config.hidden_size
        self.q_proj = nn.Parameter(torch.empty(self.num_experts, queries, hidden))
        self.k_proj = nn.Parameter(torch.empty(self.num_experts, self.head_dim, hidden))
        self.v_proj = nn.Parameter(torch.empty(self.num_experts, self.head_dim, hidden))
        self.o_proj = nn.Parameter(torch.empty(self.num_experts, hidden, queries))

    def forward(
        self,
        x_TD: torch.Tensor,
        packed: _Packed,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        document_BS: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """Run every expert over its tokens: [N, D], without routing weights."""
        experts, heads, size = self.num_experts, self.num_key_value_groups, self.head_dim
        batch, P = len(packed.count_BE), packed.longest
        x_ND = x_TD[packed.token_N]
        q_NHd = _by_expert(x_ND, self.q_proj, packed).unflatten(1, (heads, size))
        k_Nd = _by_expert(x_ND, self.k_proj, packed)
        v_Nd = _by_expert(x_ND, self.v_proj, packed)
        cos_Nd, sin_Nd = (
            table.expand(batch, -1, -1).flatten(0, 1)[packed.token_N]
            for table in position_embeddings
        )
        q_NHd = q_NHd * cos_Nd[:, None] + rotate_half(q_NHd) * sin_Nd[:, None]
        k_Nd = k_Nd * cos_Nd + rotate_half(k_Nd) * sin_Nd

        slots = batch * experts * P
        q_BEPHd, k_BEPd, v_BEPd = (
            rows.new_zeros(slots, *rows.shape[1:])
            .index_copy(0, packed.slot_N, rows)
            .view(batch, experts, P, *rows.shape[1:])
            for rows in (q_NHd, k_Nd, v_Nd)
        )
        before_BE = None
        if past_key_values is not None:
            layer: Any = past_key_values.layers[self.layer_idx]
            k_BEPd, v_BEPd, before_BE = layer.append(k_BEPd, v_BEPd, packed)
        implementation = "eager" if "eager" in str(self.config._attn_implementation) else "sdpa"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        out, _ = attend(
            self,
            q_BEPHd.flatten(0, 1).transpose(1, 2),
            k_BEPd.flatten(0, 1)[:, None],
            v_BEPd.flatten(0, 1)[:, None],
            self._mask(packed, implementation, document_BS, before_BE, k_BEPd.shape[2], q_NHd),
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        out_NQ = out.reshape(slots, heads * size)[packed.slot_N]
        return _by_expert(out_NQ, self.o_proj, packed)

    def _mask(
        self,
        packed: _Packed,
        implementation: str,
        document_BS: torch.Tensor | None,
        before_BE: torch.Tensor | None,
        keys: int,
        like: torch.Tensor,
    ) -> torch.Tensor | None:
        """Which keys a query sees, [B*E, 1, P, L]; None where plain causal attention says it."""
        window, P = self.config.sliding_window, packed.longest
        plain = before_BE is None and document_BS is None and (window is None or window >= P)
        if plain and implementation != "eager":
            return None
        key_L = torch.arange(keys, device=like.device)
        query_BEP = torch.arange(P, device=like.device).expand(*packed.count_BE.shape, P)
        if before_BE is not None:
            query_BEP = query_BEP + before_BE[..., None]
        # A query that only fills up sees some key too: a row without any would be NaN, and NaN
        # times zero is NaN in the gradients.
        query_BEP = query_BEP.clamp(max=keys - 1)
        seen = key_L <= query_BEP[..., None]
        if window is not None:
            seen = seen & (key_L > query_BEP[..., None] - window)
        if document_BS is not None:
            document_N = document_BS.flatten()[packed.token_N]
            document_BEP = document_N.new_zeros(seen.shape[:2].numel() * P)
            document_BEP = document_BEP.index_copy(0, packed.slot_N, document_N)
            document_BEP = document_BEP.view(*seen.shape[:2], P)
            seen = seen & (document_BEP[..., None] == document_BEP[..., None, :])
        mask = seen.flatten(0, 1)[:, None]
        if implementation == "eager":
            lowest = torch.finfo(like.dtype).min
            return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(
                ~mask, lowest
            )
        return mask


def _by_expert(rows_NP: torch.Tensor, weight_EQP: torch.Tensor, packed: _Packed) -> torch.Tensor:
    """Multiply the rows of each expert by its matrix: [N, Q]."""
    device = rows_NP.device
    refused = (
        torch.compiler.is_compiling()  # a traced tensor has no address
        or torch.is_autocast_enabled(device.type)
        or rows_NP.dtype != weight_EQP.dtype
        or weight_EQP.data_ptr() % ALIGNMENT
        or why_not_grouped(rows_NP.dtype, device, tuple(weight_EQP.shape[1:])) is not None
    )
    if not refused:
        return F.grouped_mm(rows_NP, weight_EQP.transpose(1, 2), offs=packed.ends_E)
    parts = zip(rows_NP.split(packed.sizes), weight_EQP, strict=True)
    return torch.cat([F.linear(part, weight) for part, weight in parts])
