"""CLIP's and SigLIP's losses of images and captions over the global batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lzn_dist.config import Config, ConfigError
from lzn_dist.modalities.base import shared_mean
from lzn_dist.objectives.base import Needs, Objective, Related, Samples, View

IMAGE, TEXT = View("image"), View("text")
MOST = 4.6052  # log of 100, the largest scale (arXiv 2103.00020, section 2.5)


class Contrast(Objective):
    """Cosines of images and captions times a scale, plus a bias, both learned (`LogitScale`). Equal captions of a batch
    are one: an image is right with any of them, a caption with any of its images. Samples without a caption are left
    out. Decoders are given unit anchors."""

    @classmethod
    def declare(cls, config: Config) -> Needs:
        for decoding in config.decode:
            if decoding.point != "anchor" or View.of(decoding.latents) not in (IMAGE, TEXT):
                raise ConfigError(
                    f"objective={config.objective} has no latents: in decode say point: anchor, of image or text"
                )
        labels = any(decoding.class_conditional for decoding in config.decode)
        return Needs((IMAGE, TEXT), ("logits",), config.decode, labels=labels)

    def relate(self, anchors: Mapping[View, Tensor], tables: Mapping[str, Tensor], samples: Samples) -> Related:
        scale, bias = tables["logits"].unbind()
        scale = scale.clamp(max=MOST).exp()
        images, texts = (F.normalize(anchors[view], dim=1) for view in (IMAGE, TEXT))
        captions, present = self.same(samples, "text"), self.present(samples, "image", "text")
        assert captions is not None
        pairs = torch.eq(captions[:, None], self.gather(captions))
        there = None if present is None else self.gather(present)
        directions = [(images, self.gather(texts))]
        if self.both:
            directions.append((texts, self.gather(images)))
        shares = self.shares(present, images)
        losses, hits = [], []
        for own, others in directions:
            logits = scale * own @ others.T + bias
            if there is not None:
                logits = logits.masked_fill(~there, -torch.inf)
            each = self.losses(logits, pairs, there)
            hit = pairs.gather(1, logits.detach().argmax(1, keepdim=True)).squeeze(1).to(each.dtype)
            losses.append(shared_mean(each, shares))
            hits.append(shared_mean(hit, shares))
        found = torch.stack(hits).mean()
        parts = self.watched(samples) | {"partner_found": found, "logit_scale": scale.detach()}
        placed = {IMAGE: images, TEXT: texts}
        views = [View.of(decoding.latents) for decoding in self.needs.decodes]
        shared = tuple(
            self.shares(self.present(samples, view.modality, decoding.what), images)
            for view, decoding in zip(views, self.needs.decodes, strict=True)
        )
        return Related(tuple(placed[view] for view in views), torch.stack(losses).mean(), parts, shared)

    both = True  # whether captions look for images too

    @abstractmethod
    def losses(self, logits: Tensor, pairs: Tensor, present: Tensor | None) -> Tensor:
        """[b] of logits [b, N]; pairs: bool [b, N], what belongs together; present: bool [N]."""


class CLIP(Contrast):
    """−log Σ_{j belongs to i} softmax_j(logits_i) (arXiv 2103.00020, figure 3; there with one partner), the mean of
    both directions."""

    def losses(self, logits: Tensor, pairs: Tensor, present: Tensor | None) -> Tensor:
        right = logits.masked_fill(~pairs, -torch.inf)
        return logits.logsumexp(1) - right.logsumexp(1)


class SigLIP(Contrast):
    """−Σ_j log σ(±logits_ij), + where j belongs to i, − where not (arXiv 2303.15343, equation 1)."""

    both = False

    def losses(self, logits: Tensor, pairs: Tensor, present: Tensor | None) -> Tensor:
        each = F.softplus(torch.where(pairs, -logits, logits))
        if present is not None:
            each = each.masked_fill(~present, 0.0)
        return each.sum(1)
