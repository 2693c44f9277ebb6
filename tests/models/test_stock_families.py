"""Families of transformers through `moesaic.load`: the original programs' numbers, and saving."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from tests.models.parity import IMPLEMENTATIONS, Parity, Routing


def last_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules named router: Jamba's is a plain linear map in transformers 5.17."""
    return {
        f"/{path.split('.')[2]}": module
        for path, module in model.named_modules()
        if path.endswith(".router")
    }


def read_jamba(router: nn.Module, output: Any) -> Routing:
    if isinstance(output, tuple):
        return Routing(*output)
    weights, ids = output.softmax(-1).topk(2, dim=-1)
    return Routing(output, weights, ids)


def read_granite(router: nn.Module, output: Any) -> Routing:
    """transformers 5.17 gives ids, weights, logits; 5.23 logits, weights, ids."""
    return Routing(*(output if output[0].is_floating_point() else reversed(output)))


def switch_routers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{path[:3]}_/{path.split('.')[2]}": module
        for path, module in model.named_modules()
        if path.endswith(".router")
    }


def read_switch(router: nn.Module, output: Any) -> Routing:
    """Router output: one-hot of what was kept, probability, logits; [B, T, .]."""
    kept, probability, logits = output
    return Routing(
        logits,
        probability.flatten(0, 1),
        logits.argmax(-1).view(-1, 1),
        kept.any(-1).view(-1, 1),
    )


def nllb_routers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{path.split('.')[1][:3]}_/{path.split('.')[3]}": module
        for path, module in model.named_modules()
        if path.endswith(".router")
    }


def read_nllb(router: nn.Module, output: Any) -> Routing:
    """Router output: first choice, combine weights [T, E] with zeros where dropped, logits."""
    _, combine, logits = output
    weights, ids = combine.topk(2, dim=-1)
    return Routing(logits, weights, ids, weights > 0)


def jetmoe_routers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{'attn_' if 'attention' in path else ''}/{path.split('.')[2]}": module
        for path, module in model.named_modules()
        if path.endswith(".router")
    }


def read_jetmoe(router: nn.Module, output: Any) -> Routing:
    logits, ids = output[4].topk(router.top_k, dim=-1)
    return Routing(output[4], logits.softmax(-1), ids)


SWITCH = {"routers": switch_routers, "read": read_switch, "balance_of": None}
NLLB = {"routers": nllb_routers, "read": read_nllb, "balance_of": None}
JETMOE = {"routers": jetmoe_routers, "read": read_jetmoe, "balance": {"aux_loss_coef": 0.1}}
AUX = {"balance": {"router_aux_loss_coef": 0.1}}

THREE = [  # families whose experts are behind the experts interface
    Parity("deepseek_v2", ordered=False, balance_of=None),
    Parity("deepseek_v2_grouped_scaled", ordered=False, balance_of=None),
    Parity("granitemoe", read=read_granite, **AUX),
    Parity("jamba", routers=last_routers, read=read_jamba, **AUX),
    Parity("mixtral", **AUX),
    Parity("olmoe", **AUX),
    Parity("phimoe", **AUX),
    Parity("phimoe_long", **AUX),
    Parity("qwen2_moe", **AUX),
    Parity("qwen3_moe", **AUX),
]
OWN = [  # families with experts of their own form
    Parity("jetmoe", loss=False, **JETMOE),  # the original shifts the labels twice
    Parity("jetmoe_chat", **JETMOE),
    Parity("nllb_moe", **NLLB),
    Parity("switch_transformers", **SWITCH),
    Parity("switch_transformers_lowcap", **SWITCH),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("fixture", THREE, ids=str)
def test_the_original_numbers(fixture, implementation):
    fixture.check_cases(implementation, attn_implementation="eager")


@pytest.mark.parametrize("fixture", OWN, ids=str)
def test_the_original_numbers_of_experts_of_another_form(fixture):
    fixture.check_cases("eager", attn_implementation="eager")


@pytest.mark.parametrize("fixture", THREE + OWN, ids=str)
def test_the_original_greedy_tokens(fixture):
    fixture.check_generation("moesaic" if fixture in THREE else "eager")


@pytest.mark.parametrize("fixture", THREE, ids=str)
def test_the_experts_asked_for_are_called(fixture):
    fixture.check_experts_interface()


@pytest.mark.parametrize("fixture", THREE + OWN, ids=str)
def test_saving_writes_the_original_tensors(fixture, tmp_path):
    fixture.check_round_trip(tmp_path)


@pytest.mark.parametrize("fixture", THREE, ids=str)
def test_one_step_moves_what_was_used(fixture):
    fixture.check_training_step()


@pytest.mark.parametrize("fixture", OWN, ids=str)
def test_one_step_moves_what_was_used_of_another_form(fixture):
    """Every router moves, and exactly the experts that received a token."""
    model = fixture.build("eager", **fixture.balance).train()
    torch.manual_seed(0)
    with fixture.routed(model) as routed:
        out = model(**fixture.inputs(), labels=fixture.labels(), output_router_logits=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out.loss.backward()
    optimizer.step()
    moved = {name: (p.detach() - before[name]).abs() for name, p in model.named_parameters()}
    paths = {id(module): path for path, module in model.named_modules()}
    for key, router in fixture.found_routers(model).items():
        path = paths[id(router)]
        assert any(moved[n].max() > 0 for n in moved if n.startswith(path + ".")), path
        routing, block = routed[key], path.rpartition(".")[0]
        ids = routing.ids if routing.kept is None else routing.ids[routing.kept]
        visited = set(ids.flatten().tolist())
        for name, change in moved.items():
            if not name.startswith(block + ".") or name.startswith(path + "."):
                continue
            expert = re.search(r"expert_(\d+)\.", name)
            if expert is not None:
                assert bool(change.max() > 0) == (int(expert[1]) in visited), name
            elif change.dim() == 3:
                found = set(change.flatten(1).amax(1).nonzero().flatten().tolist())
                assert found == visited, name


@pytest.mark.parametrize("fixture", [f for f in THREE if f.name != "jamba"], ids=str)
def test_gradient_checkpointing_changes_no_number(fixture):
    fixture.check_gradient_checkpointing(reentrant=False)
