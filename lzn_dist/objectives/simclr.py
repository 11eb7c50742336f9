"""SimCLR's NT-Xent over the global batch (arXiv 2002.05709, equation 1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lzn_dist.config import Config
from lzn_dist.objectives.base import Needs, Objective, Related, Samples, View
from lzn_dist.objectives.contrast import hit


class SimCLR(Objective):
    """Of 2N views each is to find the other one of its image among the 2N − 1 that are not itself, by cosine similarity
    over the temperature. The encoder's head is the projection head."""

    @classmethod
    def declare(cls, config: Config) -> Needs:
        return Needs((View("image", 0), View("image", 1)), augmented=True)

    def relate(self, anchors: Mapping[View, Tensor], tables: Mapping[str, Tensor], samples: Samples) -> Related:
        own = [F.normalize(view, dim=1) for view in anchors.values()]
        everyone = [self.gather(view) for view in own]
        losses, hits = [], []
        for view in range(2):
            others, partners = (own[view] @ everyone[which].T for which in (view, 1 - view))
            others = others.scatter(1, samples.position[:, None], -torch.inf)  # not itself
            logits = torch.cat((partners, others), 1) / self.config.contrast.temperature
            losses.append(F.cross_entropy(logits, samples.position))
            hits.append(hit(logits, samples.position))
        loss = torch.stack(losses).mean()
        return Related((), loss, {"partner_found": torch.stack(hits).mean()})
