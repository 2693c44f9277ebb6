"""What a run reports: log.jsonl, TensorBoard, throughput, MFU, expert load and importance.

The device is asked for numbers only when a line is written: between lines, results stay tensors and
the host runs ahead.

    loss        mean cross-entropy of the window's updates, nats a token, without the balance loss
    distill     mean divergence of the window from the teacher, nats a token, without its weight
    balance     mean balance loss of the window, as it enters the gradient
    load        share of routed rows an expert got; `load_max` is the largest, times E: 1 is even
    importance  the same for the sum of routing weights
    cv          standard deviation over mean, per layer, averaged over layers
    mfu         6 x active parameters x tokens/s over the device's peak (attention's T^2 and
                a teacher's work left out)
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moesaic.core.errors import UserError
from moesaic.core.files import write_text

LOG_NAME = "log.jsonl"

# Dense bf16 peak, TFLOP/s, from the vendors' data sheets; the first that names the device wins.
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A30": 165.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
    "MI300X": 1307.0,
}


def peak_flops(device: torch.device, tflops: float | None) -> float | None:
    """Return the device's peak FLOP/s in bf16: the option, else the table, else None."""
    if tflops is not None:
        return tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for key, peak in _PEAK_TFLOPS.items() if key in name), None)


class Window:
    """The updates since the last log line, as tensors on the device until `flush` or `state`."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: dict[str, list[torch.Tensor | float]] = {}
        self.sums: dict[str, torch.Tensor] = {}

    def add(
        self,
        step: int,
        values: Mapping[str, torch.Tensor],
        routing: Mapping[str, torch.Tensor],
    ) -> None:
        """Remember scalars of update `step` and add up its per-expert counts ([L, E])."""
        self.steps.append(step)
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())
        for name, counts in routing.items():
            total = self.sums.get(name)
            self.sums[name] = counts.clone() if total is None else total.add_(counts)

    def fetch(self) -> dict[str, list[float]]:
        """Bring the scalars to the host: the only synchronisation."""
        for name, values in self.values.items():
            device = [v for v in values if isinstance(v, torch.Tensor)]
            if device:
                host = iter(torch.stack([v.float() for v in device]).tolist())
                self.values[name] = [
                    next(host) if isinstance(v, torch.Tensor) else v for v in values
                ]
        return {name: [float(v) for v in values] for name, values in self.values.items()}

    def flush(self) -> dict[str, Any]:
        """Return the window's means and load figures, and empty it."""
        found: dict[str, Any] = {
            name: sum(values) / len(values) for name, values in self.fetch().items()
        }
        for name, counts_LE in self.sums.items():
            found |= spread(name, counts_LE)
        self.__init__()  # type: ignore[misc]
        return found

    def state(self) -> dict[str, Any]:
        """Return the window as JSON, so that a resumed run writes the line that was under way."""
        sums = {name: counts.tolist() for name, counts in self.sums.items()}
        return {"steps": list(self.steps), "values": self.fetch(), "sums": sums}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Put back what `state` returned."""
        self.steps = list(state["steps"])
        self.values = {name: list(values) for name, values in state["values"].items()}
        self.sums = {
            name: torch.tensor(counts, device=device) for name, counts in state["sums"].items()
        }


def spread(name: str, counts_LE: torch.Tensor) -> dict[str, float]:
    """Summarise how evenly counts fall on experts: variation and largest over mean."""
    counts_LE = counts_LE.double().cpu()
    mean_L = counts_LE.mean(-1).clamp_min(1e-12)
    return {
        f"{name}_cv": float((counts_LE.std(-1, correction=0) / mean_L).mean()),
        f"{name}_max": float((counts_LE.max(-1).values / mean_L).max()),
    }


class Clock:
    """Training seconds, leaving out evaluation and saving, so that tokens/s means training."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._stopped = 0.0
        self._paused_at: float | None = None

    def lap(self) -> float:
        """Return the training seconds since the last lap and start the next."""
        now = time.perf_counter()
        seconds = now - self._since - self._stopped
        self._since, self._stopped = now, 0.0
        return max(seconds, 1e-9)

    def __enter__(self) -> None:
        self._paused_at = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._stopped += time.perf_counter() - (self._paused_at or 0.0)


class Log:
    """Writes log.jsonl, one JSON object a line, and TensorBoard where asked."""

    def __init__(self, out: Path, *, resume_at: int, tensorboard: bool) -> None:
        self.path = out / LOG_NAME
        self._trim(resume_at)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _board(out, resume_at) if tensorboard else None

    def write(self, event: str, step: int, **fields: Any) -> None:
        """Append one line and push its numbers to TensorBoard under ``event/field``."""
        self._file.write(json.dumps({"event": event, "step": step, **fields}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _numbers(fields):
                self._board.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _trim(self, resume_at: int) -> None:
        """Drop lines of updates that will be done again, and a line cut short by a kill."""
        if not self.path.is_file():
            return
        kept = [line for line in read_log_lines(self.path) if line["step"] <= resume_at]
        if resume_at == 0:
            kept = []
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def read_log_lines(path: Path) -> list[dict[str, Any]]:
    """Read log.jsonl, leaving out a last line that was cut short."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _numbers(fields: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((prefix + name, float(value)))
    return found


def _board(out: Path, resume_at: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "log.tensorboard needs the package tensorboard. pip install 'moesaic[track]'"
        ) from None
    return SummaryWriter(out / "tensorboard", purge_step=resume_at + 1 if resume_at else None)
