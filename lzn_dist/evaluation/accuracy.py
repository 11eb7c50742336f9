"""Classification by zones: image → anchor → latent → along the label anchors → class (paper, section 3.3).

The published evaluation sweeps the scale of the noise that computes the image's latent: 0 asks for the centre of its
zone, 1 for a random point of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

import torch
from torch import Tensor

from lzn_dist.data import EvaluationBatch
from lzn_dist.distributed.spread import spread
from lzn_dist.inference import LZN

K = TypeVar("K")


@dataclass(frozen=True)
class Proportion:
    """``successes`` of ``trials``."""

    successes: int
    trials: int

    @property
    def value(self) -> float:
        return self.successes / self.trials if self.trials else math.nan

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval (1927): holds its confidence near 0 and 1 too, where p ± 2s does not."""
        if not self.trials:
            return 0.0, 1.0
        z = NormalDist().inv_cdf(0.5 + confidence / 2)
        n, p = self.trials, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


def classification_accuracy(
    model: LZN, batches: Sequence[EvaluationBatch], noise_scales: Sequence[float] = (0.0,),
    class_weights: Tensor | None = None, seed: int = 0,
) -> dict[tuple[float, bool], Proportion]:  # fmt: skip
    """Accuracy by (noise scale, whether label anchors were weighted by class_weights [K]).

    Latents are computed over each whole batch, rows that are not valid included; only the valid ones are counted. The
    batches are spread over ranks. Collective.
    """
    weights = [(False, None)] if class_weights is None else [(False, None), (True, class_weights)]

    def hits(number: int) -> dict[tuple[float, bool], Proportion]:
        batch = batches[number]
        valid = batch.valid.nonzero()[:, 0]
        anchors = model.anchors(batch.images)
        # samples are numbered in the data set; rows that fill up a batch repeat numbers as they repeat images
        samples = batch.index.to(anchors.device)
        found = {}
        for scale in noise_scales:
            latents = model.anchors_to_latents(anchors, scale, seed, samples)[valid.to(anchors.device)]
            for weighted, frequencies in weights:
                right = torch.eq(model.read_class(latents, frequencies).cpu(), batch.labels[valid])
                found[scale, weighted] = Proportion(int(right.sum()), len(valid))
        return found

    return _sums(spread(len(batches), hits))


def logit_accuracy(model: LZN, batches: Sequence[EvaluationBatch]) -> Proportion:
    """A supervised model's accuracy, the batches spread over ranks. Collective."""

    def hits(number: int) -> dict[str, Proportion]:
        batch = batches[number]
        right = torch.eq(model.classify(batch.images).cpu(), batch.labels)[batch.valid]
        return {"": Proportion(int(right.sum()), len(right))}

    return _sums(spread(len(batches), hits))[""]


def _sums(parts: Sequence[dict[K, Proportion]]) -> dict[K, Proportion]:
    return {
        key: Proportion(sum(part[key].successes for part in parts), sum(part[key].trials for part in parts))
        for key in parts[0]
    }
