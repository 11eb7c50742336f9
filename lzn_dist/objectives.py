"""What each task optimises (arXiv 2509.15591, sections 3.1 to 3.3).

Every objective has three stages: **encode** (networks, each sample by itself) → **couple** (the zones: all samples of
the global batch, no network) → **decode** (networks, each sample by itself). One forward runs them one after the other;
gradient caching (`lzn_dist.distributed.grad_cache`) runs the outer two in micro-batches.

An objective sees this rank's samples, and the anchors of the global batch through `gather` (or a ring of them, through
`field`); its losses are means over the rank's samples (see `gather_anchors` for why that is right). It knows no process
group and no engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lzn_dist.config import Config
from lzn_dist.flow import path
from lzn_dist.keyed_random import make_key, normal, uniform
from lzn_dist.networks import Networks
from lzn_dist.stopwatch import Stopwatch
from lzn_dist.zones import FieldFactory, align, alignment_loss, compute_latents


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


@dataclass
class Coupling:
    """What the zones make of the global batch's anchors.

    latents [b, D] of the rank's samples; loss: the part of the objective that needs no decoder, or None; parts: what
    is worth watching.
    """

    latents: Tensor
    loss: Tensor | None
    parts: dict[str, Tensor]


Gather = Callable[[Tensor], Tensor]


@dataclass
class Objective:
    """A task's loss as a function of networks and samples.

    gather: [b, ...] → [N, ...] over ranks, differentiable. field: makes the zones' field of this rank's block of
    anchors, where these are not gathered (None: of all anchors).
    """

    config: Config
    gather: Gather
    field: FieldFactory | None = None
    watch: Stopwatch = dataclasses.field(default_factory=Stopwatch)

    def __call__(self, networks: Networks, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss that is optimised, and its parts (detached); scalars, still on the device."""
        anchors = [self.encode(networks, samples, view) for view in range(self.views)]
        coupling = self.couple(anchors, self.label_anchors(networks), samples)
        parts, total = dict(coupling.parts), coupling.loss
        if self.decodes:
            flow = parts["loss_flow"] = self.decode(networks, samples, coupling.latents)
            total = flow if total is None else flow + total
        assert total is not None
        return total, {name: value.detach() for name, value in parts.items()}

    @property
    def views(self) -> int:
        """How many views of an image are encoded."""
        return 2 if self.config.task == "representation" else 1

    @property
    def decodes(self) -> bool:
        return self.config.task != "representation"

    # ── encode ──────────────────────────────────────────────────────────────────────────────────────────────────

    def encode(self, networks: Networks, samples: Samples, view: int) -> Tensor:
        """Anchors [b, D] of a view, in float32 at least."""
        with self.watch("encode"), self._autocast(samples.index):
            key = self._keys("dropout/encoder", samples, view)
            anchors: Tensor = networks.encoder(samples.views[view], key=key)
        return anchors if anchors.dtype == torch.float64 else anchors.float()

    def label_anchors(self, networks: Networks) -> Tensor | None:
        """Anchors [K, D] of the classes where the task has them; never autocast."""
        if networks.label_anchors is None:
            return None
        anchors: Tensor = networks.label_anchors()
        return anchors

    # ── couple ──────────────────────────────────────────────────────────────────────────────────────────────────

    def couple(self, anchors: list[Tensor], labels: Tensor | None, samples: Samples) -> Coupling:
        """anchors: [b, D] a view; labels: [K, D] or None. Collective where there are several ranks."""
        with self.watch("flow"):
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

    # ── decode ──────────────────────────────────────────────────────────────────────────────────────────────────

    def decode(self, networks: Networks, samples: Samples, latents: Tensor) -> Tensor:
        """Rectified flow's loss under the samples' latents [b, D] (arXiv 2209.03003, equation 1): a scalar."""
        images = samples.views[0]
        with self.watch("decode"):
            noise = normal(self._keys("flow/noise", samples), images.shape[1:], images.dtype)
            t = path.times(uniform(self._keys("flow/time", samples), (), images.dtype), self.config.flow.t_min)
            point = path.interpolate(noise, images, t)
            assert networks.decoder is not None
            labels = samples.labels if self.config.task == "joint" else None
            with self._autocast(samples.index):
                velocity: Tensor = networks.decoder(
                    point.x_t, t, latents.to(images.dtype), labels=labels, key=self._keys("dropout/decoder", samples)
                )
            return path.loss(velocity.to(images.dtype), point)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _keys(self, stream: str, samples: Samples, *more: int) -> Tensor:
        """A key a sample: int64 [b]."""
        batch = torch.tensor(samples.batch, device=samples.index.device)
        return make_key(self.config.seed, stream, batch, samples.index, *more)

    def _autocast(self, like: Tensor) -> torch.autocast:
        """The networks alone run in bfloat16: their weights, the zones and the losses stay in float32."""
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
