"""A classifier: cross-entropy of the first view's logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from lzn_dist.config import Config
from lzn_dist.objectives.base import Needs, Objective, Related, Samples, View
from lzn_dist.objectives.contrast import hit


class Supervised(Objective):
    """The encoder's output are the classes' logits."""

    @classmethod
    def declare(cls, config: Config) -> Needs:
        return Needs((View("image"),), labels=True, augmented=True, logits=True)

    def relate(self, anchors: Mapping[View, Tensor], tables: Mapping[str, Tensor], samples: Samples) -> Related:
        (logits,) = anchors.values()
        return Related((), F.cross_entropy(logits, samples.labels), {"train_accuracy": hit(logits, samples.labels)})
