"""LZN's objective: latent computation, latent alignment, rectified flow (arXiv 2509.15591, sections 3.1 to 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lzn_dist.keyed_random import normal
from lzn_dist.objectives.base import Coupling, Objective, Samples
from lzn_dist.zones import FieldFactory, align, alignment_loss, compute_latents


@dataclass
class Zoning(Objective):
    """All three tasks. field: makes the zones' field of this rank's block of anchors, where these are not gathered
    (None: of all anchors)."""

    field: FieldFactory | None = None

    @property
    def views(self) -> int:  # type: ignore[override]
        return 2 if self.config.task == "representation" else 1

    @property
    def decodes(self) -> bool:  # type: ignore[override]
        return self.config.task != "representation"

    def couple(self, anchors: list[Tensor], labels: Tensor | None, samples: Samples) -> Coupling:
        if self.config.task == "representation":
            return self._couple_views(anchors[0], anchors[1], samples)
        latents = self._latents(anchors[0], self._everyone(anchors[0]), samples)
        if labels is None:
            return Coupling(latents, None, {})
        return self._couple_labels(latents, labels.to(latents.dtype), samples)

    def _everyone(self, anchors: Tensor) -> Tensor:
        return anchors if self.field is not None else self.gather(anchors)

    def _latents(self, anchors: Tensor, everyone: Tensor, samples: Samples) -> Tensor:
        latent = self.config.latent
        noise = normal(self._keys("latent", samples), (latent.dim,), anchors.dtype) * latent.noise_scale
        return compute_latents(
            anchors, noise, everyone, index=samples.position, solver=latent.solver, steps=latent.steps,
            backend=self.config.backend, store_every=self.config.flow_store_every, field=self.field,
        )  # fmt: skip

    def _alignment(
        self, latents: Tensor, anchors: Tensor, targets: Tensor, log_weights: Tensor | None, field: FieldFactory | None
    ) -> tuple[Tensor, Tensor]:
        """The alignment loss, and the fraction of latents that end nearest to their target at the last step."""
        settings = self.config.alignment
        result = align(
            latents, anchors, targets, log_weights=log_weights, steps=settings.steps, backend=self.config.backend,
            store_every=self.config.flow_store_every, field=field,
        )  # fmt: skip
        loss = alignment_loss(result.log_probs, cutoff=settings.cutoff, kind=settings.kind)
        reached = (result.log_probs[-1].detach() > -0.6931).to(loss.dtype).mean()  # w_target > 1/2
        return loss, reached

    def _couple_views(self, first: Tensor, second: Tensor, samples: Samples) -> Coupling:
        everyone_first, everyone_second = self._everyone(first), self._everyone(second)
        latents = self._latents(first, everyone_first, samples)
        loss, reached = self._alignment(latents, everyone_second, samples.position, None, self.field)
        if self.config.alignment.both_directions:
            back = self._latents(second, everyone_second, samples)
            loss = 0.5 * (loss + self._alignment(back, everyone_first, samples.position, None, self.field)[0])
        return Coupling(latents, loss, {"loss_alignment": loss, "aligned": reached})

    def _couple_labels(self, latents: Tensor, labels: Tensor, samples: Samples) -> Coupling:
        settings, log_weights = self.config.alignment, None
        if settings.class_weights:
            counts = torch.bincount(self.gather(samples.labels), minlength=len(labels)).to(labels.dtype)
            log_weights = (counts / counts.sum()).log()
        # every rank has all label anchors: their field is never a ring
        loss, reached = self._alignment(latents, labels, samples.labels, log_weights, None)
        return Coupling(latents, settings.weight * loss, {"loss_alignment": loss, "aligned": reached})
