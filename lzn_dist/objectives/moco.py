"""MoCo v2 (arXiv 1911.05722, algorithm 1; arXiv 2003.04297): a momentum encoder's keys and a queue of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lzn_dist.config import Config, ConfigError
from lzn_dist.keyed_random import make_key, normal
from lzn_dist.networks import Networks
from lzn_dist.objectives.base import Gather, Needs, Objective, Related, Samples, View, Weights
from lzn_dist.objectives.contrast import hit


class MoCo(Objective):
    """The first view of an image is to find the key of its second view among the keys of earlier batches. The momentum
    encoder and the queue are whole on every rank; the queue takes the keys of the global batch after each step that
    is taken, in the batch's order. No batch statistics: nothing has to be shuffled between ranks.
    """

    @classmethod
    def declare(cls, config: Config) -> Needs:
        if config.contrast.queue % config.data.global_batch:
            raise ConfigError(
                f"contrast.queue={config.contrast.queue} is no multiple of data.global_batch={config.data.global_batch}"
            )
        return Needs((View("image"),), augmented=True, without_gradient=(View("image", 1),))

    def __init__(self, config: Config, gather: Gather, networks: Networks) -> None:
        super().__init__(config, gather)
        encoder = networks.find("image", "encoder")
        assert encoder is not None
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        like = next(networks.parameters())
        size = config.contrast.queue, config.latent.dim
        rows = torch.arange(size[0], device=like.device)
        self.queue = F.normalize(normal(make_key(config.seed, "moco/queue", rows), (size[1],), like.dtype), dim=1)
        self.filled = torch.zeros(1, dtype=torch.int64)  # keys that went in so far
        self._keys_to_come = self.queue[:0]

    def relate(self, anchors: Mapping[View, Tensor], tables: Mapping[str, Tensor], samples: Samples) -> Related:
        queries, keys = F.normalize(anchors[View("image")], dim=1), self._encode_keys(samples)
        self._keys_to_come = self.gather(keys)
        positive = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat((positive, queries @ self.queue.T), 1) / self.config.contrast.temperature
        target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        loss = F.cross_entropy(logits, target)
        return Related((), loss, {"partner_found": hit(logits, target)})

    @torch.no_grad()
    def _encode_keys(self, samples: Samples) -> Tensor:
        """Unit keys [b, D] of the second view."""
        encoder = self._network(self.key_encoder)
        keys = [
            encoder(part.view(View("image", 1)), key=self._keys("dropout/encoder", part, 1)).to(self.queue.dtype)
            for part in samples.parts(self.config.micro_batch)
        ]
        return F.normalize(torch.cat(keys), dim=1)

    @torch.no_grad()
    def after_step(self, weights: Weights) -> None:
        found = weights("image.encoder")
        own = dict(self.key_encoder.named_parameters())
        ends = [found[name].to(p) for name, p in own.items()]
        torch._foreach_lerp_(list(own.values()), ends, 1.0 - self.config.contrast.momentum)
        start, count = int(self.filled) % len(self.queue), len(self._keys_to_come)
        self.queue[start : start + count] = self._keys_to_come  # the queue's length is a multiple of the batch
        self.filled += count

    def state(self) -> dict[str, Tensor]:
        keys = {f"key_encoder.{name}": p.detach() for name, p in self.key_encoder.named_parameters()}
        return {**keys, "queue": self.queue, "filled": self.filled}
