"""A trained model as one object: embed, generate, classify, caption, reconstruct (arXiv 2509.15591, section 3).

The capabilities are compositions of the networks with the zones' two operations, anchors → latents and latents →
anchors. **A latent depends on all anchors that it is computed with.** Each sample is therefore seen among the anchors
of a *reference set*, the first training samples, and its own alone (`lzn_dist.zones.latents_beside`): what is found for
it does not depend on what else is asked. An exported model brings its reference; for a run's the anchors are computed
when they are first needed. Published evaluation computes latents over fixed batches instead (`anchors_to_latents`).

Baselines are read the same way: a rectified flow is a decoder whose latents have no dimensions, a contrastive model an
encoder that embeds, a supervised one an encoder whose output is logits.

All randomness is keyed by (seed, name, sample number): results do not depend on how a set is split into calls, if each
says by `first` with which sample it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn

from lzn_dist.config import Config
from lzn_dist.data import Tokenizer
from lzn_dist.data.captions import MOST_CHARACTERS
from lzn_dist.exchange import Loaded, card, read_export, write_export
from lzn_dist.inference.inputs import as_count, as_images, as_labels, as_texts
from lzn_dist.inference.interpolation import slerp
from lzn_dist.keyed_random import make_key, normal
from lzn_dist.machine import has_float64
from lzn_dist.modalities import Image, Label, Text, modality
from lzn_dist.networks import Networks
from lzn_dist.objectives import needs
from lzn_dist.zones import align, compute_latents, latents_beside, nearest_anchor

# what methods take for images [b, c, h, w] and labels int64 [b]: tensors, or what lzn_dist.inference.inputs makes into
# them
Images: TypeAlias = Any
Labels: TypeAlias = Any
Texts: TypeAlias = "str | Sequence[str]"

CHUNK = 512  # images that go through a network at once, at most,
CHUNK_PIXELS = 1 << 21  # and pixels: a feature map of 128 channels is 1 GB then
PAPER = "https://arxiv.org/abs/2509.15591"
DRAWS = 1 << 14  # latents that are flowed at once for class probabilities
What = Literal["features", "anchor", "latent", "map"]
Sampler = Literal["euler", "dopri5"]


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


class _Walk(NamedTuple):
    """How the decoder's flow is walked, where it is not as the configuration says."""

    guidance: float = 1.0
    sampler: Sampler | None = None
    steps: int | None = None


class LZN(
    ModelHubMixin,
    library_name="lzn_dist",
    license="mit",
    repo_url=PAPER,
    paper_url=PAPER,
    tags=["latent-zoning-networks"],
):
    """Networks with their configuration, ready to use. Puts the networks in evaluation mode. `save_pretrained`,
    `from_pretrained` and `push_to_hub` are huggingface_hub's, for folders as `lzn_dist export` writes them.

    Where a task lacks a network (a representation model cannot classify), the method raises MissingCapability.
    """

    def __init__(
        self, networks: Networks, config: Config, step: int = 0, *, centres: Mapping[str, Tensor] | None = None,
        tokenizer: Tokenizer | None = None, reference: Mapping[str, Tensor] | None = None, reference_size: int = 0,
        classes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """centres: by data type, of the encoders' anchors [D], where the configuration centres them. tokenizer: where
        there is text; default: the one of the run's shards. reference: anchors [N, D] by data type, as `anchors` and
        `embed_text` give them; what is missing is computed of the first reference_size training samples (default:
        `evaluation.batch`) when it is needed. classes: names; default: the shards'."""
        self.networks = networks.eval()
        self.centres = dict(centres or {})
        self._tokenizer = tokenizer
        self.config = config
        self.needs = needs(config)
        self.step = step
        self.reference = dict(reference or {})
        self.reference_size = reference_size or config.evaluation.batch
        self._classes = tuple(classes)
        self._show: Callable[[int, int], None] | None = None  # how far the reference is, for commands
        self._bfloat16 = False

    def parts(self) -> Loaded:
        """What the model consists of, with the reference as far as it is at hand."""
        content = None if self._tokenizer is None else self._tokenizer.content
        return Loaded(
            self.networks, self.config, self.step, self.centres, content, self.reference,
            self.classes if self.config.data.num_classes > 0 else (),
        )  # fmt: skip

    def gather_reference(self, anchors: int | None = None) -> None:
        """Have the anchors of the first so many training samples at hand, of all data types that have some: a model
        that is saved after it needs no data. None: as many as it says now. Raises FileNotFoundError."""
        if anchors is not None:
            self.reference, self.reference_size = {}, anchors
        if self.has_latents:
            for name in ("image", "text"):
                if self.networks.find(name, "encoder") is not None:
                    self.reference_anchors(name)
        if self.has_text or self.has_captions:
            _ = self.tokenizer

    def _save_pretrained(self, save_directory: Path) -> None:
        """As huggingface_hub's mixin calls it: the files of an exported folder. Raises FileNotFoundError where the
        reference is missing and the data is not there."""
        self.gather_reference()
        parts = self.parts()
        write_export(save_directory, parts)
        (save_directory / "README.md").write_text(card(parts), encoding="utf-8")

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls, *, model_id: str, revision: str | None, cache_dir: str | None, force_download: bool,
        local_files_only: bool, token: str | bool | None, **more: Any,
    ) -> LZN:  # fmt: skip
        if not Path(model_id).is_dir():
            model_id = snapshot_download(
                model_id, revision=revision, cache_dir=cache_dir, force_download=force_download,
                local_files_only=local_files_only, token=token,
                allow_patterns=["*.json", "*.safetensors", "SHA256SUMS"], ignore_patterns=["*/*"],
            )  # fmt: skip
        return model_of(read_export(Path(model_id)))

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
        cut = [text[:MOST_CHARACTERS] for text in as_texts(texts)]  # as captions are when they are read
        tokens = self.tokenizer.encode(cut, self.config.data.text_length)
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
            table = self.label_anchors()
            if self._point(what) == "anchor":
                return table[chosen]
            samples = torch.arange(first, first + len(chosen), device=table.device)
            noise = normal(make_key(seed, "generate/latent", samples), table.shape[1:], table.dtype) * noise_scale
            return compute_latents(
                table[chosen], noise, table, index=chosen, steps=self.config.evaluation.alignment_steps
            )
        if self._point(what) == "anchor":
            anchors = self.anchors(images) if images is not None else self.embed_text(texts or [])
            return anchors if self.has_latents else F.normalize(anchors, dim=1)
        if not self.has_latents:
            return torch.zeros(len(self._images(images)), 0, device=self.device, dtype=self._dtype)
        return self.latents(images, noise_scale, seed, first, texts=texts)

    # ── latents → captions ──────────────────────────────────────────────────────────────────────────────────────

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
        return as_images(images, data.image_channels, data.image_size, data.resize)

    def _ready(self, images: Tensor) -> Tensor:
        return images.to(self.device, self._dtype)

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


def model_of(found: Loaded, reference_size: int = 0) -> LZN:
    """The object that uses what a model consists of."""
    tokenizer = None if found.tokenizer is None else Tokenizer(found.tokenizer, "the model's tokenizer")
    return LZN(
        found.networks, found.config, found.step, centres=found.centres, tokenizer=tokenizer,
        reference=found.reference, reference_size=reference_size, classes=found.classes,
    )  # fmt: skip
