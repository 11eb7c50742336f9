"""The stages that all objectives share.

**encode** (networks, each sample by itself) → **couple** (all samples of the global batch, no trained network) →
**decode** (networks, each sample by itself). One forward runs them one after the other; gradient caching
(`lzn_dist.training.grad_cache`) runs the outer two in micro-batches. An objective says how many views it encodes,
whether it decodes, and how it couples.

An objective sees this rank's samples, and what the other ranks encoded through `gather`; its losses are means over the
rank's samples (see `gather_anchors` for why that is right). It knows no process group and no engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lzn_dist.config import Config
from lzn_dist.flow import path
from lzn_dist.keyed_random import make_key, normal, uniform
from lzn_dist.networks import Networks


@dataclass
class Samples:
    """This rank's share of a global batch, or a part of it.

    batch: number of the global batch in the run; with index it addresses every random number. index: int64 [b], the
    samples' numbers in the data set. position: int64 [b], where they stand in the global batch. views: one or two
    [b, c, h, w] in [−1, 1]. labels: int64 [b].
    """

    batch: int
    index: Tensor
    position: Tensor
    views: tuple[Tensor, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def part(self, rows: slice) -> Samples:
        """Some of the samples."""
        return replace(
            self,
            index=self.index[rows],
            position=self.position[rows],
            views=tuple(view[rows] for view in self.views),
            labels=self.labels[rows],
        )

    def parts(self, size: int) -> list[Samples]:
        """All of them, ``size`` at a time (0: at once)."""
        size = size or len(self)
        return [self.part(slice(start, start + size)) for start in range(0, len(self), size)]


@dataclass
class Coupling:
    """What becomes of the global batch's anchors.

    latents [b, D] of the rank's samples, on which the decoder is conditioned ([b, 0]: on none); loss: the part of the
    objective that needs no decoder, or None; parts: what is worth watching.
    """

    latents: Tensor
    loss: Tensor | None
    parts: dict[str, Tensor]

    def assembled(self, flow: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss that is optimised, with rectified flow's where there is a decoder, and its parts (detached)."""
        parts, total = dict(self.parts), self.loss
        if flow is not None:
            parts["loss_flow"] = flow
            total = flow if total is None else flow + total
        assert total is not None
        return total, {name: value.detach() for name, value in parts.items()}


Gather = Callable[[Tensor], Tensor]
Weights = Callable[[str], Mapping[str, Tensor]]  # of a network: whole, by name within it, the same on every rank


@dataclass
class Objective(ABC):
    """A loss as a function of networks and samples. gather: [b, ...] → [N, ...] over ranks, differentiable."""

    config: Config
    gather: Gather

    views: ClassVar[int] = 1  # of an image, that are encoded with gradients
    decodes: ClassVar[bool] = False

    def __call__(self, networks: Networks, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss that is optimised, and its parts (detached); scalars, still on the device."""
        anchors = [self.encode(networks, samples, view) for view in range(self.views)]
        coupling = self.couple(anchors, self.label_anchors(networks), samples)
        return coupling.assembled(self.decode(networks, samples, coupling.latents) if self.decodes else None)

    def encode(self, networks: Networks, samples: Samples, view: int) -> Tensor:
        """The encoder's output [b, D] for a view, in float32 at least."""
        assert networks.encoder is not None
        with self._autocast(samples.index):
            key = self._keys("dropout/encoder", samples, view)
            anchors: Tensor = networks.encoder(samples.views[view], key=key)
        return anchors if anchors.dtype == torch.float64 else anchors.float()

    def label_anchors(self, networks: Networks) -> Tensor | None:
        """Anchors [K, D] of the classes where the task has them; never autocast."""
        if networks.label_anchors is None:
            return None
        anchors: Tensor = networks.label_anchors()
        return anchors

    @abstractmethod
    def couple(self, anchors: list[Tensor], labels: Tensor | None, samples: Samples) -> Coupling:
        """anchors: [b, D] a view; labels: [K, D] or None. Collective where there are several ranks."""

    def decode(self, networks: Networks, samples: Samples, latents: Tensor) -> Tensor:
        """Rectified flow's loss under the samples' latents [b, D] (arXiv 2209.03003, equation 1): a scalar."""
        images = samples.views[0]
        noise = normal(self._keys("flow/noise", samples), images.shape[1:], images.dtype)
        t = path.times(uniform(self._keys("flow/time", samples), (), images.dtype), self.config.flow.t_min)
        point = path.interpolate(noise, images, t)
        assert networks.decoder is not None
        labels = samples.labels if self.config.labels_decoder else None
        with self._autocast(samples.index):
            velocity: Tensor = networks.decoder(
                point.x_t, t, latents.to(images.dtype), labels=labels, key=self._keys("dropout/decoder", samples)
            )
        return path.loss(velocity.to(images.dtype), point)

    def after_step(self, weights: Weights) -> None:  # noqa: B027
        """After an optimiser step that was taken; nothing for most. Collective."""

    def state(self) -> dict[str, Tensor]:
        """What an objective remembers from step to step: whole tensors, the same on every rank, written into when a
        run is resumed; nothing for most."""
        return {}

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _keys(self, stream: str, samples: Samples, *more: int) -> Tensor:
        """A key a sample: int64 [b]."""
        batch = torch.tensor(samples.batch, device=samples.index.device)
        return make_key(self.config.seed, stream, batch, samples.index, *more)

    def _autocast(self, like: Tensor) -> torch.autocast:
        """The networks alone run in bfloat16: their weights, the zones and the losses stay in float32."""
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
