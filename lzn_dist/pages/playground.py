"""What the playground shows of a model: functions from what people draw, upload or type to pictures and words. The page
around them is in `lzn_dist.playground`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lzn_dist.evaluation.zone_figure import zone_picture, zone_plane
from lzn_dist.inference import LZN

Pixels = NDArray[np.uint8]
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the latent's noise, over which class probabilities are shown
DRAWS = 64
SHOWN = 640  # pixels along a side of the map of the latent space
NEIGHBOURS, TRAINING = 8, 2000  # neighbours that are shown, of the first so many training images
NAMED = 40  # classes whose names are on the map, at most
MOST_PIXELS = 50_000_000  # of an upload
MOST_TEXT = 2000  # characters of a text


class Unclear(ValueError):
    """What was given cannot be used; the message says why, for the page."""


@dataclass(frozen=True)
class Seen:
    """classes: probability by class and noise scale [scales, K], or None; caption; reconstruction and neighbours as
    pixels; place: of the latent on the map; words: what there is to say besides."""

    probabilities: Tensor | None
    caption: str
    reconstruction: Pixels | None
    neighbours: list[Pixels]
    place: tuple[float, float] | None
    words: str


class Playground:
    """A model, with what is computed once. All methods raise Unclear for what cannot be used."""

    def __init__(self, model: LZN, seed: int = 0) -> None:
        self.model, self.seed = model, seed

    # ── what is given ───────────────────────────────────────────────────────────────────────────────────────────

    def image(self, given: Image.Image | None) -> Tensor:
        """[1, c, h, w] in [−1, 1] of an upload or a drawing."""
        if given is None:
            raise Unclear("draw something, or upload an image")
        if given.width * given.height > MOST_PIXELS:
            raise Unclear(f"an image of {given.width}×{given.height} pixels is too large: {MOST_PIXELS:,} at most")
        if given.mode in ("RGBA", "LA", "PA"):  # what is not drawn on is black
            ground = Image.new("RGBA", given.size, "black")
            given = Image.alpha_composite(ground, given.convert("RGBA"))
        try:
            return self.model._images(given)
        except (TypeError, ValueError) as error:
            raise Unclear(str(error)) from error

    def text(self, given: str) -> str:
        """A text that the model can take."""
        words = " ".join((given or "").split())
        if not words:
            raise Unclear("type a text")
        if len(words) > MOST_TEXT:
            raise Unclear(f"a text of {len(words):,} characters is too long: {MOST_TEXT:,} at most")
        return words

    # ── what is shown ───────────────────────────────────────────────────────────────────────────────────────────

    def look(self, image: Tensor) -> Seen:
        """All that the model makes of an image [1, c, h, w]."""
        model, probabilities = self.model, None
        if model.has_labels and model.has_latents:
            each = [model.class_probabilities(image, DRAWS if scale else 1, scale, None, self.seed) for scale in SCALES]
            probabilities = torch.cat(each).float().cpu()
        elif model.has_logits:
            probabilities = model.class_probabilities(image).float().cpu()
        caption = model.caption(image)[0] if model.has_captions and model.has_encoder else ""
        rebuilt = None
        if model.has_decoder and model.draws_prior and (model.has_encoder or not model.takes_labels):
            rebuilt = pixels(model.reconstruct(image, self.seed)[0])
        place = None
        if model.has_latents and model.has_encoder:
            place = self.place(model.latents(image, 0.0, self.seed))
        words = [] if probabilities is None else [f"class {model.classes[int(probabilities[0].argmax())]}"]
        return Seen(probabilities, caption, rebuilt, self.neighbours(image), place, ", ".join(words))

    def read(self, text: str) -> Seen:
        """All that the model makes of a text."""
        model = self.model
        caption = model.caption(texts=[text])[0] if model.has_captions else ""
        words = f"class {model.classes[int(model.classify_text([text])[0])]}" if model.has_labels else ""
        neighbours = []
        if model.pairs_text and self._training is not None:
            images, anchors = self._training
            neighbours = self._nearest(images, anchors, model.embed_text([text]))
        return Seen(
            None, caption, None, neighbours, self.place(model.latents(None, 0.0, self.seed, texts=[text])), words
        )

    def generate(
        self, n: int, seed: int, *, label: int | None = None, text: str = "", guidance: float = 1.0
    ) -> list[Pixels]:
        """n images of a text, of a class, or of the prior."""
        more: dict[str, Any] = {"texts": [text] * n} if text else {} if label is None else {"labels": label}
        return [pixels(image) for image in self.model.generate(n, seed=seed, guidance=guidance, **more)]

    def mix(self, first: Tensor | str, second: Tensor | str, n: int) -> list[Pixels]:
        """n images on the way from one image or text to another."""
        return [pixels(image) for image in self.model.interpolate(first, second, n, self.seed)]

    # ── neighbours ──────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def _training(self) -> tuple[Tensor, Tensor] | None:
        """The first training images uint8 and their anchors; None where they are not there."""
        from lzn_dist.data import ShardIndex
        from lzn_dist.training.batches import whole_dataset

        data = self.model.config.data
        if not self.model.has_encoder:
            return None
        try:
            dataset = whole_dataset(self.model.config, ShardIndex.load(data.shards, data.cache), "train", ())
            read = dataset.read_or_replace(np.arange(min(TRAINING, len(dataset))))
        except (OSError, ValueError):
            return None
        (images,) = read.pixels
        return images, self.model.anchors(images)

    def neighbours(self, image: Tensor) -> list[Pixels]:
        """The nearest training images by the cosine of their anchors, where the training data is there."""
        if self._training is None:
            return []
        images, anchors = self._training
        return self._nearest(images, anchors, self.model.anchors(image))

    @staticmethod
    def _nearest(images: Tensor, anchors: Tensor, query: Tensor) -> list[Pixels]:
        normal = torch.nn.functional.normalize
        cosines = (normal(query, dim=1) @ normal(anchors, dim=1).T)[0]
        best = cosines.topk(min(NEIGHBOURS, len(cosines)))
        return [pixels(images[row].float() / 127.5 - 1) for row in best.indices.tolist()]

    # ── the latent space ────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def _plane(self) -> tuple[Tensor, float] | None:
        """A plane [2, D] of the latent space, that of most of the classes' anchors, else of the reference's, and half
        its width; None where images are not made from latents."""
        model = self.model
        if not (model.has_latents and model.config.latent.dim >= 2 and model.has_decoder and model.draws_prior):
            return None
        if not (model.has_labels or model.has_encoder):
            return None
        anchors = model.label_anchors() if model.has_labels else model.reference_anchors("image")[:1000]
        plane, extent = zone_plane(anchors.float().cpu())
        # without classes there are only latents to mark, which are where prior draws are
        return plane, extent if model.has_labels else model.config.latent.dim**0.5 + 1.0

    @property
    def plane(self) -> Tensor | None:
        return None if self._plane is None else self._plane[0]

    @property
    def extent(self) -> float:
        return 0.0 if self._plane is None else self._plane[1]

    def place(self, latent: Tensor) -> tuple[float, float] | None:
        """Where a latent [1, D] is on the map: its projection."""
        if self.plane is None:
            return None
        x, y = (latent.float().cpu() @ self.plane.T)[0].tolist()
        return x, y

    @cached_property
    def ground(self) -> Pixels:
        """The map [SHOWN, SHOWN, 3]: the plane, coloured by the class in whose zone each point lies."""
        assert self.plane is not None
        if self.model.has_labels:
            anchors = self.model.label_anchors().float().cpu()
            steps = self.model.config.evaluation.alignment_steps
            canvas = zone_picture(anchors, torch.arange(len(anchors)), self.plane, self.extent, SHOWN, steps)[::-1]
        else:
            y, x = (np.mgrid[:SHOWN, :SHOWN] + 0.5) / SHOWN * 2 - 1
            canvas = np.where(np.hypot(x, y)[..., None] <= 0.99, 0.88, 1.0) * np.ones(3)
        image = Image.fromarray((canvas * 255).round().astype(np.uint8))
        if self.model.has_labels and len(self.model.classes) <= NAMED:
            draw, font = ImageDraw.Draw(image), ImageFont.load_default(20)
            for name, anchor in zip(self.model.classes, self.model.label_anchors(), strict=True):
                x, y = self.place(anchor[None]) or (0.0, 0.0)
                at = ((x / self.extent + 1) / 2 * (SHOWN - 1), (1 - y / self.extent) / 2 * (SHOWN - 1))
                draw.text(at, name[:16], (20, 22, 26), font, anchor="mm")
        return np.array(image)

    def map(self, places: list[tuple[float, float]]) -> Pixels | None:
        """The map with a mark at each place; what lies outside is marked at the rim."""
        if self.plane is None:
            return None
        drawn = self.ground.copy()
        for x, y in places:
            length = max(1.0, float(np.hypot(x, y)) / (self.extent * 0.985))
            column = int((x / length / self.extent + 1) / 2 * (SHOWN - 1))
            row = int((1 - y / length / self.extent) / 2 * (SHOWN - 1))
            rows, columns = np.ogrid[:SHOWN, :SHOWN]
            away = (rows - row) ** 2 + (columns - column) ** 2
            drawn[away <= 11**2] = 255
            drawn[away <= 8**2] = (20, 22, 26)
        return drawn

    def at(self, column: int, row: int, n: int, seed: int) -> tuple[list[Pixels], tuple[float, float], str]:
        """What is generated at a point of the map (pixels from its upper left): n images, the place, its class in
        words. The latent has no part outside of the plane."""
        assert self.plane is not None
        x, y = (2 * column / (SHOWN - 1) - 1) * self.extent, (1 - 2 * row / (SHOWN - 1)) * self.extent
        model = self.model
        latents = (x * self.plane[0] + y * self.plane[1]).expand(n, -1).to(model.device)
        labels = model.decoder_labels(latents, None, n) if model.takes_labels else None
        images = model.decode(model.noise(n, seed), latents, labels)
        words = f"x = {x:.2f}, y = {y:.2f}"
        if model.has_labels:
            words += f": zone of {model.classes[int(model.read_class(latents[:1])[0])]}"
        return [pixels(image) for image in images], (x, y), words


def pixels(image: Tensor, least: int = 128) -> Pixels:
    """uint8 [h, w, 3] of an image [c, h, w] in [−1, 1], enlarged in whole steps to `least` pixels."""
    found = ((image.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    factor = max(1, least // found.shape[-1])
    found = found.expand(3, -1, -1).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return found.permute(1, 2, 0).numpy()
