"""Compile Triton kernels for Hopper on a machine without a GPU, and read what came out."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

POINTERS = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16", "i32": "*i32", "i64": "*i64"}


@dataclass(frozen=True)
class Compiled:
    ptx: str
    shared: int
    registers: int
    spilled: int

    def count(self, instruction: str) -> int:
        return self.ptx.count(instruction)


def compile_for_hopper(
    kernel: Any,
    tmp_path: Path,
    *,
    pointers: dict[str, str],
    warps: int,
    stages: int,
    **constants: Any,
) -> Compiled:
    """Compile for sm_90; what is neither pointer nor constant is a multiple of 16, as sizes are."""
    signature, hints = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = POINTERS[pointers[name]] if name in pointers else "i32"
            hints[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, hints),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    source = tmp_path / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", "/dev/null"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Compiled(
        ptx=compiled.asm["ptx"],
        shared=compiled.metadata.shared,
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill", log))),
    )
