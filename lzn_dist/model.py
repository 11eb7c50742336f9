"""A trained Latent Zoning Network as one object: embed, generate, classify, reconstruct (arXiv 2509.15591, section 3).

The capabilities are compositions of the networks with the zones' two operations, anchors → latents and latents →
anchors. A latent depends on all anchors that it is computed with. Images are therefore taken in *fixed batches*:
`evaluation.batch` of them in the order given; a last, smaller batch is filled up with the first images, whose results
are not counted; fewer images than one batch are flowed among themselves.

All randomness is keyed by (seed, name, sample number): results do not depend on how a set is split into calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lzn_dist.config import Config
from lzn_dist.flow import invert, sample
from lzn_dist.keyed_random import make_key, normal
from lzn_dist.networks import Networks
from lzn_dist.zones import align, compute_latents, nearest_anchor

DECODE_CHUNK = 512  # images that go through the decoder at once


class MissingCapability(RuntimeError):
    """The model's task has no network for what was asked."""


@dataclass
class Generated:
    """images [n, c, h, w] in [−1, 1], the latents [n, D] and one-hot labels int64 [n] (or None) they came from."""

    images: Tensor
    latents: Tensor
    labels: Tensor | None


class LZN:
    """Networks with their configuration, ready to use. Puts the networks in evaluation mode.

    Where a task lacks a network (a representation model cannot classify), the method raises MissingCapability.
    """

    def __init__(self, networks: Networks, config: Config, step: int = 0) -> None:
        self.networks = networks.eval()
        self.config = config
        self.step = step

    @property
    def device(self) -> torch.device:
        return next(self.networks.parameters()).device

    @property
    def has_decoder(self) -> bool:
        return self.networks.decoder is not None

    @property
    def has_labels(self) -> bool:
        return self.networks.label_anchors is not None

    # ── images → features, anchors, latents ─────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Features [b, F] of images [b, c, h, w] in [−1, 1], before the encoder's head."""
        features: Tensor = self.networks.encoder.features(self._ready(images))  # type: ignore[operator]
        return features.float() if features.dtype == torch.bfloat16 else features

    @torch.no_grad()
    def anchors(self, images: Tensor) -> Tensor:
        """Anchors [b, D] of images [b, c, h, w], in float32 at least."""
        anchors: Tensor = self.networks.encoder(self._ready(images))
        return anchors if anchors.dtype == torch.float64 else anchors.float()

    def latents(self, images: Tensor, noise_scale: float | None = None, seed: int = 0) -> Tensor:
        """Latents [b, D] of images [b, c, h, w] over these images' anchors alone: give a fixed batch.

        noise_scale: how far from the zone's centre (default: the configuration's). The solver is the configuration's.
        """
        return self.anchors_to_latents(self.anchors(images), noise_scale, seed)

    @torch.no_grad()
    def anchors_to_latents(
        self, anchors: Tensor, noise_scale: float | None = None, seed: int = 0, samples: Tensor | None = None
    ) -> Tensor:
        """Latents [b, D] of a batch's anchors [b, D]; samples: int64 [b] numbers that address the noise (0, 1, …)."""
        latent = self.config.latent
        scale = latent.noise_scale if noise_scale is None else noise_scale
        if samples is None:
            samples = torch.arange(len(anchors), device=anchors.device)
        noise = normal(make_key(seed, "evaluate/latent", samples), anchors.shape[1:], anchors.dtype) * scale
        return compute_latents(anchors, noise, solver=latent.solver, steps=latent.steps, backend=self.config.backend)

    # ── labels ──────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def label_latents(self, labels: Tensor, seed: int = 0, first: int = 0) -> Tensor:
        """A random latent [n, D] from the zone of each label, int64 [n]; sample numbers count from ``first``.

        Euler from the label's anchor over all label anchors, equally weighted (paper, section 3.3).
        """
        anchors = self._label_anchors()
        labels = self._check_labels(labels)
        samples = torch.arange(first, first + len(labels), device=labels.device)
        noise = normal(make_key(seed, "generate/latent", samples), anchors.shape[1:], anchors.dtype)
        return compute_latents(
            anchors[labels], noise, anchors, index=labels, solver="euler",
            steps=self.config.evaluation.alignment_steps, backend=self.config.backend,
        )  # fmt: skip

    @torch.no_grad()
    def read_class(self, latents: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """The class int64 [b] in whose zone each latent [b, D] lies: flow along the label anchors, take the nearest.

        class_weights [K]: the classes' frequencies π (any positive scale); default: equal.
        """
        anchors = self._label_anchors().to(latents.dtype)
        targets = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
        log_weights = None
        if class_weights is not None:
            log_weights = (class_weights.to(anchors) / class_weights.sum()).log()
            targets += log_weights.argmax()  # the field is computed relative to a target that must be present
        result = align(
            latents, anchors, targets, log_weights=log_weights,
            steps=self.config.evaluation.alignment_steps, backend=self.config.backend,
        )  # fmt: skip
        return nearest_anchor(result.endpoint, anchors)

    def classify(
        self, images: Tensor, noise_scale: float = 0.0, class_weights: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        """Labels int64 [b] of images [b, c, h, w]: image → anchor → latent (over the fixed batch) → class.

        noise_scale: 0 asks for the centre of the image's zone, 1 for a random point of it.
        """
        self._label_anchors()
        found = []
        for rows, counted in self._fixed_batches(len(images)):
            anchors = self.anchors(images[rows % len(images)])
            latents = self.anchors_to_latents(anchors, noise_scale, seed, rows.to(self.device))
            found.append(self.read_class(latents[:counted], class_weights))
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=self.device)

    # ── latents → images ────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def decode(self, noise: Tensor, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images [n, c, h, w] in [−1, 1] from noise [n, c, h, w] under latents [n, D] and one-hot labels [n]."""
        return self._walk(noise, latents, labels, invert_path=False).clamp(-1.0, 1.0)

    @torch.no_grad()
    def encode_noise(self, images: Tensor, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """The noise [n, c, h, w] that `decode` would turn into these images under the same latents and labels."""
        return self._walk(self._ready(images), latents, labels, invert_path=True)

    def prior_latents(self, n: int, seed: int = 0, first: int = 0) -> Tensor:
        """n draws [n, D] from the prior N(0, I), sample numbers counting from ``first``."""
        samples = torch.arange(first, first + n, device=self.device)
        return normal(make_key(seed, "generate/latent", samples), (self.config.latent.dim,))

    def noise(self, n: int, seed: int = 0, first: int = 0) -> Tensor:
        """Rectified flow's noise [n, c, h, w] of samples ``first``, ``first`` + 1, …"""
        data = self.config.data
        samples = torch.arange(first, first + n, device=self.device)
        shape = (data.image_channels, data.image_size, data.image_size)
        return normal(make_key(seed, "generate/noise", samples), shape, self._dtype)

    def generate(
        self, n: int, labels: int | Tensor | None = None, seed: int = 0, *,
        zone: int | Tensor | None = None, first: int = 0,
    ) -> Tensor:  # fmt: skip
        """n images [n, c, h, w] in [−1, 1]; `generate_with_latents` says what the arguments mean."""
        return self.generate_with_latents(n, labels, seed, zone=zone, first=first).images

    def generate_with_latents(
        self, n: int, labels: int | Tensor | None = None, seed: int = 0, *,
        zone: int | Tensor | None = None, first: int = 0,
    ) -> Generated:  # fmt: skip
        """n samples, numbered from ``first``: generate(4) is generate(2) followed by generate(2, first=2).

        Without labels the latent is a prior draw; a joint model reads its class from the zone it lies in and gives the
        decoder that one-hot label. With labels (one for all, or int64 [n]) the latent is drawn from the label's zone,
        as published. ``zone`` draws it from the zone of another class than the one-hot label instead.
        Raises MissingCapability for labels where the model has none, ValueError for labels out of range.
        """
        self._decoder()
        if labels is None and zone is not None:
            raise ValueError("zone needs labels: which one-hot label should the decoder be given?")
        one_hot: Tensor | None = None
        if labels is not None:
            one_hot = self._label_tensor(labels, n)
            source = one_hot if zone is None else self._label_tensor(zone, n)
            latents = self.label_latents(source, seed, first)
        else:
            latents = self.prior_latents(n, seed, first)
            if self.has_labels:
                one_hot = self.read_class(latents)
        return Generated(self.decode(self.noise(n, seed, first), latents, one_hot), latents, one_hot)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, seed: int = 0) -> Tensor:
        """Images [b, c, h, w] inverted to noise under their own latents and decoded again (paper, section 3.1).

        A joint model's one-hot label is the class read from the latent: no label of the data is used.
        """
        result = []
        for rows, counted in self._fixed_batches(len(images)):
            batch = images[rows % len(images)]
            latents = self.anchors_to_latents(self.anchors(batch), None, seed, rows.to(self.device))[:counted]
            labels = self.read_class(latents) if self.has_labels else None
            result.append(self.decode(self.encode_noise(batch[:counted], latents, labels), latents, labels))
        return torch.cat(result) if result else self._ready(images)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _dtype(self) -> torch.dtype:
        dtype = next(self.networks.parameters()).dtype
        return torch.float32 if dtype == torch.bfloat16 else dtype

    def _ready(self, images: Tensor) -> Tensor:
        return images.to(self.device, self._dtype)

    def _fixed_batches(self, count: int) -> Iterator[tuple[Tensor, int]]:
        """Row numbers [batch] (those past ``count`` wrap round to the first) and how many of them count."""
        size = min(self.config.evaluation.batch, count)
        for start in range(0, count, max(size, 1)):
            yield torch.arange(start, start + size), min(size, count - start)

    def _walk(self, x: Tensor, latents: Tensor, labels: Tensor | None, invert_path: bool) -> Tensor:
        decoder, flow = self._decoder(), self.config.flow
        walk = invert if invert_path else sample
        result = []
        for start in range(0, len(x), DECODE_CHUNK):
            part = slice(start, start + DECODE_CHUNK)
            own = latents[part].to(x.dtype)
            own_labels = None if labels is None else labels[part]

            def velocity(t: Tensor, x_t: Tensor, own: Tensor = own, own_labels: Tensor | None = own_labels) -> Tensor:
                output: Tensor = decoder(x_t, t.expand(len(x_t)), own, labels=own_labels)
                return output

            result.append(walk(velocity, x[part], method=flow.sampler, steps=flow.sampler_steps, t_min=flow.t_min).x)
        return torch.cat(result) if result else x

    def _decoder(self) -> nn.Module:
        if self.networks.decoder is None:
            raise MissingCapability(f"a model of task={self.config.task} has no image decoder: it cannot make images")
        return self.networks.decoder

    def _label_anchors(self) -> Tensor:
        if self.networks.label_anchors is None:
            raise MissingCapability(
                f"a model of task={self.config.task} has no label anchors: it cannot classify or take labels"
            )
        with torch.no_grad():
            anchors: Tensor = self.networks.label_anchors()
        return anchors if anchors.dtype == torch.float64 else anchors.float()

    def _label_tensor(self, labels: int | Tensor, n: int) -> Tensor:
        if isinstance(labels, int):
            labels = torch.full((n,), labels)
        if labels.shape != (n,):
            raise ValueError(f"labels must be one label or int64 [{n}], got {[*labels.shape]}")
        return self._check_labels(labels)

    def _check_labels(self, labels: Tensor) -> Tensor:
        count = len(self._label_anchors())
        if bool(((labels < 0) | (labels >= count)).any()):
            raise ValueError(f"labels must be in 0..{count - 1}, got {int(labels.min())}..{int(labels.max())}")
        return labels.to(self.device, torch.int64)


def load(run_or_checkpoint: str | Path) -> LZN:
    """The model of a run's newest checkpoint, or of one checkpoint, with averaged (EMA) weights."""
    from lzn_dist.checkpoint import load_networks

    networks, config, step = load_networks(run_or_checkpoint)
    return LZN(networks, config, step)
