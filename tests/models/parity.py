"""Checks that a family computes what its original program computed, on `golden/families` fixtures.

A test file describes its fixtures once and calls the checks it wants::

    FIXTURES = [Parity("deepseek_moe", balance={"aux_loss_alpha": 0.1}, ordered=False)]

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("fixture", FIXTURES, ids=str)
    def test_parity(fixture, implementation):
        fixture.check_cases(implementation)
        fixture.check_generation(implementation)

    @pytest.mark.parametrize("fixture", FIXTURES, ids=str)
    def test_saved(fixture, tmp_path):
        fixture.check_round_trip(tmp_path)
        ...

Models are built by `moesaic.load` unless `cls` is given. Routers are the modules with
`is_moe_router = True`, or those of transformers that give (logits, weights, index); what they give
is caught by forward hooks. Rows = batch x sequence flattened; E experts, K experts a token.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moesaic
from tests.models.golden import FAMILIES, family
from tests.models.tiny import SHAPE

IMPLEMENTATIONS = ("eager", "grouped_mm", "moesaic")
CLOSE = {"atol": 1e-4, "rtol": 0}
_NATIVE = re.compile(r"Top[kK]Router$")
_COMPUTED = ("rotary_emb.inv_freq",)  # in old files, never read nor written


class Routing(NamedTuple):
    """What a router decided: logits [rows, E], weights and ids [rows, K], kept [rows, K] or None.

    `weights` are final gate weights before any scale factor; `kept` is False where a choice was
    dropped by capacity.
    """

    logits: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    kept: torch.Tensor | None = None


Read = Callable[[nn.Module, Any], Routing]


def as_routing(router: nn.Module, output: Any) -> Routing:
    """Read the output of a router that keeps the protocol of this project."""
    return Routing(*output[:4])


@dataclass(frozen=True)
class Parity:
    """One fixture, and how its family is built and compared."""

    name: str
    cls: type[PreTrainedModel] | None = None
    """Build with this class; None: whatever `moesaic.load` chooses."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Config values of every model built (a compatibility switch, for example)."""
    balance: Mapping[str, Any] = field(default_factory=dict)
    """Config values that switch the balance loss on."""
    balance_of: str | None = "aux_loss"
    """Field of the model's output that holds the balance loss; None: the family has none."""
    ordered: bool = True
    """Whether the order inside a row of chosen experts means something."""
    loss: bool = True
    """Whether `plain/loss` is comparable."""
    read: Read = as_routing
    """Reads a router's output."""
    routers: Callable[[nn.Module], dict[str, nn.Module]] | None = None
    """Finds the routers: what comes before "router_logits" in the fixture's keys and the layer,
    as in "/3", "attn_/3", "enc_/1" (prefix, slash, layer)."""

    def __str__(self) -> str:
        return self.name

    @property
    def directory(self) -> Path:
        return FAMILIES / self.name

    # ------------------------------------------------------------------ building

    def build(self, implementation: str = "moesaic", **options: Any) -> PreTrainedModel:
        """Load the fixture's checkpoint in eval mode; `options` are config values."""
        return self.load(
            self.directory, experts_implementation=implementation, **{**self.options, **options}
        )

    def load(self, directory: Path, **options: Any) -> PreTrainedModel:
        if self.cls is None:
            return moesaic.load(directory, dtype=torch.float32, **options)
        model = self.cls.from_pretrained(directory, dtype=torch.float32, **options)
        return model.eval()

    def found_routers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The routers by "prefix/layer" (see `routers`)."""
        if self.routers is not None:
            return self.routers(model)
        found: dict[str, nn.Module] = {}
        for path, module in model.named_modules():
            native = _NATIVE.search(type(module).__name__)
            if not (getattr(module, "is_moe_router", False) or native):
                continue
            layers = re.findall(r"\.(\d+)(?=\.)", f".{path}.")
            prefix = "attn_" if getattr(module, "routes", "mlp") == "attention" else ""
            if ".encoder." in f".{path}":
                prefix = "enc_"
            elif ".decoder." in f".{path}":
                prefix = "dec_"
            assert f"{prefix}/{layers[0]}" not in found, path
            found[f"{prefix}/{layers[0]}"] = module
        assert found, f"{type(model).__name__} has no router with is_moe_router = True"
        return found

    @contextlib.contextmanager
    def routed(self, model: nn.Module) -> Iterator[dict[str, Routing]]:
        """Catch what the routers decide in the last forward pass inside the block."""
        seen: dict[str, Routing] = {}

        def hook(key: str) -> Callable[..., None]:
            def keep(module: nn.Module, _: Any, output: Any) -> None:
                routing = self.read(module, output)
                seen[key] = Routing(*(None if x is None else x.detach() for x in routing))

            return keep

        handles = [
            module.register_forward_hook(hook(key))
            for key, module in self.found_routers(model).items()
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    # ------------------------------------------------------------------ inputs

    def cases(self) -> list[str]:
        """The cases that the fixture has logits of: plain, right and left padded."""
        _, expected = family(self.name)
        return [case for case in ("plain", "right", "left") if f"{case}/logits" in expected]

    def inputs(self, case: str = "plain") -> dict[str, torch.Tensor]:
        """Arguments of the forward pass of a case, without labels."""
        arrays, _ = family(self.name)
        prefix = "" if case == "plain" else f"{case}_"
        given = {"input_ids": arrays[f"{prefix}input_ids"]}
        if f"{prefix}attention_mask" in arrays:
            given["attention_mask"] = arrays[f"{prefix}attention_mask"]
        if "decoder_input_ids" in arrays:
            given["decoder_input_ids"] = arrays["decoder_input_ids"]
        return given

    def labels(self) -> torch.Tensor:
        arrays, _ = family(self.name)
        return arrays["labels"] if "labels" in arrays else arrays["input_ids"]

    # ------------------------------------------------------------------ checks

    def check_cases(
        self, implementation: str, *, cases: list[str] | None = None, **options: Any
    ) -> None:
        """Logits, router logits, chosen experts and weights of every case; the plain loss."""
        _, expected = family(self.name)
        model = self.build(implementation, **options)
        assert model.config._experts_implementation == implementation
        for case in cases or self.cases():
            given = self.inputs(case)
            with self.routed(model) as routed, torch.no_grad():
                logits = model(**given).logits
            mask = given.get("attention_mask")
            ids = given["input_ids"]
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            tokens = real if "decoder_input_ids" not in given else ...
            wanted = expected[f"{case}/logits"]
            torch.testing.assert_close(logits[tokens], wanted[tokens], **CLOSE)
            self._check_routing(case, expected, routed, real.flatten())
        if self.loss and "plain/loss" in expected:
            with torch.no_grad():
                loss = model(**self.inputs(), labels=self.labels()).loss
            torch.testing.assert_close(loss, expected["plain/loss"][0], **CLOSE)

    def _check_routing(
        self,
        case: str,
        expected: Mapping[str, torch.Tensor],
        routed: Mapping[str, Routing],
        real: torch.Tensor,
    ) -> None:
        keys = {k for k in expected if k.startswith(f"{case}/") and "router_logits/" in k}
        assert len(keys) == len(routed), (sorted(keys), sorted(routed))
        for where, routing in routed.items():
            prefix, layer = where.split("/")
            if prefix in ("enc_", "dec_"):
                names = (f"{prefix}router_logits", f"topk_idx_{prefix[:3]}")
                names += (f"topk_weight_{prefix[:3]}",)
            else:
                names = tuple(prefix + n for n in ("router_logits", "topk_idx", "topk_weight"))
            logits, ids, weights = (expected[f"{case}/{name}/{layer}"] for name in names)
            experts = logits.shape[-1]
            logits, ids = logits.reshape(-1, experts), ids.reshape(-1, routing.ids.shape[-1])
            weights = weights.reshape(ids.shape)
            rows = real if prefix != "dec_" else torch.ones(len(ids), dtype=torch.bool)
            found = routing.logits.reshape(-1, experts)[rows].float()
            torch.testing.assert_close(found, logits[rows].float(), **CLOSE)
            kept = (weights != 0) & (ids >= 0)  # dropped by capacity: weight 0, or id -1
            dropped = torch.zeros_like(kept) if routing.kept is None else ~routing.kept
            assert torch.equal(kept[rows], ~dropped[rows]), (case, where)
            found_ids, found_weights = routing.ids, routing.weights
            if not self.ordered:
                ids, order = ids.sort(-1)
                weights = weights.gather(-1, order)
                found_ids, order = found_ids.sort(-1)
                found_weights = found_weights.gather(-1, order)
                kept = (weights != 0) & (ids >= 0)
            assert torch.equal(found_ids[rows][kept[rows]], ids[rows][kept[rows]]), (case, where)
            torch.testing.assert_close(
                found_weights[rows][kept[rows]].float(), weights[rows][kept[rows]].float(), **CLOSE
            )

    def check_generation(
        self, implementation: str = "moesaic", *, recomputed: bool = True, **generation: Any
    ) -> None:
        """Greedy tokens, recomputed at every step (unless told otherwise) and with the cache."""
        _, expected = family(self.name)
        model, given = self.build(implementation), self.inputs()
        seq2seq = "decoder_input_ids" in given
        prompt = given["input_ids"] if seq2seq else given["input_ids"][:, :8]
        for cache, key in ((False, "generate/tokens"), (True, "generate/tokens_cached")):
            if key not in expected or not (cache or recomputed):
                continue
            tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
                use_cache=cache,
                **generation,
            )
            assert torch.equal(tokens[:, -8:], expected[key]), key

    def check_experts_interface(self) -> None:
        """The implementation asked for is really called, for every router that is an MLP's.

        A dense LLaMA is built first: transformers caches on a base class that it has no experts.
        """
        LlamaForCausalLM(LlamaConfig(**SHAPE))
        model, calls = self.build("eager"), []

        def counted(experts: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(type(experts).__name__)
            return ALL_EXPERTS_FUNCTIONS["moesaic"](experts, *args, **kwargs)

        ALL_EXPERTS_FUNCTIONS["counted"] = counted
        try:
            model.set_experts_implementation("counted")
            with torch.no_grad():
                model(**self.inputs())
        finally:
            del ALL_EXPERTS_FUNCTIONS["counted"]
        wanted = [key for key in self.found_routers(model) if not key.startswith("attn_")]
        assert len(calls) >= len(wanted) > 0, calls

    def check_round_trip(self, tmp_path: Path) -> None:
        """Saving writes the original tensors, names and bits; what is saved loads the same."""
        model = self.build()
        out = tmp_path / self.name
        model.save_pretrained(out)
        original, saved = tensors_of(self.directory), tensors_of(out)
        assert set(saved) == set(original)
        for key, tensor in original.items():
            assert saved[key].dtype == tensor.dtype, key
            assert torch.equal(saved[key], tensor), key
        config = json.loads((out / "config.json").read_text())
        assert "auto_map" not in config
        assert config["architectures"] == [type(model).__name__]
        again = self.load(out)
        assert type(again) is type(model)
        with torch.no_grad():
            first, second = (m(**self.inputs()).logits for m in (model, again))
        assert torch.equal(first, second)

    def check_training_step(self, implementation: str = "moesaic", *, rate: float = 0.1) -> None:
        """With the balance loss on: it is in the loss, its own gradient reaches every router, and
        one step moves every router and every expert that received a token, and no other expert."""
        model = self.build(implementation, **self.balance).train()
        torch.manual_seed(0)
        with self.routed(model) as routed:
            out = model(**self.inputs(), labels=self.labels(), output_router_logits=True)
        routers = self.found_routers(model)
        if self.balance_of is not None:
            weights = [next(module.parameters()) for module in routers.values()]
            grads = torch.autograd.grad(
                getattr(out, self.balance_of), weights, retain_graph=True, allow_unused=True
            )
            for path, grad in zip(routers, grads, strict=True):
                assert grad is not None, f"the balance loss does not reach router {path}"
                assert grad.abs().max() > 0, path
            off = {key: 0.0 for key, value in self.balance.items() if isinstance(value, float)}
            plain = self.build(implementation, **{**self.balance, **off}).train()
            torch.manual_seed(0)
            without = plain(**self.inputs(), labels=self.labels(), output_router_logits=True)
            assert out.loss > without.loss, "the balance loss is not in the loss"
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        out.loss.backward()
        optimizer.step()
        moved = {name: (p.detach() - before[name]).abs() for name, p in model.named_parameters()}
        names = {id(module): path for path, module in model.named_modules()}
        for key, router in routers.items():
            path = names[id(router)]
            assert any(moved[n].max() > 0 for n in moved if n.startswith(path + ".")), path
            if key.startswith("attn_"):
                continue  # attention experts have shapes of their own
            routing = routed[key]
            kept = torch.ones_like(routing.ids, dtype=torch.bool)
            kept = kept if routing.kept is None else routing.kept
            visited = set(routing.ids[kept].tolist())
            block = path.rpartition(".")[0]
            stacks = [
                change
                for n, change in moved.items()
                if n.startswith(block + ".")
                and change.dim() == 3
                and change.shape[0] == routing.logits.shape[-1]
            ]
            assert len(stacks) >= 2, f"{block} has no 3-D experts"
            for change in stacks:
                found = set(change.flatten(1).amax(1).nonzero().flatten().tolist())
                assert found == visited, (path, found, visited)

    def check_gradient_checkpointing(self, *, reentrant: bool = True) -> None:
        """Loss and every gradient are the same with gradient checkpointing, of both kinds.

        `reentrant=False` leaves out the old kind, which loses the balance loss of those models of
        transformers that record router logits by hooks.
        """
        results = []
        for kind in (None, False, True) if reentrant else (None, False):
            model = self.build(**self.balance).train()
            if kind is not None:
                model.gradient_checkpointing_enable({"use_reentrant": kind})
                model.enable_input_require_grads()
            torch.manual_seed(0)
            out = model(**self.inputs(), labels=self.labels(), output_router_logits=True)
            out.loss.backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            results.append((out.loss.detach(), grads))
        (loss, grads), *others = results
        for other_loss, other_grads in others:
            torch.testing.assert_close(other_loss, loss, atol=1e-6, rtol=0)
            assert set(other_grads) == set(grads)
            for name, grad in grads.items():
                torch.testing.assert_close(other_grads[name], grad, atol=1e-5, rtol=1e-4)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's safetensors files but those that are computed."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        if file.name not in ("inputs.safetensors", "expected.safetensors"):
            tensors |= load_file(file)
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(_COMPUTED)}


def check_full_size(
    config: PreTrainedConfig, *, total: float, active: float, top_k: int, layers: int
) -> None:
    """A causal LM of real size builds on the meta device; parameters in billions, as published."""
    found = moesaic.anatomy(config)
    assert round(found.params_total / 1e9, 3) == total
    assert abs(found.params_active / 1e9 - active) < 0.06 * active, found.params_active
    assert len(found.layers) == layers
    assert {layer.top_k for layer in found.layers} == {top_k}
