"""A trained model as one object: embed, generate, classify, reconstruct (arXiv 2509.15591, section 3).

The capabilities are compositions of the networks with the zones' two operations, anchors → latents and latents →
anchors. A latent depends on all anchors that it is computed with. Images are therefore taken in *fixed batches*:
`evaluation.batch` of them in the order given; a last, smaller batch is filled up with images whose results are not
counted: the first ones given, or where fewer than one batch are given, the first training images.

Baselines are read the same way: a rectified flow is a decoder whose latents have no dimensions, a contrastive model an
encoder that embeds, a supervised one an encoder whose output is logits.

All randomness is keyed by (seed, name, sample number): results do not depend on how a set is split into calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lzn_dist.config import Config
from lzn_dist.data import Tokenizer
from lzn_dist.inputs import as_count, as_images, as_labels, as_texts
from lzn_dist.keyed_random import make_key, normal
from lzn_dist.machine import has_float64
from lzn_dist.modalities import Image, Label, Text, modality
from lzn_dist.networks import Networks
from lzn_dist.networks import trust as trust_packages
from lzn_dist.objectives import needs
from lzn_dist.zones import align, compute_latents, nearest_anchor

# what methods take for images [b, c, h, w] and labels int64 [b]: tensors, or what lzn_dist.inputs makes into them
Images: TypeAlias = Any
Labels: TypeAlias = Any
Texts: TypeAlias = "str | Sequence[str]"

CHUNK = 512  # images that go through a network at once, at most,
CHUNK_PIXELS = 1 << 21  # and pixels: a feature map of 128 channels is 1 GB then


class MissingCapability(RuntimeError):
    """The model's task has no network for what was asked."""


@dataclass
class Generated:
    """images [n, c, h, w] in [−1, 1], the latents [n, D] and labels int64 [n] (or None) that the decoder was given;
    nfe: how often the decoder was evaluated for a sample, on average."""

    images: Tensor
    latents: Tensor
    labels: Tensor | None
    nfe: float


