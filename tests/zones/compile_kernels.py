"""Compiles the kernels for an NVIDIA GPU that need not be there: compile_kernels.py DIMENSION [COMPUTE_CAPABILITY].

Prints for each its name, the bytes of shared memory, and how many float64 products are on tensor cores.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lzn_dist.zones import kernels

WIDE = {"biases", "log_weights", "own_weights", "radius", "widest", "offsets", "peaks", "group_peaks", "members",
        "outsides", "lse", "target", "grad_target"}  # fmt: skip


def compiled(kernel: Any, dim: int, capability: int, dtype: Any = tl.float32, **flags: bool) -> Any:
    values = {**kernels.shapes(dim), "limit": 100.0, "DTYPE": dtype, **flags}
    single = "*fp64" if dtype == tl.float64 else "*fp32"
    kinds = dict.fromkeys(WIDE, "*fp64") | dict.fromkeys(("index", "groups", "own_groups"), "*i64")
    kinds |= dict.fromkeys(("count", "total", "start", "chunk"), "i32")
    signature = {name: "constexpr" if name in values else kinds.get(name, single) for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def main() -> None:
    dim, capability = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 90
    every = {"WEIGHTED": True, "GROUPED": True}
    cases = [
        (kernels._forward, every),
        (kernels._moments, every),
        (kernels._backward_rows, every | {"TARGETED": True}),
        (kernels._backward_anchors, every | {"TARGETED": True}),
    ]
    for kernel, flags in cases:
        found = compiled(kernel, dim, capability, **flags)
        print(kernel.__name__, found.metadata.shared, found.asm["ptx"].count("f64.f64.f64.f64"), flush=True)


if __name__ == "__main__":
    main()
