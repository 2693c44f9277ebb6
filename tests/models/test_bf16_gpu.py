"""Every family in bf16 on a GPU computes what it computes in float32, up to bf16's noise.

A row whose router sits between two experts may choose the other one; the tiny models are random, so
such rows are common and far off. Typical rows are compared, and the noise is what the model's own
eager loop has in bf16 on the same device.
"""

from __future__ import annotations

import pytest
import torch

import moesaic
from tests.models.golden import FAMILIES
from tests.models.parity import Parity

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
NAMES = sorted(folder.name for folder in FAMILIES.iterdir() if (folder / "config.json").is_file())
NOISE = 3e-2  # of the norm of a row of logits: a few layers, each rounding to 2**-9


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_within_the_noise_of_bf16(name):
    fixture = Parity(name)
    given = {key: value.cuda() for key, value in fixture.inputs().items()}

    def logits(dtype: torch.dtype, implementation: str) -> torch.Tensor:
        model = moesaic.load(
            fixture.directory, dtype=dtype, experts_implementation=implementation
        ).to("cuda")
        with torch.no_grad():
            found = model(**given).logits
        assert found.isfinite().all()
        return found.float().reshape(-1, found.shape[-1])

    exact = logits(torch.float32, "eager")
    torch.testing.assert_close(logits(torch.float32, "moesaic"), exact, atol=1e-4, rtol=1e-4)

    def noise(implementation: str) -> float:
        difference = (logits(torch.bfloat16, implementation) - exact).norm(dim=1)
        return float((difference / exact.norm(dim=1)).median())

    found, own = noise("moesaic"), noise("eager")
    print(f"{name}: moesaic {found:.1e}, eager {own:.1e}")
    assert found < max(NOISE, 1.5 * own)
