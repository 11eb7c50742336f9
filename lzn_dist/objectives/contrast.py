"""What contrastive objectives and classifiers share."""

from __future__ import annotations

import torch
from torch import Tensor


def hit(logits: Tensor, target: Tensor) -> Tensor:
    """The fraction of rows whose largest logit is the target's."""
    return torch.eq(logits.detach().argmax(1), target).to(logits.dtype).mean()
