"""Images: encoded by any network from pixels to D numbers, decoded by rectified flow under the latent."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lzn_dist.data import Batch, augment, to_unit_range
from lzn_dist.flow import invert, path, sample
from lzn_dist.keyed_random import normal, uniform
from lzn_dist.modalities.base import Keys, Modality, Network, shared_mean


class Image(Modality):
    """[b, c, h, w] in [−1, 1]."""

    name: ClassVar[str] = "image"
    most_views: ClassVar[int] = 2

    def stream(self, name: str) -> str:
        return name

    def given(self) -> dict[str, Any]:
        return {"image_size": self.config.data.image_size, "image_channels": self.config.data.image_channels}

    def views(self, batch: Batch, index: Tensor, count: int, augmented: bool) -> tuple[Tensor, ...]:
        """augmented: two views by the policy data.views; else the image, perhaps mirrored (data.flip)."""
        data, seed = self.config.data, self.config.seed
        images = [to_unit_range(view) for view in batch.pixels.to(index.device, non_blocking=True)]
        if augmented and data.views != "none":
            policy = augment.SimCLRPolicy() if data.views == "simclr" else augment.DigitsPolicy()
            return augment.make_views(images, batch.index, batch.epoch, seed, policy)
        return (augment.random_flip(images[0], index, batch.epoch, seed) if data.flip else images[0],)

    def decoding_loss(
        self, decoder: Network, samples: Tensor, latents: Tensor, labels: Tensor | None, keys: Keys,
        shares: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Rectified flow's (arXiv 2209.03003, equation 1)."""
        noise = normal(keys("flow/noise"), samples.shape[1:], samples.dtype)
        t = path.times(uniform(keys("flow/time"), (), samples.dtype), self.config.flow.t_min)
        point = path.interpolate(noise, samples, t)
        velocity = decoder(point.x_t, t, latents.to(samples.dtype), labels=labels, key=keys("dropout/decoder"))
        velocity = velocity.to(samples.dtype)
        if shares is None:
            return path.loss(velocity, point)
        return shared_mean((velocity - point.dx_t).square().flatten(1).mean(1), shares)

    @torch.no_grad()
    def walk(
        self, decoder: Network, x: Tensor, latents: Tensor, labels: Tensor | None, *, to_noise: bool,
        guidance: float = 1.0, sampler: Literal["euler", "dopri5"] | None = None, steps: int | None = None,
    ) -> tuple[Tensor, float]:  # fmt: skip
        """From noise [n, c, h, w] to images, or back, under latents [n, D] and labels int64 [n]; and how often the
        decoder was evaluated (NFE), on average over the samples. sampler, steps: default: the configuration's.

        guidance g: the velocity is v₀ + g (v − v₀), v₀ without condition (latents of 0 and no label), as a decoder with
        `condition_dropout` knows it (classifier-free guidance, arXiv 2207.12598); 1: v.
        """
        flow = self.config.flow

        def velocity(t: Tensor, x_t: Tensor) -> Tensor:
            given = decoder(x_t, t.expand(len(x_t)), latents.to(x_t.dtype), labels=labels).to(x_t.dtype)
            if guidance == 1.0:
                return given
            none = None if labels is None else torch.full_like(labels, -1)
            free = decoder(x_t, t.expand(len(x_t)), torch.zeros_like(latents).to(x_t.dtype), labels=none).to(x_t.dtype)
            return free + guidance * (given - free)

        solve = invert if to_noise else sample
        walked = solve(
            velocity,
            x,
            method=sampler or flow.sampler,
            steps=flow.sampler_steps if steps is None else steps,
            t_min=flow.t_min,
        )
        return walked.x, float(walked.nfe) * (1 if guidance == 1.0 else 2)
