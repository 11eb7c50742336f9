"""The label encoder: a learnable anchor a class (arXiv 2509.15591, section 4.3). Its decoder is the nearest anchor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lzn_dist.keyed_random import normal


class LabelAnchors(nn.Module):
    """Anchors [num_classes, latent_dim] of the classes, drawn from N(0, I) at the start."""

    def __init__(self, num_classes: int, latent_dim: int, seed_key: Tensor | None = None) -> None:
        """seed_key: 0-dimensional int64 key to draw from (lzn_dist.keyed_random); None: torch's global generator.

        Raises ValueError, naming the argument.
        """
        super().__init__()
        for name, number in (("num_classes", num_classes), ("latent_dim", latent_dim)):
            if number < 1:
                raise ValueError(f"{name}: a positive number is needed, not {number}")
        if seed_key is not None and (seed_key.dtype != torch.int64 or seed_key.dim() != 0):
            raise ValueError(f"seed_key: one int64 is needed, not {seed_key.dtype} {list(seed_key.shape)}")
        shape = (num_classes, latent_dim)
        self.anchor = nn.Parameter(torch.randn(shape) if seed_key is None else normal(seed_key, shape))

    def forward(self) -> Tensor:
        """The anchors [num_classes, latent_dim], with gradient."""
        # not the parameter itself: sharded engines take its storage away when the forward has ended
        return self.anchor.clone()

    def blocks(self) -> list[nn.Module]:
        """None: a table is too small to be a unit of its own."""
        return []
