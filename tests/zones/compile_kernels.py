"""Compiles the kernels for an NVIDIA GPU that need not be there: compile_kernels.py DIMENSION [COMPUTE_CAPABILITY].

Prints for each of the flow its name, the bytes of shared memory and those that a GPU of this kind has, the bytes of
registers that a thread spills to memory, and how many float64 products are on tensor cores; then dropout's masks.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lzn_dist.models import dropout_kernel
from lzn_dist.zones import kernels

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a program may have (CUDA programming guide)
WIDE = {"queries", "biases", "radius", "widest", "offsets", "peaks", "group_peaks", "members", "outsides", "bases",
        "target", "grad_target"}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def compiled(kernel: Any, dim: int, capability: int) -> Any:
    values = {
        **kernels.shapes(dim, torch.float32, SHARED[capability] * 1024), "limit": 100.0, "floor": -60.0,
        "GROUPED": True, "DTYPE": tl.float32, "PRECISION": kernels.PRECISION,
    }  # fmt: skip
    kinds = dict.fromkeys(WIDE, "*fp64") | dict.fromkeys(("index", "groups", "own_groups"), "*i64")
    kinds |= dict.fromkeys(("count", "total", "start", "chunk"), "i32")
    names = kernel.arg_names
    signature = {name: "constexpr" if name in values else kinds.get(name, "*fp32") for name in names}
    odd = {name for name, parameter in zip(names, kernel.params, strict=True)
           if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment}  # fmt: skip
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names)
               if signature[name].startswith("*") and name not in odd}  # fmt: skip
    constants = {name: value for name, value in values.items() if name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernels.WARPS})


def spilled(binary: bytes) -> int:
    """Bytes of stack a thread, as NVIDIA's disassembler says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"STACK:(\d+)", said.stdout + said.stderr)
    if not found:
        raise SystemExit(f"cuobjdump says nothing of the stack: {said.stdout}{said.stderr}")
    return int(found[1])


def compiled_masks(capability: int) -> Any:
    signature = {
        "keys": "*i64",
        "made": "*i1",
        "mixed": "i64",
        "count": "i32",
        "threshold": "i32",
        "BLOCK": "constexpr",
    }
    source = ASTSource(fn=dropout_kernel._masks, signature=signature, constexprs={"BLOCK": 1024})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def main() -> None:
    dim, capability = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 90
    for name in ("_forward", "_moments", "_backward_rows", "_backward_anchors"):
        found = compiled(getattr(kernels, name), dim, capability)
        products = found.asm["ptx"].count("f64.f64.f64.f64")
        print(name, found.metadata.shared, SHARED[capability] * 1024, spilled(found.asm["cubin"]), products, flush=True)
    print("_masks", spilled(compiled_masks(capability).asm["cubin"]))


if __name__ == "__main__":
    main()
