"""Whether the experts layer's bits hold while other processes come and go on the same GPU.

A CUDA graph of the layer (forward and backward), of torch's grouped product and of a plain matrix
product is replayed, and every result compared with the first one's bits. Meanwhile other processes
start, use the GPU and end, over and over: the driver then interrupts whatever runs. Under MPS (a
daemon that was started before) they share one context, else they take turns.

    python benchmarks/kernels_stress.py --seconds 60 --others 10

Prints every difference, and a line of JSON; exits with 1 if there was one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F

from moesaic.kernels.triton import layer

T, D, E, K, WIDTH = 16384, 384, 8, 4, 128
LAYERS = 6
"""Times that each is in the graph."""
PARTS = ("ours y", "ours dx", "ours dgate_up", "ours ddown", "ours dweights")
PARTS += ("grouped y", "grouped dgate_up", "grouped ddown", "dense h", "dense y", "dense dw")


def problem() -> Callable[[], list[torch.Tensor]]:
    """Return what computes everything anew, in the order of `PARTS`."""
    torch.manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x_TD, grad_TD, dense_FD = random(T, D), random(T, D), random(2 * WIDTH * E, D)
    gate_up_EJD, down_EDI = random(E, 2 * WIDTH, D, scale=0.05), random(E, D, WIDTH, scale=0.05)
    shares_E = torch.rand(E, device="cuda").exp()
    ids_TK = torch.multinomial(shares_E.expand(T, E), K)
    weights_TK = torch.rand(T, K, device="cuda")
    order_N = ids_TK.flatten().argsort(stable=True)
    token_N = order_N // K
    ends_E = torch.bincount(ids_TK.flatten(), minlength=E).cumsum(0).to(torch.int32)

    def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.detach().requires_grad_() for tensor in tensors]

    def compute() -> list[torch.Tensor]:
        x, gate_up, down, weights = inputs = leaves(x_TD, gate_up_EJD, down_EDI, weights_TK)
        y_TD = layer.compute(x, gate_up, down, ids_TK, weights, activation="silu", sentinels=False)
        ours = [y_TD.detach(), *torch.autograd.grad(y_TD, inputs, grad_TD)]
        gate_up, down = inputs = leaves(gate_up_EJD, down_EDI)
        gate, up = F.grouped_mm(x_TD[token_N], gate_up.mT, offs=ends_E).chunk(2, -1)
        y_ND = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends_E)
        grouped = [y_ND.detach(), *torch.autograd.grad(y_ND, inputs, grad_TD[token_N])]
        h_TF = x_TD @ dense_FD.T
        return [*ours, *grouped, h_TF, h_TF @ dense_FD, h_TF.T @ x_TD]

    return compute


def come_and_go() -> None:
    """What another process does: take memory, compute, replay a graph, end."""
    compute = problem()
    held = torch.zeros(4 << 30, dtype=torch.uint8, device="cuda")
    for _ in range(20):
        compute()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    del held


def watch(seconds: float) -> tuple[int, Counter[str]]:
    """Replay and compare; return the number of replays, and wrong results by part."""
    compute = problem()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        wanted = [compute() for _ in range(3)][-1]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = [compute() for _ in range(LAYERS)]
    end, replays, wrong = time.monotonic() + seconds, 0, Counter[str]()
    while time.monotonic() < end:
        graph.replay()
        replays += 1
        differs = [(a != b).any() for found in made for a, b in zip(found, wanted, strict=True)]
        for place, bad in enumerate(torch.stack(differs).tolist()):
            if bad:
                name, found = PARTS[place % len(PARTS)], made[place // len(PARTS)]
                apart = found[place % len(PARTS)] != wanted[place % len(PARTS)]
                first = apart.nonzero()[0].tolist()
                wrong[name] += 1
                print(f"replay {replays}, {name}: {int(apart.sum())} numbers, first at {first}")
    return replays, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--others", type=int, default=8, help="processes at a time")
    parser.add_argument("--come-and-go", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.come_and_go:
        come_and_go()
        return
    over, ended = threading.Event(), Counter[int]()

    def others() -> None:
        while not over.is_set():
            found = subprocess.run([sys.executable, __file__, "--come-and-go"], check=False)
            ended[found.returncode] += 1

    threads = [threading.Thread(target=others) for _ in range(options.others)]
    for thread in threads:
        thread.start()
    try:
        replays, wrong = watch(options.seconds)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    told = {"replays": replays, "layers": LAYERS, "others ended": dict(ended), "wrong": dict(wrong)}
    print(json.dumps(told))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
