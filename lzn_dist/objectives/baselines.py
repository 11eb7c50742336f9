"""What LZN is compared with, in the same loop: encoders, data, augmentations, engines and evaluation are the same."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from lzn_dist.config import Config
from lzn_dist.keyed_random import make_key, normal
from lzn_dist.networks import Networks
from lzn_dist.objectives.base import Coupling, Gather, Objective, Samples, Weights


def _no_latents(samples: Samples) -> Tensor:
    return samples.views[0].new_zeros(len(samples), 0)


def _hit(logits: Tensor, target: Tensor) -> Tensor:
    """The fraction of rows whose largest logit is the target's."""
    return torch.eq(logits.detach().argmax(1), target).to(logits.dtype).mean()


class RectifiedFlow(Objective):
    """Rectified flow without latents (arXiv 2209.03003); with labels where the decoder is class-conditional."""

    views = 0
    decodes = True

    def couple(self, anchors: list[Tensor], labels: Tensor | None, samples: Samples) -> Coupling:
        return Coupling(_no_latents(samples), None, {})


class SupervisedClassification(Objective):
    """Cross-entropy of the first view's logits."""

    def couple(self, anchors: list[Tensor], labels: Tensor | None, samples: Samples) -> Coupling:
        (logits,) = anchors
        loss = F.cross_entropy(logits, samples.labels)
        return Coupling(_no_latents(samples), loss, {"train_accuracy": _hit(logits, samples.labels)})


class ContrastOfViews(Objective):
    """SimCLR's NT-Xent over the global batch (arXiv 2002.05709, equation 1).

    Of 2N views each is to find the other one of its image among the 2N − 1 that are not itself, by cosine similarity
    over the temperature. The encoder's head is the projection head.
    """

    views = 2

    def couple(self, anchors: list[Tensor], labels: Tensor | None, samples: Samples) -> Coupling:
        own = [F.normalize(view, dim=1) for view in anchors]
        everyone = [self.gather(view) for view in own]
        losses, hits = [], []
        for view in range(2):
            others, partners = (own[view] @ everyone[which].T for which in (view, 1 - view))
            others = others.scatter(1, samples.position[:, None], -torch.inf)  # not itself
            logits = torch.cat((partners, others), 1) / self.config.contrast.temperature
            losses.append(F.cross_entropy(logits, samples.position))
            hits.append(_hit(logits, samples.position))
        loss = torch.stack(losses).mean()
        return Coupling(_no_latents(samples), loss, {"partner_found": torch.stack(hits).mean()})


class MomentumContrast(Objective):
    """MoCo v2 (arXiv 1911.05722, algorithm 1; arXiv 2003.04297): a momentum encoder's keys and a queue of them.

    The first view of an image is to find the key of its second view among the keys of earlier batches. The momentum
    encoder and the queue are whole on every rank; the queue takes the keys of the global batch after each step that
    is taken, in the batch's order. No batch statistics: nothing has to be shuffled between ranks.
    """

    def __init__(self, config: Config, gather: Gather, networks: Networks) -> None:
        super().__init__(config, gather)
        assert networks.encoder is not None
        self.key_encoder = copy.deepcopy(networks.encoder).requires_grad_(False)
        like = next(networks.parameters())
        size = config.contrast.queue, config.latent.dim
        rows = torch.arange(size[0], device=like.device)
        self.queue = F.normalize(normal(make_key(config.seed, "moco/queue", rows), (size[1],), like.dtype), dim=1)
        self.filled = torch.zeros(1, dtype=torch.int64)  # keys that went in so far
        self._keys_to_come = self.queue[:0]

    def couple(self, anchors: list[Tensor], labels: Tensor | None, samples: Samples) -> Coupling:
        queries, keys = F.normalize(anchors[0], dim=1), self._encode_keys(samples)
        self._keys_to_come = self.gather(keys)
        positive = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat((positive, queries @ self.queue.T), 1) / self.config.contrast.temperature
        target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        loss = F.cross_entropy(logits, target)
        return Coupling(_no_latents(samples), loss, {"partner_found": _hit(logits, target)})

    @torch.no_grad()
    def _encode_keys(self, samples: Samples) -> Tensor:
        """Unit keys [b, D] of the second view."""
        with self._autocast(samples.index):
            keys = [
                self.key_encoder(part.views[1], key=self._keys("dropout/encoder", part, 1)).to(self.queue.dtype)
                for part in samples.parts(self.config.micro_batch)
            ]
        return F.normalize(torch.cat(keys), dim=1)

    @torch.no_grad()
    def after_step(self, weights: Weights) -> None:
        found = weights("encoder")
        own = dict(self.key_encoder.named_parameters())
        ends = [found[name].to(p) for name, p in own.items()]
        torch._foreach_lerp_(list(own.values()), ends, 1.0 - self.config.contrast.momentum)
        start, count = int(self.filled) % len(self.queue), len(self._keys_to_come)
        self.queue[start : start + count] = self._keys_to_come  # the queue's length is a multiple of the batch
        self.filled += count

    def state(self) -> dict[str, Tensor]:
        keys = {f"key_encoder.{name}": p.detach() for name, p in self.key_encoder.named_parameters()}
        return {**keys, "queue": self.queue, "filled": self.filled}
