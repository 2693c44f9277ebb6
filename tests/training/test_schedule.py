import json

import pytest
import torch

from moesaic.training.config import ScheduleConfig
from moesaic.training.schedule import Schedule, multiplier
from tests.helpers import GOLDEN


def test_multiplier_equals_the_original_through_the_last_step():
    golden = json.loads((GOLDEN / "llama_moe_v1" / "lr_schedule.json").read_text())
    args = golden["args"]
    for step in range(args["num_training_steps"] + 1):
        got = multiplier(
            step,
            warmup=args["num_warmup_steps"],
            total=args["num_training_steps"],
            floor=args["final_lr_portion"],
        )
        assert got == pytest.approx(golden["multiplier"][step], abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 3, 50])
def test_past_the_end_it_stays_at_the_floor(warmup):
    values = [multiplier(s, warmup=warmup, total=50, floor=0.2) for s in range(50, 400)]
    assert set(values[1:]) == {0.2}
    # The original rises again here; a run that is extended must not.


def test_schedule_sets_every_group_with_its_own_scale():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(
        [{"params": [parameters[0]]}, {"params": [parameters[1]], "lr_scale": 0.5}], lr=7.0
    )
    schedule = Schedule(ScheduleConfig(warmup=4, floor=0.0), peak=2.0, total=10)
    assert schedule.apply(optimizer, 2) == pytest.approx(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5]
