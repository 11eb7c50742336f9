"""Classification by zones: image → anchor → latent → along the label anchors → class (paper, section 3.3).

The published evaluation sweeps the scale of the noise that computes the image's latent: 0 asks for the centre of its
zone, 1 for a random point of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from lzn_dist.data import EvaluationBatch
from lzn_dist.model import LZN


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
    model: LZN, batches: Iterable[EvaluationBatch], noise_scales: Sequence[float] = (0.0,),
    class_weights: Tensor | None = None, seed: int = 0,
) -> dict[tuple[float, bool], Proportion]:  # fmt: skip
    """Accuracy by (noise scale, whether label anchors were weighted by class_weights [K]).

    Latents are computed over each whole batch, rows that are not valid included; only the valid ones are counted.
    """
    weights = [(False, None)] if class_weights is None else [(False, None), (True, class_weights)]
    right = dict.fromkeys(((scale, weighted) for weighted, _ in weights for scale in noise_scales), 0)
    trials = 0
    for batch in batches:
        valid = batch.valid.nonzero()[:, 0]
        anchors = model.anchors(batch.images)
        # samples are numbered in the data set; rows that fill up a batch repeat numbers as they repeat images
        samples = batch.index.to(anchors.device)
        truth = batch.labels[valid]
        trials += len(valid)
        for scale in noise_scales:
            latents = model.anchors_to_latents(anchors, scale, seed, samples)[valid.to(anchors.device)]
            for weighted, frequencies in weights:
                found = model.read_class(latents, frequencies).cpu()
                right[scale, weighted] += int(torch.eq(found, truth).sum())
    return {key: Proportion(count, trials) for key, count in right.items()}
