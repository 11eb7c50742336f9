"""Captions that say more than the class: of handwritten digits, from what is measured in the image; of glyphs, from
what their font says; of emoji, from their names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lzn_dist.keyed_random import make_key, permutation

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LEVELS = {  # of each attribute, from the smallest value on
    "weight": ("thin", "medium", "bold"),
    "slant": ("leaning left", "upright", "leaning right"),
    "width": ("narrow", "regular", "wide"),
}
WORDINGS = (
    "a {weight} handwritten {digit}, {slant} and {width}",
    "the digit {digit} in {weight} strokes, {width}, {slant}",
    "{width}, {slant}: a {digit} drawn with a {weight} pen",
    "a {width} {digit}, {weight} and {slant}",
    "this {digit} is {slant}, its lines are {weight} and it is {width}",
    "someone wrote a {weight} {width} {digit} {slant}",
    "a {digit}, {weight}",
    "a {digit} that is {slant}",
    "a {width} {digit}",
    "the handwritten digit {digit}",
)
HELD_OUT = (
    "{digit}: {weight} strokes, {width}, {slant}",
    "here is a {digit}, {slant}, with {weight} lines, quite {width}",
)
A_SAMPLE = 5  # wordings of a training image


def measure(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Attributes [n] of white digits on black, [n, h, w]: weight, the ink over the area that its spread suggests;
    slant, the shift to the right a row upwards (of the second moments); width, the standard deviation of the ink's
    columns over that of its rows."""
    ink = np.asarray(pixels, np.float64) / 255
    mass = np.maximum(ink.sum((1, 2)), 1e-9)
    rows, columns = np.meshgrid(np.arange(ink.shape[1]), np.arange(ink.shape[2]), indexing="ij")

    def mean(values: np.ndarray) -> np.ndarray:
        return np.asarray((ink * values).sum((1, 2)) / mass)

    y, x = (values - mean(values)[:, None, None] for values in (rows, columns))
    vertical, horizontal, mixed = (np.maximum(mean(y * y), 1e-9), np.maximum(mean(x * x), 1e-9), mean(x * y))
    box = np.sqrt(vertical * horizontal) * 12  # that of a full rectangle
    return {"weight": mass / box, "slant": -mixed / vertical, "width": np.sqrt(horizontal / vertical)}


def thresholds(measured: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Between the three levels of each attribute: a third of the images in each."""
    return {name: tuple(np.quantile(values, (1 / 3, 2 / 3)).tolist()) for name, values in measured.items()}


def levels(pixels: np.ndarray, bounds: dict[str, tuple[float, float]]) -> list[dict[str, str]]:
    """The level of each attribute of each image."""
    found = {name: np.searchsorted(bounds[name], values) for name, values in measure(pixels).items()}
    return [{name: LEVELS[name][int(found[name][row])] for name in LEVELS} for row in range(len(pixels))]


def describe(
    key: str, digit: int, level: dict[str, str], *, held_out: bool, wordings: Sequence[str] = WORDINGS
) -> tuple[str, tuple[str, ...]]:
    """A sample's attributes as JSON, and its captions: some wordings that are drawn by its key; held out: all of those
    that no training image has."""
    words = {"digit": DIGITS[digit], **level}
    chosen = HELD_OUT
    if not held_out:
        order = permutation(make_key(0, f"wordings {key}"), len(wordings)).tolist()
        chosen = tuple(wordings[row] for row in order[:A_SAMPLE])
    return json.dumps(words, sort_keys=True), tuple(wording.format(**words) for wording in chosen)


def caption_rows(
    pixels: np.ndarray, labels: np.ndarray, splits: dict[str, np.ndarray]
) -> dict[int, tuple[str, tuple[str, ...]]]:
    """`describe` of each row, with the levels' bounds of the training rows; test and val have the wordings that are
    held out."""
    bounds = thresholds(measure(pixels[splits["train"]]))
    found = {}
    for split, rows in splits.items():
        for row, level in zip(rows.tolist(), levels(pixels[rows], bounds), strict=True):
            found[row] = describe(f"{row:06d}", int(labels[row]), level, held_out=split != "train")
    return found


def emoji_captions(attributes: dict[str, Any], *, held_out: bool) -> tuple[str, ...]:
    """Of an emoji's name, short names, category and skin tones. Held out: the name alone."""
    tones = " and ".join(attributes["skin_tone"])
    tone = f" with {tones} skin tone" if tones else ""
    name = " ".join(re.sub(r"[^\w ]+", " ", attributes["name"].lower()).split()) + tone
    if held_out:
        return (name,)
    kind = attributes["subcategory"].replace("-", " ")
    short = [" ".join(re.split(r"[^\w]+|_", word)).strip() + tone for word in attributes["short_names"]]
    wordings = [name, *short, f"{name}, a kind of {kind}", f"{attributes['category']}: {name}", f"an emoji of {name}"]
    return tuple(dict.fromkeys(" ".join(wording.split()) for wording in wordings if wording.strip()))


def glyph_captions(attributes: dict[str, Any], *, held_out: bool) -> tuple[str, ...]:
    """Of a glyph's character and of what its font says of itself."""
    character = attributes["character"]
    case = "digit" if character.isdigit() else "capital letter" if character.isupper() else "small letter"
    what = f"{case} {character}"
    weight = "light" if attributes["weight"] < 350 else "bold" if attributes["weight"] >= 600 else "regular"
    slant = "italic" if attributes["angle"] < 0 else "upright"
    width = "condensed " if attributes["width"] < 5 else "expanded " if attributes["width"] > 5 else ""
    serif = {None: "", True: "serif ", False: "sans serif "}[attributes["serif"]]
    if held_out:
        return (f"{what}: {width}{serif}type, {slant}, {weight}",)
    return (
        f"the {what} in a {weight} {slant} {width}{serif}font",
        f"a {weight} {width}{what}, {slant}",
        f"{slant} {serif}{what}, {weight}",
        f"the {what}",
    )
