"""Anchors → latents → classes: the zones of a reference set, and of the labels (arXiv 2509.15591, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lzn_dist.inference.encoding import EncodingModel, MissingCapability
from lzn_dist.inference.inputs import Images, Labels, Texts, as_count, as_labels
from lzn_dist.keyed_random import make_key, normal
from lzn_dist.modalities import Label
from lzn_dist.zones import align, compute_latents, latents_beside, nearest_anchor

DRAWS = 1 << 14  # latents that are flowed at once for class probabilities
What = Literal["features", "anchor", "latent", "map"]


class LatentModel(EncodingModel):
    """The zones beside the encoders. See `lzn_dist.inference.LZN`."""

    @torch.no_grad()
    def embed(self, images: Images, what: What = "features", *, seed: int = 0, first: int = 0) -> Tensor:
        """Of images [b, c, h, w]: features [b, F] before the encoder's head; or their anchor [b, D], their latent
        [b, D] at the centre of its zone (`latents`), or the encoder's last feature map [b, F', h', w'].

        Raises MissingCapability where the model has no such thing.
        """
        if what == "anchor":
            return self.anchors(images)
        if what == "latent":
            return self.latents(images, 0.0, seed, first)
        if what not in ("features", "map"):
            raise ValueError(f"what must be features, anchor, latent or map, not {what!r}")
        encoder, images = self._encoder(), self._images(images)
        function = getattr(encoder, "features" if what == "features" else "feature_map", None)
        if function is None:
            raise MissingCapability(f"{type(encoder).__name__} gives no {what} of images")
        with self._autocast():
            found = torch.cat([function(self._ready(part)) for part in images.split(self.chunk)])
        return found if found.dtype == torch.float64 else found.float()

    def latents(
        self, images: Images | None = None, noise_scale: float | None = None, seed: int = 0, first: int = 0, *,
        texts: Texts | None = None,
    ) -> Tensor:  # fmt: skip
        """Latents [b, D] of images, or of texts, each seen among the reference's anchors and its own.

        noise_scale: how far from the zone's centre (default: the configuration's); samples are numbered from `first`.
        The solver is the configuration's. Raises FileNotFoundError where the model has no reference and the run's data,
        which it would be made of, is not there.
        """
        if (images is None) == (texts is None):
            raise ValueError("give images or texts")
        if texts is not None:
            return self._in_reference("text", self.embed_text(texts), noise_scale, seed, first)
        return self._in_reference("image", self.anchors(images), noise_scale, seed, first)

    @torch.no_grad()
    def _in_reference(self, name: str, anchors: Tensor, noise_scale: float | None, seed: int, first: int) -> Tensor:
        latent = self.config.latent
        scale = latent.noise_scale if noise_scale is None else noise_scale
        samples = torch.arange(first, first + len(anchors), device=anchors.device)
        noise = self.latent_noise(anchors, seed, samples) * scale
        reference = self.reference_anchors(name).to(anchors)
        return latents_beside(
            anchors, noise, reference, solver=latent.solver, steps=latent.steps, backend=self.config.backend
        )

    def reference_anchors(self, name: str) -> Tensor:
        """Anchors [N, D] of the reference set of a data type, image or text, among which its samples are seen."""
        if name not in self.reference:
            from lzn_dist.training.centres import reference_anchors  # not needed where the reference is at hand

            try:
                found = reference_anchors(
                    self.networks, self.config, [name], self.reference_size, self._tokenizer, self._show
                )[name]
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"a latent depends on the anchors of other samples, and the training data to take them from is not "
                    f"there ({error}): where it is, `lzn_dist export` stores them with the model"
                ) from error
            self.reference[name] = self._placed(name, found.to(self.device))
        return self.reference[name]

    @torch.no_grad()
    def anchors_to_latents(
        self, anchors: Tensor, noise_scale: float | None = None, seed: int = 0, samples: Tensor | None = None
    ) -> Tensor:
        """Latents [b, D] of a batch's anchors [b, D]; samples: int64 [b] numbers that address the noise (0, 1, …)."""
        latent = self.config.latent
        scale = latent.noise_scale if noise_scale is None else noise_scale
        if samples is None:
            samples = torch.arange(len(anchors), device=anchors.device)
        noise = self.latent_noise(anchors, seed, samples) * scale
        return compute_latents(anchors, noise, solver=latent.solver, steps=latent.steps, backend=self.config.backend)

    @staticmethod
    def latent_noise(anchors: Tensor, seed: int, samples: Tensor) -> Tensor:
        """The noise [b, D], of scale 1, that places the samples int64 [b] of these anchors in their zones."""
        return normal(make_key(seed, "evaluate/latent", samples), anchors.shape[1:], anchors.dtype)

    # ── latents → classes ───────────────────────────────────────────────────────────────────────────────────────────

    def label_anchors(self) -> Tensor:
        """Anchors [K, D] of the classes, in float32 at least."""
        found = self.networks.find("label", "encoder")
        if found is None:
            raise MissingCapability(
                f"a {self.config.task} model has no label anchors: it cannot classify or take labels"
            )
        with torch.no_grad():
            anchors: Tensor = found()
        kind = Label(self.config)
        anchors = anchors if anchors.dtype == torch.float64 else anchors.float()
        return kind.placed(anchors, anchors.mean(0) if kind.centred else None)

    @torch.no_grad()
    def label_latents(self, labels: Tensor, seed: int = 0, first: int = 0, noise_scale: float = 1.0) -> Tensor:
        """A latent [n, D] from the zone of each label, int64 [n]; sample numbers count from ``first``.

        noise_scale: 1 for a random one, 0 for the zone's centre. Euler from the label's anchor over all label anchors,
        equally weighted (paper, section 3.3).
        """
        anchors = self.label_anchors()
        labels = self._check_labels(labels)
        samples = torch.arange(first, first + len(labels), device=labels.device)
        noise = normal(make_key(seed, "generate/latent", samples), anchors.shape[1:], anchors.dtype) * noise_scale
        return compute_latents(
            anchors[labels], noise, anchors, index=labels, solver="euler",
            steps=self.config.evaluation.alignment_steps, backend=self.config.backend,
        )  # fmt: skip

    @torch.no_grad()
    def read_class(self, latents: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """The class int64 [b] in whose zone each latent [b, D] lies: flow along the label anchors, take the nearest.

        class_weights [K]: the classes' frequencies π (any positive scale); default: equal.
        """
        anchors = self.label_anchors().to(latents.dtype)
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
        self, images: Images, noise_scale: float = 0.0, class_weights: Tensor | None = None, seed: int = 0,
        first: int = 0,
    ) -> Tensor:  # fmt: skip
        """Labels int64 [b] of images [b, c, h, w]: image → anchor → latent (`latents`) → class.

        noise_scale: 0 asks for the centre of the image's zone, 1 for a random point of it. A supervised model has no
        zones: its largest logit counts. Raises FileNotFoundError as `latents` does.
        """
        if self.has_logits:
            return self.anchors(images).argmax(1)
        self.label_anchors()
        return self.read_class(self.latents(images, noise_scale, seed, first), class_weights)

    @torch.no_grad()
    def class_probabilities(
        self, images: Images, draws: int = 64, noise_scale: float = 1.0, class_weights: Tensor | None = None,
        seed: int = 0, first: int = 0,
    ) -> Tensor:  # fmt: skip
        """[b, K]: of so many keyed draws of each image's latent, the share that ends at each class; a supervised
        model's are the softmax of its logits.

        noise_scale 1: all of the image's zone. Raises FileNotFoundError as `latents` does.
        """
        anchors = self.anchors(images)
        if self.has_logits:
            return anchors.softmax(1)
        classes = len(self.label_anchors())
        if as_count(draws) < 1:
            raise ValueError("draws must be 1 or more")
        found = [anchors.new_zeros(0, classes)]
        step = max(1, DRAWS // draws)
        for start in range(0, len(anchors), step):
            part = anchors[start : start + step].repeat_interleave(draws, 0)
            latents = self._in_reference("image", part, noise_scale, seed, (first + start) * draws)
            ends = F.one_hot(self.read_class(latents, class_weights), classes)
            found.append(ends.unflatten(0, (-1, draws)).to(anchors).mean(1))
        return torch.cat(found)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, or their numbers where they have none."""
        if not self._classes:
            from lzn_dist.data import ShardIndex

            data, names = self.config.data, list[str]()
            with suppress(OSError, ValueError):  # the data is not there: numbers will do
                names = list(ShardIndex.load(data.shards, data.cache, data.retry_seconds).classes)
            count = max(data.num_classes, 0)
            self._classes = tuple(names[:count]) + tuple(map(str, range(len(names), count)))
        return self._classes

    def classify_text(self, texts: Sequence[str], seed: int = 0) -> Tensor:
        """Labels int64 [b] of texts: text → anchor → latent at the centre of its zone → class."""
        self.label_anchors()
        return self.read_class(self.latents(None, 0.0, seed, texts=texts))

    def _label_tensor(self, labels: Labels, n: int) -> Tensor:
        return self._check_labels(as_labels(labels, n))

    def _check_labels(self, labels: Tensor) -> Tensor:
        count = self.config.data.num_classes if self.takes_labels else len(self.label_anchors())
        if bool(((labels < 0) | (labels >= count)).any()):
            raise ValueError(f"labels must be in 0..{count - 1}, got {int(labels.min())}..{int(labels.max())}")
        return labels.to(self.device, torch.int64)
