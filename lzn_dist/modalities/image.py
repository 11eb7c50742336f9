"""Images: encoded by any network from pixels to D numbers, decoded by rectified flow under the latent."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lzn_dist.data import Batch, augment, to_unit_range
from lzn_dist.flow import invert, path, sample
from lzn_dist.keyed_random import normal, uniform
from lzn_dist.modalities.base import Keys, Modality, Network


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
        self, decoder: Network, samples: Tensor, latents: Tensor, labels: Tensor | None, keys: Keys
    ) -> Tensor:
        """Rectified flow's (arXiv 2209.03003, equation 1)."""
        noise = normal(keys("flow/noise"), samples.shape[1:], samples.dtype)
        t = path.times(uniform(keys("flow/time"), (), samples.dtype), self.config.flow.t_min)
        point = path.interpolate(noise, samples, t)
        velocity = decoder(point.x_t, t, latents.to(samples.dtype), labels=labels, key=keys("dropout/decoder"))
        return path.loss(velocity.to(samples.dtype), point)

    @torch.no_grad()
    def walk(
        self, decoder: Network, x: Tensor, latents: Tensor, labels: Tensor | None, *, to_noise: bool
    ) -> tuple[Tensor, float]:
        """From noise [n, c, h, w] to images, or back, under latents [n, D] and labels int64 [n]; and how often the
        decoder was evaluated (NFE), on average over the samples."""
        flow = self.config.flow

        def velocity(t: Tensor, x_t: Tensor) -> Tensor:
            return decoder(x_t, t.expand(len(x_t)), latents.to(x_t.dtype), labels=labels).to(x_t.dtype)

        solve = invert if to_noise else sample
        walked = solve(velocity, x, method=flow.sampler, steps=flow.sampler_steps, t_min=flow.t_min)
        return walked.x, float(walked.nfe)
