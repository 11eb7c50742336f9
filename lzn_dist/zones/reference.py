"""Plain twins: the definitions, of a few lines, that decide what is right."""

from __future__ import annotations

import torch
from torch import Tensor


def posterior_mean(
    x: Tensor, sigma: float, anchors: Tensor, log_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Plain twin: log-weights log w [b, n] and posterior mean A [b, d] at x [b, d], from the definition."""
    logits = -0.5 * ((x[:, None, :] - (1 - sigma) * anchors[None]) / sigma).square().sum(-1)
    if log_weights is not None:
        logits = logits + log_weights.to(logits.dtype)
    log_w = torch.log_softmax(logits, dim=1)
    return log_w, log_w.exp() @ anchors
