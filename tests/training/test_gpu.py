"""On a GPU: no host synchronisation between log lines, compiled runs, both bf16 precisions."""

import pytest
import torch

from moesaic.training.config import OptimizerConfig
from moesaic.training.loop import train
from moesaic.training.optimizer import Optimizer
from moesaic.training.step import build_pass, run_update
from tests.training import models
from tests.training.test_loop import Stop, course, log, stop_after

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_an_update_does_not_wait_for_the_device():
    # Of our own model: transformers' LLaMA looks for packed sequences on the host in every pass.
    model = models.llama_moe().cuda().train()
    optimizer = Optimizer(model, OptimizerConfig())
    run_pass = build_pass(model)
    ids = torch.randint(0, 64, (2, 2, 12), device="cuda")
    autocast = torch.autocast("cuda", torch.bfloat16)
    for _ in range(2):
        run_update(run_pass, optimizer, ids, autocast=autocast)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = run_update(run_pass, optimizer, ids, autocast=autocast)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(result.values["loss"]).item()


@pytest.mark.parametrize("precision", ["mixed", "bf16"])
@pytest.mark.parametrize("build", [models.dense, models.llama_moe])
def test_precisions_follow_fp32(build, precision, settings, tmp_path):
    exact = train(settings(build, device="cuda", precision="fp32"), out=tmp_path / "fp32")
    rough = train(settings(build, device="cuda", precision=precision), out=tmp_path / precision)
    a, b = ([line["loss"] for line in log(path)] for path in (exact, rough))
    assert b == pytest.approx(a, rel=0.03)


def test_a_compiled_run_follows_the_eager_one(settings, tmp_path):
    eager = train(settings(models.dense, device="cuda", precision="fp32"), out=tmp_path / "eager")
    config = settings(models.dense, device="cuda", precision="fp32", compile=True)
    compiled = train(config, out=tmp_path / "compiled")
    a, b = ([line["loss"] for line in log(path)] for path in (eager, compiled))
    assert b == pytest.approx(a, rel=1e-3)


def test_a_gpu_run_resumes(settings, tmp_path, monkeypatch):
    config = settings(models.llama_moe, device="cuda")
    straight = train(config, out=tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stop):
            train(config, out=tmp_path / "run")
    train(config, out=tmp_path / "run")
    for a, b in zip(course(straight), course(tmp_path / "run"), strict=True):
        assert a["step"] == b["step"]
        if a["event"] == "train":  # sums of floats on a GPU may be added in another order
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
