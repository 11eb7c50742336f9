"""Wrong arguments are refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lzn_dist.zones import align, alignment_loss, compute_latents, nearest_anchor

X = torch.zeros(4, 3)
INDEX = torch.arange(4)


@pytest.mark.parametrize(
    "name,arguments",
    [
        ("anchors", {"anchors": X[0]}),
        ("anchors", {"anchors": X.bfloat16()}),
        ("anchors", {"anchors": X.long()}),
        ("anchors", {"anchors": torch.zeros(4, 0)}),
        ("noise", {"noise": X[:3]}),
        ("noise", {"noise": torch.zeros(4, 2)}),
        ("noise", {"noise": X.double()}),
        ("noise", {"noise": X.half()}),
        ("all_anchors", {"all_anchors": torch.zeros(4, 2)}),
        ("all_anchors", {"all_anchors": X.double()}),
        ("all_anchors", {"all_anchors": torch.zeros(3, 3)}),
        ("index", {"index": INDEX[:3]}),
        ("index", {"index": INDEX.int()}),
        ("index", {"index": INDEX.float()}),
        ("index", {"index": INDEX + 1}),
        ("index", {"index": INDEX - 1}),
        ("steps", {"steps": 0}),
        ("steps", {"steps": -3}),
        ("steps", {"steps": 2.0}),
        ("steps", {"steps": True}),
        ("solver", {"solver": "heun"}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_compute_latents(name: str, arguments: dict[str, Any]) -> None:
    good: dict[str, Any] = {"anchors": X, "noise": X, "all_anchors": X}
    compute_latents(**good)
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        compute_latents(**(good | arguments))


@pytest.mark.parametrize(
    "name,arguments",
    [
        ("latents", {"latents": X[0]}),
        ("latents", {"latents": X.bfloat16()}),
        ("latents", {"latents": X.int()}),
        ("anchors", {"anchors": torch.zeros(4, 2)}),
        ("anchors", {"anchors": X.double()}),
        ("anchors", {"anchors": X.half()}),
        ("targets", {"targets": INDEX[:3]}),
        ("targets", {"targets": INDEX.float()}),
        ("targets", {"targets": INDEX + 1}),
        ("targets", {"targets": INDEX - 1}),
        ("log_weights", {"log_weights": torch.zeros(3)}),
        ("log_weights", {"log_weights": INDEX}),
        ("steps", {"steps": 0}),
        ("steps", {"steps": "20"}),
        ("backend", {"backend": "dense"}),
    ],
)
def test_align(name: str, arguments: dict[str, Any]) -> None:
    good: dict[str, Any] = {"latents": X, "anchors": X, "targets": INDEX}
    align(**good)
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        align(**(good | arguments))


@pytest.mark.parametrize(
    "name,arguments",
    [
        ("log_probs", {"log_probs": torch.zeros(5)}),
        ("log_probs", {"log_probs": torch.zeros(0, 5)}),
        ("cutoff", {"cutoff": 1.0}),
        ("cutoff", {"cutoff": -0.5}),
        ("cutoff", {"cutoff": -0.01}),
        ("cutoff", {"cutoff": math.nan}),
        ("kind", {"kind": "hinge"}),
        ("over", {"over": "median"}),
        ("temperature", {"over": "softmax", "temperature": 0.0}),
    ],
)
def test_alignment_loss(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        alignment_loss(**({"log_probs": torch.zeros(10, 5)} | arguments))


def test_nearest_anchor() -> None:
    with pytest.raises(ValueError, match=r"^endpoint"):
        nearest_anchor(X[0], X)
    with pytest.raises(ValueError, match=r"^anchors"):
        nearest_anchor(X, torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"^anchors"):
        nearest_anchor(X, X.double())
    with pytest.raises(ValueError, match=r"^anchors"):
        nearest_anchor(X, X[:0])


def test_log_weights_may_be_more_exact_than_the_anchors() -> None:
    weights = torch.linspace(0.1, 0.4, len(X), dtype=torch.float64).log()
    tiled, plain = (align(X, X, INDEX, log_weights=weights, backend=backend) for backend in ("tiled", "plain"))
    torch.testing.assert_close(tiled.log_probs, plain.log_probs, rtol=1e-3, atol=1e-4)