class LZN:
    """Networks with their configuration, ready to use. Puts the networks in evaluation mode.

    Where a task lacks a network (a representation model cannot classify), the method raises MissingCapability.
    """

    def __init__(
        self, networks: Networks, config: Config, step: int = 0, *, centres: Mapping[str, Tensor] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:  # fmt: skip
        """centres: by data type, of the encoders' anchors [D], where the configuration centres them. tokenizer: where
        there is text; default: the one of the run's shards."""
        self.networks = networks.eval()
        self.centres = dict(centres or {})
        self._tokenizer = tokenizer
        self.config = config
        self.needs = needs(config)
        self.step = step
        self._others: Tensor | None = None
        self._other_texts: list[str] | None = None
        self._bfloat16 = False

    def to(self, *args: Any, **more: Any) -> LZN:
        """Moves the model as torch's modules do: ``to("cuda")``, ``to(torch.bfloat16)``, ``to("cuda", torch.float64)``.

        bfloat16: the networks compute in it, as in training with precision=bf16; their weights, the zones and all that
        is returned stay in float32. float16 is refused: these networks' values do not fit into it.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **more)
        if dtype not in (None, torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(f"{dtype} is not supported: torch.bfloat16, torch.float32 and torch.float64 are")
        if device is not None and not has_float64(device):
            raise ValueError(f"{device} computes no float64, which the zones need: leave the model on the CPU")
        if dtype is not None:
            self._bfloat16 = dtype == torch.bfloat16
        self.networks.to(device, None if dtype == torch.bfloat16 else dtype, non_blocking)
        return self

    def cuda(self, device: int | None = None) -> LZN:
        return self.to("cuda" if device is None else f"cuda:{device}")

    def cpu(self) -> LZN:
        return self.to("cpu")

    @property
    def device(self) -> torch.device:
        return next(self.networks.parameters()).device

    @property
    def chunk(self) -> int:
        """How many images go through a network at once."""
        return max(1, min(CHUNK, CHUNK_PIXELS // self.config.data.image_size**2))

    @property
    def has_encoder(self) -> bool:
        return self.networks.find("image", "encoder") is not None

    @property
    def has_decoder(self) -> bool:
        return self.networks.find("image", "decoder") is not None

    @property
    def has_labels(self) -> bool:
        """Whether classes have zones in the latent space."""
        return self.networks.find("label", "encoder") is not None

    @property
    def takes_labels(self) -> bool:
        """Whether images can be generated by label."""
        return self.needs.class_conditional

    @property
    def has_latents(self) -> bool:
        """Whether images have latents: LZN alone."""
        return self.config.objective == "lzn"

    @property
    def has_logits(self) -> bool:
        """Whether the encoder is a classifier."""
        return self.needs.logits

    # ── images → features, anchors, latents ─────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def embed(self, images: Images) -> Tensor:
        """Features [b, F] of images [b, c, h, w] in [−1, 1], before the encoder's head."""
        encoder, images = self._encoder(), self._images(images)
        with self._autocast():
            features = torch.cat([encoder.features(self._ready(part)) for part in images.split(self.chunk)])  # type: ignore[operator]
        return features if features.dtype == torch.float64 else features.float()

    @torch.no_grad()
    def anchors(self, images: Images) -> Tensor:
        """The encoder's output [b, D] for images [b, c, h, w]: anchors (or logits), in float32 at least."""
        encoder, images = self._encoder(), self._images(images)
        with self._autocast():
            anchors = torch.cat([encoder(self._ready(part)) for part in images.split(self.chunk)])
        anchors = anchors if anchors.dtype == torch.float64 else anchors.float()
        return self._placed("image", anchors)

    # ── text ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def has_text(self) -> bool:
        return self.networks.find("text", "encoder") is not None

    @property
    def pairs_text(self) -> bool:
        """Whether images and texts can be compared."""
        return self.has_text and self.has_encoder

    @property
    def tokenizer(self) -> Tokenizer:
        """What makes texts into tokens. Raises ConfigError where it is not the one of the training."""
        if self._tokenizer is None:
            from lzn_dist.data import ShardIndex  # a model that brings its tokenizer needs no data
            from lzn_dist.training.resolve import tokenizer_of

            data = self.config.data
            self._tokenizer = tokenizer_of(self.config, ShardIndex.load(data.shards, data.cache, data.retry_seconds))
        assert self._tokenizer is not None
        return self._tokenizer

    @torch.no_grad()
    def embed_text(self, texts: str | Sequence[str]) -> Tensor:
        """Anchors [b, D] of texts, comparable with those of images (`anchors`) by their cosine; longer texts than the
        run's data.text_length tokens are cut. Raises TypeError and ValueError for what is no text or is empty."""
        encoder = self.networks.find("text", "encoder")
        if encoder is None:
            raise MissingCapability("this model was trained without text: it has no text encoder")
        kind = Text(self.config)
        tokens = self.tokenizer.encode(as_texts(texts), self.config.data.text_length)
        if len(tokens) and not bool((tokens[:, 0] >= 0).all()):
            raise ValueError("texts: one of them is empty")
        found = [torch.zeros(0, self.config.latent.dim, device=self.device)]
        with self._autocast():
            for part in tokens.split(CHUNK):
                own = part.to(self.device)
                found.append(kind.encode(encoder, own, own[:, 0]))
        anchors = torch.cat([part if part.dtype == torch.float64 else part.float() for part in found])
        return self._placed("text", anchors)

    def similarities(self, images: Images, texts: Sequence[str]) -> Tensor:
        """Cosines [b, k] of images and texts, around the centres where the model has some."""
        first, second = self.anchors(images), self.embed_text(texts)
        return F.normalize(first, dim=1) @ F.normalize(second.to(first.dtype), dim=1).T

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by to become logits: CLIP's and SigLIP's learned one; of a Latent Zoning Network
        2 (S − 1) ‖a‖, the exponent of the last of S alignment steps at r = S − 1 for a point of length 2, which is
        where latents near their zones' centres lie, and anchors of length ‖a‖."""
        found = self.networks.find("logits", "encoder")
        if found is not None:
            return float(found()[0].exp())
        norm = Text(self.config).norm or self.config.latent.dim**0.5
        return 2.0 * (self.config.alignment.steps - 1) * norm

    @torch.no_grad()
    def zero_shot(self, images: Images, texts: Sequence[str | Sequence[str]]) -> Tensor:
        """Probabilities [b, k] of texts, each of them a text or several wordings of one (prompt templates):
        p_k = softmax_k(s · cos(a, t_k)), a: the image's anchor, t_k: the mean of its wordings' unit anchors, both
        around the centres where the model has some; s: `logit_scale`."""
        wordings = [[text] if isinstance(text, str) else list(text) for text in texts]
        if not all(wordings):
            raise ValueError("texts: one of them has no wording")
        anchors = F.normalize(self.embed_text([text for own in wordings for text in own]), dim=1)
        means = torch.stack([part.mean(0) for part in anchors.split([len(own) for own in wordings])])
        cosines = F.normalize(self.anchors(images), dim=1) @ F.normalize(means, dim=1).to(anchors.dtype).T
        return (self.logit_scale * cosines).softmax(1)

    def _placed(self, name: str, anchors: Tensor) -> Tensor:
        """An encoder's outputs as training saw them where they were coupled."""
        if not self.has_latents:
            return anchors
        kind = modality(name, self.config)
        centre = self.centres.get(name) if kind.centred else None
        if kind.centred and centre is None:
            raise MissingCapability(
                f"anchors of {name} are centred (modalities.{name}.anchor_centred), and this model has no centre: load "
                "it from a checkpoint"
            )
        return kind.placed(anchors, None if centre is None else centre.to(anchors))

    # ── latents ─────────────────────────────────────────────────────────────────────────────────────────────────

    def latents(self, images: Images, noise_scale: float | None = None, seed: int = 0) -> Tensor:
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
        noise = self.latent_noise(anchors, seed, samples) * scale
        return compute_latents(anchors, noise, solver=latent.solver, steps=latent.steps, backend=self.config.backend)

    @staticmethod
    def latent_noise(anchors: Tensor, seed: int, samples: Tensor) -> Tensor:
        """The noise [b, D], of scale 1, that places the samples int64 [b] of these anchors in their zones."""
        return normal(make_key(seed, "evaluate/latent", samples), anchors.shape[1:], anchors.dtype)

    # ── labels ──────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def label_latents(self, labels: Tensor, seed: int = 0, first: int = 0) -> Tensor:
        """A random latent [n, D] from the zone of each label, int64 [n]; sample numbers count from ``first``.

        Euler from the label's anchor over all label anchors, equally weighted (paper, section 3.3).
        """
        anchors = self.label_anchors()
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
        self, images: Images, noise_scale: float = 0.0, class_weights: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        """Labels int64 [b] of images [b, c, h, w]: image → anchor → latent (over the fixed batch) → class.

        noise_scale: 0 asks for the centre of the image's zone, 1 for a random point of it. A supervised model has no
        zones: its largest logit counts. Raises FileNotFoundError for fewer images than a fixed batch where the run's
        data, which fills it up, is not there.
        """
        if self.has_logits:
            return self.anchors(images).argmax(1)
        self.label_anchors()
        images = self._images(images)
        found = []
        for rows, counted in self._fixed_batches(len(images)):
            anchors = self.anchors(self._filled(images, rows))
            latents = self.anchors_to_latents(anchors, noise_scale, seed, rows.to(self.device))
            found.append(self.read_class(latents[:counted], class_weights))
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=self.device)

    def classify_text(self, texts: Sequence[str], seed: int = 0) -> Tensor:
        """Labels int64 [b] of texts: text → anchor → latent at the centre of its zone (over a fixed batch) → class."""
        found = [torch.zeros(0, dtype=torch.int64, device=self.device)]
        words = as_texts(texts)
        for rows, counted in self._fixed_batches(len(words)):
            anchors = self.embed_text(self._filled_texts(words, rows))
            latents = self.anchors_to_latents(anchors, 0.0, seed, rows.to(self.device))
            found.append(self.read_class(latents[:counted]))
        return torch.cat(found)

    # ── latents → images ────────────────────────────────────────────────────────────────────────────────────────

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
        texts: Texts | None = None, zone: Labels | None = None, first: int = 0, guidance: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """n images [n, c, h, w] in [−1, 1]; `generate_with_latents` says what the arguments mean."""
        return self.generate_with_latents(
            n, labels, seed, texts=texts, zone=zone, first=first, guidance=guidance
        ).images  # fmt: skip

    def generate_with_latents(
        self, n: int | None = None, labels: Labels | None = None, seed: int = 0, *,
        texts: Texts | None = None, zone: Labels | None = None, first: int = 0, guidance: float = 1.0,
    ) -> Generated:  # fmt: skip
        """n samples, numbered from ``first``: generate(4) is generate(2) followed by generate(2, first=2). n may be
        left out where labels or texts say how many.

        Without labels the latent is a prior draw; a joint model reads its class from the zone it lies in and gives the
        decoder that one-hot label. With labels (one for all, or int64 [n]) the latent is drawn from the label's zone,
        as published. ``zone`` draws it from the zone of another class than the one-hot label instead. A decoder that
        takes labels without zones gets prior latents, and where no labels are asked for, the classes in turn. With
        texts (one for all, or n) the latent is the centre of the text's zone (`given`).
        guidance: classifier-free, for decoders with `condition_dropout`; 1: none.
        Raises MissingCapability for labels or texts where the model has none, ValueError for labels out of range.
        """
        self._decoder()
        if n is None:
            counted = labels if texts is None else texts
            if counted is None or isinstance(counted, str) or not hasattr(counted, "__len__"):
                raise ValueError("n: how many images? It may be left out where a list of labels or texts says so")
            n = len(counted)
        n = as_count(n)
        if texts is not None:
            return self._generate_from(as_texts(texts), n, labels, seed, first, guidance)
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
        images, nfe = self._walk(self.noise(n, seed, first), latents, own, to_noise=False, guidance=guidance)
        return Generated(images.clamp(-1.0, 1.0), latents, one_hot, nfe)

    def _generate_from(
        self, texts: list[str], n: int, labels: Labels | None, seed: int, first: int, guidance: float
    ) -> Generated:
        if len(texts) not in (1, n):
            raise ValueError(f"texts must be one text or {n}, got {len(texts)}")
        given = self.given("image", texts=texts, seed=seed)
        given = given.expand(n, -1) if len(texts) == 1 else given
        own = None
        if self.takes_labels:
            own = self.decoder_labels(given, labels, n)
        images, nfe = self._walk(self.noise(n, seed, first), given, own, to_noise=False, guidance=guidance)
        return Generated(images.clamp(-1.0, 1.0), given, own, nfe)

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

    @torch.no_grad()
    def given(
        self, what: str, *, images: Images | None = None, texts: Sequence[str] | None = None,
        labels: Labels | None = None, noise_scale: float = 0.0, seed: int = 0,
    ) -> Tensor:  # fmt: skip
        """What the decoder of ``what`` (image or text) is given [n, D] for images, texts or labels (one of them): their
        latents, or anchors where it was trained on these.

        Latents of images and texts are computed in fixed batches, filled up with the first training samples'; those of
        labels over all labels. noise_scale: 0 for the centres of the zones.
        """
        if sum(part is not None for part in (images, texts, labels)) != 1:
            raise ValueError("give one of images, texts and labels")
        if labels is not None:
            chosen = self._label_tensor(labels, len(labels) if hasattr(labels, "__len__") else 1)
            table = self.label_anchors()
            if self._point(what) == "anchor":
                return table[chosen]
            samples = torch.arange(len(chosen), device=table.device)
            noise = normal(make_key(seed, "generate/latent", samples), table.shape[1:], table.dtype) * noise_scale
            return compute_latents(
                table[chosen], noise, table, index=chosen, steps=self.config.evaluation.alignment_steps
            )
        if self._point(what) == "anchor":
            anchors = self.anchors(images) if images is not None else self.embed_text(texts or [])
            return anchors if self.has_latents else F.normalize(anchors, dim=1)
        if images is not None:
            images = self._images(images)
            count = len(images)
        else:
            words = as_texts(texts)
            count = len(words)
        found = [torch.zeros(0, self.config.latent.dim, device=self.device)]
        for rows, counted in self._fixed_batches(count):
            if images is not None:
                anchors = self.anchors(self._filled(images, rows))
            else:
                anchors = self.embed_text(self._filled_texts(words, rows))
            found.append(self.anchors_to_latents(anchors, noise_scale, seed, rows.to(self.device))[:counted])
        return torch.cat(found)

    # ── latents → captions ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def has_captions(self) -> bool:
        """Whether captions can be written."""
        return self.networks.find("text", "decoder") is not None

    @torch.no_grad()
    def caption(
        self, images: Images | None = None, *, texts: Sequence[str] | None = None, labels: Labels | None = None,
        seed: int = 0, temperature: float = 0.0, top_p: float = 1.0, beams: int = 1,
    ) -> list[str]:  # fmt: skip
        """A caption of each image, text or label (one of them), from the centre of its zone.

        temperature 0: the likeliest word each time, or with beams > 1 the likeliest caption; above: drawn, of the words
        that have top_p of the probability together. Deterministic by seed. Raises MissingCapability.
        """
        decoder = self.networks.find("text", "decoder")
        if decoder is None:
            raise MissingCapability("this model has no text decoder: it cannot write captions")
        given = self.given("text", images=images, texts=texts, labels=labels, seed=seed)
        conditional = any(d.class_conditional for d in self.needs.decodes if d.what == "text")
        own = None
        if conditional:
            own = self.decoder_labels(given, labels, len(given))
        keys = make_key(seed, "caption/token", torch.arange(len(given), device=given.device))
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

    @torch.no_grad()
    def reconstruct(self, images: Images, seed: int = 0, labels: Labels | None = None) -> Tensor:
        """Images [b, c, h, w] inverted to noise under their own latents and decoded again (paper, section 3.1).

        A joint model's one-hot label is the class read from the latent: no label of the data is used. A decoder that
        takes labels without zones needs them, int64 [b]. Raises FileNotFoundError as `classify` does.
        """
        self._decoder()
        images = self._images(images)
        if labels is not None and self.takes_labels and not self.has_labels:
            labels = self._label_tensor(labels, len(images))
        result = []
        for rows, counted in self._fixed_batches(len(images)):
            batch = self._filled(images, rows) if self.has_latents else images[rows[:counted]]
            latents, own = self.code(
                batch, seed, rows, None if labels is None else labels[rows[: len(batch)] % len(images)]
            )
            latents, own = latents[:counted], None if own is None else own[:counted]
            result.append(self.decode(self.encode_noise(batch[:counted], latents, own), latents, own))
        return torch.cat(result) if result else self._ready(images)

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
        if not self.takes_labels:
            return latents, None
        if self.has_labels and self.draws_prior:
            return latents, self.read_class(latents)
        if labels is None:
            raise ValueError("labels: this decoder takes labels and has no zones to read them from")
        return latents, self._label_tensor(labels, len(images))

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _dtype(self) -> torch.dtype:
        dtype = next(self.networks.parameters()).dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the networks are in {dtype}: use model.to(torch.bfloat16), which keeps their weights")
        return dtype

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16)

    def _images(self, images: Images) -> Tensor:
        data = self.config.data
        return as_images(images, data.image_channels, data.image_size)

    def _ready(self, images: Tensor) -> Tensor:
        return images.to(self.device, self._dtype)

    def _fixed_batches(self, count: int) -> Iterator[tuple[Tensor, int]]:
        """Row numbers [batch] (those past ``count`` are not counted) and how many of them count."""
        size = self.config.evaluation.batch
        for start in range(0, count, size):
            yield torch.arange(start, start + size), min(size, count - start)

    def _filled(self, images: Tensor, rows: Tensor) -> Tensor:
        """The rows of images, filled up past the last: how large a zone is depends on the others of its batch."""
        if len(images) >= len(rows):
            return images[rows % len(images)]
        if self._others is None:
            from lzn_dist.data import ShardIndex  # not needed for whole batches
            from lzn_dist.training.batches import fixed_batches

            data = self.config.data
            index = ShardIndex.load(data.shards, data.cache, data.retry_seconds)
            self._others = fixed_batches(self.config, index, "train")[0].images
        others = self._others.to(images)
        return torch.cat((images, others[torch.arange(len(rows) - len(images)) % len(others)]))

    def _filled_texts(self, texts: list[str], rows: Tensor) -> list[str]:
        """As `_filled`, with captions of the first training samples."""
        if len(texts) >= len(rows):
            return [texts[row % len(texts)] for row in rows.tolist()]
        if self._other_texts is None:
            from lzn_dist.data import ShardIndex  # not needed for whole batches
            from lzn_dist.training.batches import fixed_batches

            data = self.config.data
            index = ShardIndex.load(data.shards, data.cache, data.retry_seconds)
            dataset = fixed_batches(self.config, index, "train").dataset
            found = dataset.captions(np.arange(min(len(dataset), 2 * len(rows))))
            self._other_texts = [captions[0] for captions in found if captions]
        others = self._other_texts
        return texts + [others[place % len(others)] for place in range(len(rows) - len(texts))]

    def _walk(
        self, x: Tensor, latents: Tensor, labels: Tensor | None, *, to_noise: bool, guidance: float = 1.0
    ) -> tuple[Tensor, float]:
        """The end points, and the mean number of evaluations of the decoder."""
        network, image = self._decoder(), Image(self.config)

        def decoder(*inputs: Tensor, **more: Tensor | None) -> Tensor:
            with self._autocast():
                output: Tensor = network(*inputs, **more)
            return output

        result, nfe = [], 0.0
        for start in range(0, len(x), self.chunk):
            part = slice(start, start + self.chunk)
            own = None if labels is None else labels[part]
            found, evaluations = image.walk(
                decoder, x[part], latents[part], own, to_noise=to_noise, guidance=guidance
            )  # fmt: skip
            result.append(found)
            nfe += evaluations * len(found)
        return (torch.cat(result), nfe / len(x)) if result else (x, 0.0)

    def _encoder(self) -> nn.Module:
        found = self.networks.find("image", "encoder")
        if found is None:
            raise MissingCapability(
                f"a model of objective={self.config.objective} has no image encoder: it cannot embed images"
            )
        return found

    def _decoder(self) -> nn.Module:
        found = self.networks.find("image", "decoder")
        if found is None:
            raise MissingCapability(f"a {self.config.task} model has no image decoder: it cannot make images")
        return found

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

    def _label_tensor(self, labels: Labels, n: int) -> Tensor:
        return self._check_labels(as_labels(labels, n))

    def _check_labels(self, labels: Tensor) -> Tensor:
        count = self.config.data.num_classes if self.takes_labels else len(self.label_anchors())
        if bool(((labels < 0) | (labels >= count)).any()):
            raise ValueError(f"labels must be in 0..{count - 1}, got {int(labels.min())}..{int(labels.max())}")
        return labels.to(self.device, torch.int64)


def load(run_or_checkpoint: str | Path, trust: Iterable[str] = ()) -> LZN:
    """The model of a run's newest checkpoint, or of one checkpoint, with averaged (EMA) weights.

    trust: packages whose classes its configuration may name as networks, beside our own: importing them runs their
    code, and the file may come from others. Raises ConfigError for a class of another package.
    """
    from lzn_dist.training.checkpoint import load_networks

    trust_packages(trust)
    found = load_networks(run_or_checkpoint)
    tokenizer = None if found.tokenizer is None else Tokenizer(found.tokenizer, "the checkpoint's tokenizer")
    return LZN(found.networks, found.config, found.step, centres=found.centres, tokenizer=tokenizer)
