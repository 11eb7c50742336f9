"""Large-scale distributed training of Latent Zoning Networks (arXiv 2509.15591)."""

from __future__ import annotations

import os
from typing import Any

# read when torch is loaded: threads that wait by spinning make a step many times slower beside other work
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.2.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # `lzn_dist.load` without importing the networks wherever a part of the package is imported
    if name == "load":
        from lzn_dist.inference import load

        return load
    raise AttributeError(f"module 'lzn_dist' has no attribute {name!r}")
