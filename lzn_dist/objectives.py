"""What each task optimises (arXiv 2509.15591, sections 3.1 to 3.3).

An objective sees this rank's samples, and the anchors of the global batch through `gather`; its losses are means over
the rank's samples (see `gather_anchors` for why that is right). It knows no process group and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from lzn_dist.config import Config
from lzn_dist.flow import path
from lzn_dist.keyed_random import make_key, normal, uniform
from lzn_dist.networks import Networks
from lzn_dist.zones import align, alignment_loss, compute_latents


@dataclass
class Samples:
    """This rank's share of a global batch.

    index: int64 [b], the samples' numbers in the data set: they address every random number, with the step.
    position: int64 [b], where they stand in the global batch. views: one or two [b, c, h, w] in [−1, 1]. labels [b].
    """

    step: int
    index: Tensor
    position: Tensor
    views: tuple[Tensor, ...]
    labels: Tensor


@dataclass
class Stopwatch:
    """Seconds spent in each named part of a step (host time; on CUDA the part that enqueues)."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + perf_counter() - start


Gather = Callable[[Tensor], Tensor]


@dataclass
class Losses:
    """total: what is optimised. parts: its terms and what is worth watching; scalars, still on the device."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass
class Objective:
    """A task's loss as a function of networks and samples. gather: [b, ...] → [N, ...] over ranks, differentiable."""

    config: Config
    gather: Gather
    watch: Stopwatch = field(default_factory=Stopwatch)

    def __call__(self, networks: Networks, samples: Samples) -> Losses:
        return _OBJECTIVES[self.config.task](self, networks, samples)

    def keys(self, stream: str, samples: Samples, *more: int) -> Tensor:
        """A key a sample: int64 [b]."""
        step = torch.tensor(samples.step, device=samples.index.device)
        return make_key(self.config.seed, stream, step, samples.index, *more)

    def encode(self, networks: Networks, samples: Samples, view: int) -> Tensor:
        """Anchors [b, D] of a view, in float32 at least."""
        with self.watch("encode"):
            anchors: Tensor = networks.encoder(samples.views[view], key=self.keys("dropout/encoder", samples, view))
        return anchors if anchors.dtype == torch.float64 else anchors.float()

    def latents(self, anchors: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
        """Latents [b, D] of the rank's samples, and the global batch's anchors [N, D]."""
        latent = self.config.latent
        with self.watch("flow"):
            everyone = self.gather(anchors)
            noise = normal(self.keys("latent", samples), (latent.dim,), anchors.dtype) * latent.noise_scale
            return compute_latents(
                anchors, noise, everyone, index=samples.position,
                solver=latent.solver, steps=latent.steps, backend=self.config.backend,
            ), everyone  # fmt: skip

    def alignment(
        self, latents: Tensor, anchors: Tensor, targets: Tensor, log_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The alignment loss, and the fraction of latents that end nearest to their target at the last step."""
        settings = self.config.alignment
        with self.watch("flow"):
            result = align(
                latents, anchors, targets, log_weights=log_weights, steps=settings.steps, backend=self.config.backend
            )
            loss = alignment_loss(result.log_probs, cutoff=settings.cutoff, kind=settings.kind)
            reached = (result.log_probs[-1].detach() > -0.6931).to(loss.dtype).mean()  # w_target > 1/2
        return loss, reached

    def rectified_flow(self, networks: Networks, samples: Samples, latents: Tensor, labels: Tensor | None) -> Tensor:
        """Rectified flow's loss under the samples' latents (arXiv 2209.03003, equation 1)."""
        images = samples.views[0]
        with self.watch("decode"):
            noise = normal(self.keys("flow/noise", samples), images.shape[1:], images.dtype)
            t = path.times(uniform(self.keys("flow/time", samples), (), images.dtype), self.config.flow.t_min)
            point = path.interpolate(noise, images, t)
            if networks.decoder is None:
                raise ValueError(f"task {self.config.task} needs a decoder")
            velocity = networks.decoder(
                point.x_t, t, latents.to(images.dtype), labels=labels, key=self.keys("dropout/decoder", samples)
            )
            return path.loss(velocity, point)


def _generation(objective: Objective, networks: Networks, samples: Samples) -> Losses:
    latents, _ = objective.latents(objective.encode(networks, samples, 0), samples)
    flow = objective.rectified_flow(networks, samples, latents, None)
    return Losses(flow, {"loss_flow": flow})


def _representation(objective: Objective, networks: Networks, samples: Samples) -> Losses:
    first, second = objective.encode(networks, samples, 0), objective.encode(networks, samples, 1)
    latents, everyone_first = objective.latents(first, samples)
    everyone_second = objective.gather(second)
    loss, reached = objective.alignment(latents, everyone_second, samples.position)
    if objective.config.alignment.both_directions:
        latents, _ = objective.latents(second, samples)
        back, _ = objective.alignment(latents, everyone_first, samples.position)
        loss = 0.5 * (loss + back)
    return Losses(loss, {"loss_alignment": loss, "aligned": reached})


def _joint(objective: Objective, networks: Networks, samples: Samples) -> Losses:
    settings = objective.config.alignment
    latents, _ = objective.latents(objective.encode(networks, samples, 0), samples)
    flow = objective.rectified_flow(networks, samples, latents, samples.labels)
    if networks.label_anchors is None:
        raise ValueError("task joint needs label anchors")
    anchors = networks.label_anchors().to(latents.dtype)
    log_weights = None
    if settings.class_weights:
        counts = torch.bincount(objective.gather(samples.labels), minlength=len(anchors)).to(anchors.dtype)
        log_weights = (counts / counts.sum()).log()
    loss, reached = objective.alignment(latents, anchors, samples.labels, log_weights)
    return Losses(flow + settings.weight * loss, {"loss_flow": flow, "loss_alignment": loss, "aligned": reached})


_OBJECTIVES = {"generation": _generation, "representation": _representation, "joint": _joint}
