"""Do captions say what is in the image, and do images show what the caption says? Of handwritten digits, whose
attributes (`lzn_dist.prepare.captions`) can be measured in any image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lzn_dist.data import EvaluationBatch
from lzn_dist.distributed.spread import once, spread
from lzn_dist.evaluation.data import EvaluationData, Unmeasurable
from lzn_dist.evaluation.frechet import DigitClassifier
from lzn_dist.evaluation.generation import balanced_labels
from lzn_dist.inference import LZN
from lzn_dist.prepare.captions import DIGITS, LEVELS, levels, measure, thresholds

WORDS = {"digit": DIGITS, **LEVELS}


def has_attributes(data: EvaluationData) -> bool:
    """Whether the measured images are digits that are described."""
    found = data.batches("test").dataset.attributes(np.arange(1))
    return set(WORDS) <= set(found[0])


def stated(caption: str) -> dict[str, str]:
    """The attributes that a caption states; one that it states in two ways is none."""
    found = {}
    for name, words in WORDS.items():
        said = [word for word in words if re.search(rf"\b{word}\b", caption)]
        if len(said) == 1:
            found[name] = said[0]
    return found


def judged(captions: Sequence[str], attributes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """caption_attributes_right: the share of captions that state the digit, and of which all that they state is right;
    caption_X_right: of those that state X (the digit: of all); caption_attributes_stated: how many of the four a
    caption states, on average."""
    each = [stated(caption) for caption in captions]
    pairs = list(zip(each, attributes, strict=True))
    right = [{name: word == truth[name] for name, word in said.items()} for said, truth in pairs]
    values = {
        "caption_attributes_right": float(np.mean(["digit" in own and all(own.values()) for own in right])),
        "caption_attributes_stated": float(np.mean([len(own) for own in right])),
        "caption_digit_right": float(np.mean([own.get("digit", False) for own in right])),
    }
    for name in LEVELS:
        if own := [found[name] for found in right if name in found]:
            values[f"caption_{name}_right"] = float(np.mean(own))
    return values


def caption_values(model: LZN, data: EvaluationData) -> dict[str, float]:
    """`judged`, of the likeliest captions of the measured images. Collective."""
    data.need_held_out()
    batches = data.batches("test")

    def part(number: int) -> tuple[list[str], list[dict[str, Any]]]:
        batch = batches[number]
        rows = batch.valid.nonzero()[:, 0]
        captions = model.caption(batch.images)
        return [captions[row] for row in rows.tolist()], batches.dataset.attributes(batch.index[rows].numpy())

    parts = spread(len(batches), part)
    return judged([c for captions, _ in parts for c in captions], [a for _, found in parts for a in found])


class Judge:
    """What is seen in images of digits [n, 1, h, w] in [−1, 1]: the class by a classifier of the training images, the
    levels by the same thirds of these. Made by all ranks together."""

    def __init__(self, data: EvaluationData) -> None:
        found = data.digit_classifier
        if found is None:
            found = once(lambda: DigitClassifier(data.train.pixels, data.train.labels.numpy()))
        self.classifier, self.bounds = found, once(lambda: thresholds(measure(_pixels(data.train.images))))

    def __call__(self, images: Tensor) -> list[dict[str, str]]:
        digits = self.classifier.predict(images.flatten(1).double().cpu().numpy())
        found = levels(_pixels(images), self.bounds)
        return [{"digit": DIGITS[digit], **level} for digit, level in zip(digits.tolist(), found, strict=True)]


def _pixels(images: Tensor) -> np.ndarray:
    """uint8 [n, h, w]."""
    return ((images[:, 0].cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


def generated_values(model: LZN, data: EvaluationData) -> dict[str, float]:
    """generated_attributes_right: the share of images, one for each measured image's first caption, that show all that
    it states; generated_X_right: of those whose caption states X. Collective."""
    data.need_held_out()
    batches = data.batches("test")
    judge = Judge(data)

    def part(number: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        batch: EvaluationBatch = batches[number]
        found = [own[0] for own in batches.dataset.captions(batch.index[batch.valid].numpy()) if own]
        images = model.generate(texts=found, first=int(batch.index[0]))
        return [stated(caption) for caption in found], judge(images.float())

    parts = spread(len(batches), part)
    wanted = [own for found, _ in parts for own in found]
    seen = [own for _, found in parts for own in found]
    if not wanted:
        raise Unmeasurable("the measured images have no captions")
    right = [{name: word == shown[name] for name, word in own.items()} for own, shown in zip(wanted, seen, strict=True)]
    values = {"generated_attributes_right": float(np.mean([all(own.values()) for own in right]))}
    for name in WORDS:
        if own := [found[name] for found in right if name in found]:
            values[f"generated_{name}_right"] = float(np.mean(own))
    return values


def label_values(model: LZN, data: EvaluationData) -> dict[str, float]:
    """Of models of labels and text. text_to_label_accuracy: captions of the measured images, read as a class by the
    zones of labels; label_to_text_right: captions written for each class that state its digit; label_to_image_right:
    images made for each class in which its digit is seen. Collective."""
    data.need_held_out()
    batches = data.batches("test")
    values: dict[str, float] = {}
    if model.has_text:

        def part(number: int) -> tuple[int, int]:
            batch = batches[number]
            rows = batch.valid.nonzero()[:, 0]
            captions = batches.dataset.captions(batch.index[rows].numpy())
            kept = [place for place, own in enumerate(captions) if own]
            found = model.classify_text([captions[place][0] for place in kept])
            return int(torch.eq(found.cpu(), batch.labels[rows[kept]]).sum()), len(kept)

        right, count = (sum(own) for own in zip(*spread(len(batches), part), strict=True))
        if count:
            values["text_to_label_accuracy"] = right / count
    classes = range(len(model.label_anchors()))
    if model.has_decoder:
        labels = balanced_labels(len(classes), model.config.evaluation.samples_per_class)
        judge = Judge(data)
        seen = once(lambda: judge(model.generate(labels=labels).float()))
        values["label_to_image_right"] = float(
            np.mean([own["digit"] == DIGITS[label] for own, label in zip(seen, labels.tolist(), strict=True)])
        )
    if model.has_captions:
        said = once(lambda: [stated(caption) for caption in model.caption(labels=list(classes))])
        values["label_to_text_right"] = float(
            np.mean([own.get("digit") == DIGITS[label] for label, own in zip(classes, said, strict=True)])
        )
    return values
