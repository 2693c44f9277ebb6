"""The mixture of any dense family: its own transformers layers, with experts for the MLP.

`text_config` is the dense model's config. transformers' class of that family is built from it and
only `mlp` of each layer is exchanged, so attention, norms, soft-capping, embedding scales and
position rules are the family's, whatever they are. Tensor names are the dense model's, and
`mlp.gate.weight`, `mlp.experts.{e}.{gate,up,down}_proj.weight`, `mlp.shared_experts.*`.

Notation: T tokens, D hidden size, E experts, K experts a token.
"""

# transformers' base classes, decorators and re-exports are untyped
# mypy: disable-error-code="no-untyped-call, untyped-decorator, attr-defined, misc"

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import can_return_tuple

from moesaic.core.errors import UserError, unknown
from moesaic.kernels.router import Scheme
from moesaic.models.balance import layer_balance, pooled_balance
from moesaic.models.decoder import Decision, DenseMLP, Experts, Router
from moesaic.models.family import Family
from moesaic.models.gates import near_one, start_at_one, tempered
from moesaic.models.layouts import qwen_layout
from moesaic.models.padding import share_of_step, valid_tokens
from moesaic.models.pretrained import PreTrainedMoE
from moesaic.models.selects import check_selects, selects_of

# What transformers checks and completes in every config that has it; text_config does so itself.
_TEXT_ONLY = ("rope_parameters", "rope_scaling", "rope_theta", "layer_types")

Weighting = Literal["softmax", "renormalised", "sigmoid", "one", "learned", "tempered"]
LEARNED = {"learned": near_one, "tempered": tempered}
"""The weightings that start at 1, with a learned `scale`."""


