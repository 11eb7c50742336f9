"""Latents → images and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lzn_dist.inference.encoding import CHUNK, MissingCapability
from lzn_dist.inference.inputs import Images, Labels, Texts, as_count, as_labels, as_texts
from lzn_dist.inference.interpolation import slerp
from lzn_dist.inference.latents import LatentModel
from lzn_dist.keyed_random import make_key, normal
from lzn_dist.modalities import Image, Text

Sampler = Literal["euler", "dopri5"]


@dataclass
class Generated:
    """images [n, c, h, w] in [−1, 1], the latents [n, D] and labels int64 [n] (or None) that the decoder was given;
    nfe: how often the decoder was evaluated for a sample, on average."""

    images: Tensor
    latents: Tensor
    labels: Tensor | None
    nfe: float


class _Walk(NamedTuple):
    """How the decoder's flow is walked, where it is not as the configuration says."""

    guidance: float = 1.0
    sampler: Sampler | None = None
    steps: int | None = None


class GenerativeModel(LatentModel):
    """The decoders beside encoders and zones. See `lzn_dist.inference.LZN`."""

    @torch.no_grad()
    def decode(self, noise: Tensor, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images [n, c, h, w] in [−1, 1] from noise [n, c, h, w] under latents [n, D] and one-hot labels [n]."""
        return self._walk(noise, latents, labels, to_noise=False)[0].clamp(-1.0, 1.0)

    @torch.no_grad()
    def encode_noise(self, images: Images, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """The noise [n, c, h, w] that `decode` would turn into these images under the same latents and labels."""
        return self._walk(self._ready(self._images(images)), latents, labels, to_noise=True)[0]

    def prior_latents(self, n: int, seed: int = 0, first: int = 0) -> Tensor:
        """n draws [n, D] from the prior N(0, I), sample numbers counting from ``first``."""
        samples = torch.arange(first, first + n, device=self.device)
        return normal(
            make_key(seed, "generate/latent", samples), (self.config.latent.dim if self.needs.latents else 0,)
        )

    def noise(self, n: int, seed: int = 0, first: int = 0) -> Tensor:
        """Rectified flow's noise [n, c, h, w] of samples ``first``, ``first`` + 1, …"""
        data = self.config.data
        samples = torch.arange(first, first + n, device=self.device)
        shape = (data.image_channels, data.image_size, data.image_size)
        return normal(make_key(seed, "generate/noise", samples), shape, self._dtype)

    def generate(
        self, n: int | None = None, labels: Labels | None = None, seed: int = 0, *,
        texts: Texts | None = None, images: Images | None = None, zone: Labels | None = None, first: int = 0,
        guidance: float = 1.0, sampler: Sampler | None = None, steps: int | None = None,
    ) -> Tensor:  # fmt: skip
        """n images [n, c, h, w] in [−1, 1]; `generate_with_latents` says what the arguments mean."""
        return self.generate_with_latents(
            n, labels, seed, texts=texts, images=images, zone=zone, first=first, guidance=guidance, sampler=sampler,
            steps=steps,
        ).images  # fmt: skip

    def generate_with_latents(
        self, n: int | None = None, labels: Labels | None = None, seed: int = 0, *,
        texts: Texts | None = None, images: Images | None = None, zone: Labels | None = None, first: int = 0,
        guidance: float = 1.0, sampler: Sampler | None = None, steps: int | None = None,
    ) -> Generated:  # fmt: skip
        """n samples, numbered from ``first``: generate(4) is generate(2) followed by generate(2, first=2). n may be
        left out where labels, texts or images say how many.

        Without labels the latent is a prior draw; a joint model reads its class from the zone it lies in and gives the
        decoder that one-hot label. With labels (one for all, or int64 [n]) the latent is drawn from the label's zone,
        as published. ``zone`` draws it from the zone of another class than the one-hot label instead. A decoder that
        takes labels without zones gets prior latents, and where no labels are asked for, the classes in turn. With
        texts or images (one for all, or n) the latent is the centre of that one's zone (`given`).
        guidance: classifier-free, for decoders with `condition_dropout`; 1: none. sampler and steps: instead of the
        configuration's flow.sampler (euler or dopri5) and flow.sampler_steps.
        Raises MissingCapability for labels or texts where the model has none, ValueError for labels out of range.
        """
        self._decoder()
        if texts is not None and images is not None:
            raise ValueError("give texts or images, not both")
        if images is not None:
            images = self._images(images)
        if texts is not None:
            texts = as_texts(texts)
        others = texts if texts is not None else images
        if n is None:
            counted = labels if others is None or (len(others) == 1 and labels is not None) else others
            if counted is None or isinstance(counted, str) or not hasattr(counted, "__len__"):
                raise ValueError("n: how many images? It may be left out where labels, texts or images say so")
            n = len(counted)
        n = as_count(n)
        walk = _Walk(guidance, sampler, None if steps is None else as_count(steps))
        if others is not None:
            return self._generate_from(texts, images, n, labels, seed, first, walk)
        if labels is None and zone is not None:
            raise ValueError("zone needs labels: which one-hot label should the decoder be given?")
        if not self.draws_prior and not (labels is not None and self.has_labels):
            raise MissingCapability(
                "this decoder is given anchors (point: anchor), not latents of the prior: give texts"
            )
        if labels is None and self.takes_labels and not self.has_labels:
            labels = torch.arange(first, first + n) % self.config.data.num_classes
        one_hot = None if labels is None else self._label_tensor(labels, n)
        if one_hot is not None and (self.has_labels or zone is not None):
            chosen = one_hot if zone is None else self._label_tensor(zone, n)
            latents = self.label_latents(chosen, seed, first) if self.draws_prior else self.label_anchors()[chosen]
        else:
            latents = self.prior_latents(n, seed, first)
            if self.has_labels:
                one_hot = self.read_class(latents)
        own = one_hot if self.takes_labels else None
        made, nfe = self._walk(self.noise(n, seed, first), latents, own, to_noise=False, walk=walk)
        return Generated(made.clamp(-1.0, 1.0), latents, one_hot, nfe)

    def _generate_from(
        self, texts: list[str] | None, images: Tensor | None, n: int, labels: Labels | None, seed: int, first: int,
        walk: _Walk,
    ) -> Generated:  # fmt: skip
        count = len(texts if texts is not None else images)  # type: ignore[arg-type]
        if count not in (1, n):
            raise ValueError(f"{'images' if texts is None else 'texts'} must be one or {n}, got {count}")
        given = self.given("image", texts=texts, images=images, seed=seed)
        given = given.expand(n, -1) if count == 1 else given
        own = self.decoder_labels(given, labels, n) if self.takes_labels else None
        made, nfe = self._walk(self.noise(n, seed, first), given, own, to_noise=False, walk=walk)
        return Generated(made.clamp(-1.0, 1.0), given, own, nfe)

    def decoder_labels(self, given: Tensor, labels: Labels | None, n: int) -> Tensor:
        """The one-hot labels of a decoder that takes some: those given, else read from latents, else none."""
        if labels is not None:
            return self._label_tensor(labels, n)
        if self.has_labels and self.draws_prior:
            return self.read_class(given)
        return torch.full((n,), -1, dtype=torch.int64, device=given.device)

    @property
    def draws_prior(self) -> bool:
        """Whether the image decoder is given latents, which can be drawn from the prior."""
        return self._point("image") == "latent"

    def _point(self, what: str) -> str:
        """What a decoder is given: latent or anchor."""
        return next((decoding.point for decoding in self.needs.decodes if decoding.what == what), "latent")

    # ── what decoders are given ─────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def given(
        self, what: str, *, images: Images | None = None, texts: Sequence[str] | None = None,
        labels: Labels | None = None, noise_scale: float = 0.0, seed: int = 0, first: int = 0,
    ) -> Tensor:  # fmt: skip
        """What the decoder of ``what`` (image or text) is given [n, D] for images, texts or labels (one of them): their
        latents, or anchors where it was trained on these.

        Latents of images and texts are seen among the reference's anchors (`latents`), those of labels among all
        labels'. noise_scale: 0 for the centres of the zones.
        """
        if sum(part is not None for part in (images, texts, labels)) != 1:
            raise ValueError("give one of images, texts and labels")
        if labels is not None:
            chosen = self._label_tensor(labels, len(labels) if hasattr(labels, "__len__") else 1)
            if self._point(what) == "anchor":
                return self.label_anchors()[chosen]
            return self.label_latents(chosen, seed, first, noise_scale)
        if self._point(what) == "anchor":
            anchors = self.anchors(images) if images is not None else self.embed_text(texts or [])
            return anchors if self.has_latents else F.normalize(anchors, dim=1)
        if not self.has_latents:
            return torch.zeros(len(self._images(images)), 0, device=self.device, dtype=self._dtype)
        return self.latents(images, noise_scale, seed, first, texts=texts)

    # ── captions ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def has_captions(self) -> bool:
        """Whether captions can be written."""
        return self.networks.find("text", "decoder") is not None

    @torch.no_grad()
    def caption(
        self, images: Images | None = None, *, texts: Sequence[str] | None = None, labels: Labels | None = None,
        seed: int = 0, first: int = 0, temperature: float = 0.0, top_p: float = 1.0, beams: int = 1,
    ) -> list[str]:  # fmt: skip
        """A caption of each image, text or label (one of them), from the centre of its zone.

        temperature 0: the likeliest word each time, or with beams > 1 the likeliest caption; above: drawn, of the words
        that have top_p of the probability together. Deterministic by seed; samples are numbered from `first`. Raises
        MissingCapability.
        """
        decoder = self.networks.find("text", "decoder")
        if decoder is None:
            raise MissingCapability("this model has no text decoder: it cannot write captions")
        given = self.given("text", images=images, texts=texts, labels=labels, seed=seed, first=first)
        conditional = any(d.class_conditional for d in self.needs.decodes if d.what == "text")
        own = None
        if conditional:
            own = self.decoder_labels(given, labels, len(given))
        keys = make_key(seed, "caption/token", torch.arange(first, first + len(given), device=given.device))
        kind, written = Text(self.config), []
        for start in range(0, len(given), CHUNK):
            part = slice(start, start + CHUNK)
            with self._autocast():
                tokens = kind.write(
                    decoder, given[part], None if own is None else own[part], keys[part], temperature=temperature,
                    top_p=top_p, beams=beams,
                )  # fmt: skip
            written += self.tokenizer.decode(tokens)
        return written

    # ── images that are given, seen again ───────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def reconstruct(self, images: Images, seed: int = 0, labels: Labels | None = None, first: int = 0) -> Tensor:
        """Images [b, c, h, w] inverted to noise under their own latents and decoded again (paper, section 3.1).

        A joint model's one-hot label is the class read from the latent: no label of the data is used. A decoder that
        takes labels without zones needs them, int64 [b]. Raises FileNotFoundError as `latents` does.
        """
        self._decoder()
        images = self._images(images)
        if not self.draws_prior or not self.has_latents:
            latents = self.given("image", images=images)
        else:
            latents = self.latents(images, None, seed, first)
        own = self._own_labels(latents, labels)
        return self.decode(self.encode_noise(images, latents, own), latents, own)

    @torch.no_grad()
    def interpolate(
        self, start: Any, end: Any, n: int = 9, seed: int = 0, labels: Labels | None = None
    ) -> Tensor:  # fmt: skip
        """n images [n, c, h, w] on the way from one image or text to another, along the great circle between what the
        decoder is given for them (`given`).

        A str is a text where the model has a text encoder, else a path, as a Path is. Between images, their own noise
        is interpolated as well, so that the first and the last are these images again; with a text, all have one
        noise. A joint model's one-hot labels are read on the way; a decoder that takes labels without zones gets the
        nearer end's, of labels int64 [2]. Raises FileNotFoundError as `latents` does.
        """
        self._decoder()
        ends = [end_ if isinstance(end_, str) and self.has_text else self._images(end_) for end_ in (start, end)]
        if any(not isinstance(part, str) and len(part) != 1 for part in ends):
            raise ValueError("start and end must be one image or one text each")
        if as_count(n) < 2:
            raise ValueError(f"n must be 2 or more, not {n}")
        given = torch.cat(
            [
                self.given("image", texts=[part], seed=seed) if isinstance(part, str)
                else self.given("image", images=part, noise_scale=self.config.latent.noise_scale, seed=seed)
                for part in ends
            ]
        )  # fmt: skip
        weights = torch.linspace(0, 1, n, device=given.device)
        path = slerp(given[0], given[1], weights)
        noise = self.noise(1, seed).expand(n, -1, -1, -1)
        nearer = None
        if labels is not None and not self.has_labels:
            nearer = as_labels(labels, 2)[(weights > 0.5).long().cpu()]
        own = self.decoder_labels(path, nearer, n) if self.takes_labels else None
        if all(isinstance(part, Tensor) for part in ends):
            ends_labels = None if own is None else own[[0, -1]]
            found = self.encode_noise(torch.cat(ends), given, ends_labels)  # type: ignore[arg-type]
            noise = slerp(found[0], found[1], weights)
        return self.decode(noise, path, own)

    @torch.no_grad()
    def code(
        self, images: Images, seed: int = 0, samples: Tensor | None = None, labels: Labels | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the decoder is given for a fixed batch of images [b, c, h, w]: latents [b, D] and labels [b] or None.

        labels: of the data, used only by a decoder that takes labels without zones. samples: as anchors_to_latents.
        """
        images = self._images(images)
        if not self.draws_prior:
            latents = self.given("image", images=images)
        elif self.has_latents:
            rows = None if samples is None else samples.to(self.device)
            latents = self.anchors_to_latents(self.anchors(images), None, seed, rows)
        else:
            latents = torch.zeros(len(images), 0, device=self.device, dtype=self._dtype)
        return latents, self._own_labels(latents, labels)

    def _own_labels(self, latents: Tensor, labels: Labels | None) -> Tensor | None:
        """The one-hot labels of images with these latents: read from them, or those of the data; None: takes none."""
        if not self.takes_labels:
            return None
        if self.has_labels and self.draws_prior:
            return self.read_class(latents)
        if labels is None:
            raise ValueError("labels: this decoder takes labels and has no zones to read them from")
        return self._label_tensor(labels, len(latents))

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _walk(
        self, x: Tensor, latents: Tensor, labels: Tensor | None, *, to_noise: bool, walk: _Walk | None = None
    ) -> tuple[Tensor, float]:
        """The end points, and the mean number of evaluations of the decoder."""
        network, image, walk = self._decoder(), Image(self.config), walk or _Walk()

        def decoder(*inputs: Tensor, **more: Tensor | None) -> Tensor:
            with self._autocast():
                output: Tensor = network(*inputs, **more)
            return output

        result, nfe = [], 0.0
        for start in range(0, len(x), self.chunk):
            part = slice(start, start + self.chunk)
            own = None if labels is None else labels[part]
            found, evaluations = image.walk(decoder, x[part], latents[part], own, to_noise=to_noise, **walk._asdict())
            result.append(found)
            nfe += evaluations * len(found)
        return (torch.cat(result), nfe / len(x)) if result else (x, 0.0)

    def _decoder(self) -> nn.Module:
        found = self.networks.find("image", "decoder")
        if found is None:
            raise MissingCapability(f"a {self.config.task} model has no image decoder: it cannot make images")
        return found