class MoesaicMoeConfig(PreTrainedConfig):
    """A dense model's config and the mixture that stands for its MLP.

    Attributes that are not named here are looked up in `text_config`.

    Raises UserError (a ValueError) for sizes that do not fit together.
    """

    model_type = "moesaic_moe"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "aux_loss"]

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    """The dense model's config, with its model_type."""
    num_experts: int = 8
    """Routed experts of a layer."""
    num_experts_per_tok: int | list[int] = 2
    """Routed experts a token uses: one number, or one for each layer."""
    moe_intermediate_size: int | None = None
    """Width of a routed expert; the dense width / num_experts by default."""
    shared_expert_intermediate_size: int = 0
    """Width of the always-on part beside the routed experts; 0: none."""
    weighting: Weighting = "softmax"
    """What the K chosen experts' outputs are multiplied with, before `routed_scaling_factor`.

    softmax: their probabilities among all E; renormalised: those divided by their sum; sigmoid: of
    their logits; one: 1; learned: 1 + u_e * probability, u [E] a weight of the router (0 at
    first); tempered: K times the softmax of 10 u times the chosen ones' logits, u [1].
    """
    routed_scaling_factor: float | list[float] = 1.0
    """Factor on the chosen experts' sum: one, or one for each layer."""
    router_bias: bool = False
    """A bias that is added to the router's logits."""
    router_aux_loss_coef: float = 0.001
    balance_form: Literal["pooled", "layer"] = "pooled"
    """Balance loss over the rows of all layers together, or the mean of the layers' own."""
    output_router_logits: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        text = self.text_config
        if text is None:
            text = {"model_type": "llama"}
        if not isinstance(text, PreTrainedConfig):
            fields = dict(text)
            kind = fields.pop("model_type", None)
            if kind not in CONFIG_MAPPING:
                raise UserError(
                    f"text_config names the model_type {kind!r}, which transformers does not have. "
                    "Give the config of a dense model."
                )
            text = CONFIG_MAPPING[kind](**fields)
        self.text_config = text
        self.tie_word_embeddings = bool(getattr(text, "tie_word_embeddings", False))
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = max(1, text.intermediate_size // self.num_experts)
        super().__post_init__(**kwargs)
        self.check_selects()
        if self.weighting not in get_args(Weighting):
            raise unknown("weighting", self.weighting, get_args(Weighting))
        factors = self.routed_scaling_factor
        if isinstance(factors, list) and len(factors) != text.num_hidden_layers:
            raise UserError(
                f"routed_scaling_factor has {len(factors)} numbers for {text.num_hidden_layers} "
                "layers. Give one number, or one for each layer."
            )

    def __getattr__(self, name: str) -> Any:
        # only what is not found here; dunder and private names belong to this object alone
        text = self.__dict__.get("text_config")
        if name.startswith("_") or not isinstance(text, PreTrainedConfig) or name in _TEXT_ONLY:
            raise AttributeError(name)
        if name == "hidden_act" and not hasattr(text, name):
            name = "hidden_activation"
        return getattr(text, name)

    def check_selects(self) -> None:
        """Raise UserError unless every layer has 1 to num_experts of them."""
        text: Any = self.text_config
        check_selects(
            "num_experts_per_tok",
            self.num_experts_per_tok,
            layers=text.num_hidden_layers,
            experts=self.num_experts,
            advice=f"Give 1 to {self.num_experts}.",
        )

    def selects(self, layer: int) -> int:
        """Routed experts a token uses in a layer."""
        return selects_of(self.num_experts_per_tok, layer)

    def scaling_of(self, layer: int) -> float:
        """The factor on the routed experts' sum of one layer."""
        factors = self.routed_scaling_factor
        return float(factors[layer] if isinstance(factors, list) else factors)


class MoesaicRouter(Router):
    """The linear router of one layer, with the weighting that the config names."""

    def __init__(self, config: MoesaicMoeConfig, layer: int) -> None:
        text: Any = config.text_config
        super().__init__(text.hidden_size, config.num_experts, config.selects(layer))
        self.weighting = config.weighting
        nn.init.normal_(self.weight, std=_std(text))
        # named parameters only where the config asks for them, so that files hold no idle tensors
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.router_bias else None
        self.scale: nn.Parameter | None = None
        if config.weighting in LEARNED:
            self.scale = nn.Parameter(start_at_one(config.weighting, config.num_experts))
        self.layer = layer

    def score(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Logits [T, E]."""
        return torch.nn.functional.linear(x_TD, self.weight, self.bias)

    def choose(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids [T, K], the highest logit first. Probabilities are float32."""
        if self.weighting == "sigmoid":
            weights_TK, ids_TK = logits_TE.float().sigmoid().topk(self.top_k, dim=-1)
            return weights_TK, ids_TK
        probs_TE = logits_TE.softmax(-1, dtype=torch.float32)
        weights_TK, ids_TK = probs_TE.topk(self.top_k, dim=-1)
        if self.weighting == "renormalised":
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        elif self.weighting == "one":
            weights_TK = torch.ones_like(weights_TK)
        elif self.scale is not None:
            weights_TK = LEARNED[self.weighting](logits_TE, self.scale, ids_TK)
        return weights_TK, ids_TK

    def scheme(self) -> Scheme | str:
        """What `choose` does, for `kernels.fuse_routers`, or why it is not fused."""
        if self.weighting in ("one", *LEARNED):
            return f"its weighting is '{self.weighting}'"
        if self.weighting == "sigmoid":
            return Scheme(self.top_k, "sigmoid")
        return Scheme(self.top_k, renormalise=self.weighting == "renormalised")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weighting={self.weighting}"


class Tape:
    """Where the routers of one model leave their decisions during a forward pass."""

    def __init__(self) -> None:
        self.decisions: list[Decision] | None = None


class MoesaicBlock(nn.Module):
    """What stands for `mlp`: `gate` chooses, `experts` run, `shared_experts` are always added."""

    def __init__(self, config: MoesaicMoeConfig, layer: int, tape: Tape) -> None:
        super().__init__()
        text: Any = config.text_config
        assert config.moe_intermediate_size is not None
        self.gate = MoesaicRouter(config, layer)
        # through the mixture's config: it names the activation and the experts' implementation
        self.experts = Experts(
            config, experts=config.num_experts, width=config.moe_intermediate_size
        )
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=_std(text))
        if config.shared_expert_intermediate_size:
            self.shared_experts = DenseMLP(config, config.shared_expert_intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.scaling = config.scaling_of(layer)
        self._tape = tape

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """What the layer adds, [B, S, D]."""
        x_TD = x_BSD.flatten(0, -2)
        decision = self.gate(x_TD)
        # During gradient checkpointing's second run there is no tape: decisions count once.
        if self._tape.decisions is not None:
            self._tape.decisions.append(decision)
        weights_TK = decision.weights
        if self.scaling != 1:
            weights_TK = weights_TK * self.scaling
        y_BSD: torch.Tensor = self.experts(x_TD, decision.ids, weights_TK).view_as(x_BSD)
        if hasattr(self, "shared_experts"):
            y_BSD = y_BSD + self.shared_experts(x_BSD)
        return y_BSD


class MoesaicMoePreTrainedModel(PreTrainedMoE):
    """What every class of this family has."""

    config: MoesaicMoeConfig
    config_class = MoesaicMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq$"]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True


class MoesaicMoeForCausalLM(MoesaicMoePreTrainedModel, GenerationMixin):
    """The language model: transformers' dense class with experts for its MLPs."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoesaicMoeConfig) -> None:
        super().__init__(config)
        config.check_selects()  # it may have been changed since the config was made
        text: Any = config.text_config
        dense_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
        dense = dense_class._from_config(text)
        tape = Tape()
        for index, layer in enumerate(dense.model.layers):
            layer.mlp = MoesaicBlock(config, index, tape).to(_place_of(layer.mlp))
        self.model = dense.model
        self.lm_head = dense.lm_head
        self.vocab_size = text.vocab_size
        self._no_split_modules = list(dense.model._no_split_modules or ())
        self._dense_class, self._tape = dense_class, tape
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Run the model; every other argument is the dense family's.

        With `output_router_logits` (or the config's), `router_logits` are the layers' [T, E],
        `aux_loss` is the balance loss before its coefficient, and it is part of `loss`.
        """
        wanted = self.config.output_router_logits
        if output_router_logits is not None:
            wanted = output_router_logits
        self._tape.decisions = [] if wanted else None
        try:
            # The family's own head: its soft-capping and scales are not repeated here. It reads
            # model, lm_head, vocab_size, loss_function and config, all of which are its own.
            out: Any = self._dense_class.forward(
                self,
                input_ids=input_ids,
                attention_mask=attention_mask,
                labels=labels,
                inputs_embeds=inputs_embeds,
                return_dict=True,
                **kwargs,
            )
            decisions = self._tape.decisions or []
        finally:
            self._tape.decisions = None
        loss, aux_loss = out.loss, None
        if decisions:
            given = input_ids if inputs_embeds is None else inputs_embeds
            assert given is not None
            aux_loss = self.balance_loss(decisions, _valid(attention_mask, given))
            if loss is not None:
                assert labels is not None
                share = share_of_step(labels, kwargs.get("num_items_in_batch"))
                added = aux_loss * self.config.router_aux_loss_coef * share
                loss = loss + added.to(loss.device)
        logits: Any = tuple(d.logits for d in decisions) if decisions else None
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            router_logits=logits,
        )

    def balance_loss(self, decisions: list[Decision], valid_T: torch.Tensor | None) -> torch.Tensor:
        """The balance loss of all layers before its coefficient (scalar float32).

        Raises UserError when gradient checkpointing lost the routers' gradient.
        """
        if self.training and torch.is_grad_enabled() and not decisions[0].logits.requires_grad:
            trained = any(p.requires_grad for n, p in self.named_parameters() if ".gate." in n)
            if trained and getattr(self.model, "gradient_checkpointing", False):
                raise UserError(
                    "Gradient checkpointing with use_reentrant=True loses the gradient of the "
                    "balance loss. Call gradient_checkpointing_enable("
                    'gradient_checkpointing_kwargs={"use_reentrant": False}).'
                )
        logits, ids = [d.logits for d in decisions], [d.ids for d in decisions]
        if self.config.balance_form == "pooled":
            return pooled_balance(logits, ids, valid_T)
        losses = [layer_balance(*layer, valid_T) for layer in zip(logits, ids, strict=True)]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    def prepare_inputs_for_generation(
        self, input_ids: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As the dense families do; without router logits unless asked for."""
        cache = kwargs.get("past_key_values")
        switch = getattr(self.config.text_config, "original_max_position_embeddings", None)
        if cache is not None and switch and input_ids.shape[1] > switch >= cache.get_seq_length():
            # longrope (Phi-3) changes the position rule here, so earlier keys are computed again
            kwargs |= {"past_key_values": None, "next_sequence_length": None}
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        inputs.setdefault("output_router_logits", False)
        return inputs


def _valid(mask: torch.Tensor | None, given: torch.Tensor) -> torch.Tensor | None:
    if not isinstance(mask, torch.Tensor):
        return None
    return valid_tokens(mask, given if given.dim() == 3 else given.unsqueeze(-1))


def _place_of(module: nn.Module) -> Any:
    first = next(module.parameters())
    return first.device if first.device.type == "meta" else first.dtype


def _std(config: Any) -> float:
    return float(getattr(config, "initializer_range", 0.02))


FAMILY = Family(
    config=MoesaicMoeConfig,
    models={"AutoModelForCausalLM": MoesaicMoeForCausalLM},
    conversion=qwen_layout,
    harmless=("rotary_emb.inv_freq",),
)
