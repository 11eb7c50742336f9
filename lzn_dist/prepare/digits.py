"""The embedded data set: scikit-learn's handwritten digits as WebDataset shards, made on the spot.

1,797 images of 8x8 pixels in 17 grey levels, 10 classes (E. Alpaydin and C. Kaynak, UCI "Optical Recognition of
Handwritten Digits", its test part). 360 of them, stratified by class, are held out as split ``test``.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
from pathlib import Path

import numpy as np

from lzn_dist.data.index import MANIFEST
from lzn_dist.prepare.captions import caption_rows
from lzn_dist.prepare.sources import png
from lzn_dist.prepare.writer import Item, Options, Source, prepare

SOURCE = "scikit-learn digits (UCI Optical Recognition of Handwritten Digits, test part)"
HELD_OUT = 360
SAMPLES_PER_SHARD = 300


@functools.cache
def digits_pixels() -> tuple[np.ndarray, np.ndarray]:
    """All digits as scikit-learn orders them: pixels uint8 [1797, 8, 8], levels 0…16 scaled to 0…255, labels [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def digits_splits(labels: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of each split, ascending: ``test`` has HELD_OUT of them, stratified; always the same."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0)
    return {"train": np.sort(train), "test": np.sort(test)}


class Digits(Source):
    """The digits as a source for `prepare`; a sample's key is its row in scikit-learn's order. Captions say the digit
    and what is measured in its image; those of the test images are worded as none of the training's."""

    name = SOURCE

    def archives(self) -> list[Path]:
        return []

    def classes(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    def splits(self) -> dict[str, list[Item]]:
        pixels, labels = digits_pixels()
        splits = digits_splits(labels)
        described = caption_rows(pixels, labels, splits)
        return {
            split: [Item(f"{row:06d}", "png", int(labels[row]), int(row), 64, *described[int(row)]) for row in rows]
            for split, rows in splits.items()
        }

    def read(self, item: Item) -> bytes:
        return png(digits_pixels()[0][item.where])


def write_digits(output: str | Path, samples_per_shard: int = SAMPLES_PER_SHARD) -> Path:
    """Write the digits' shards and manifest to the folder ``output``; returns it. The bytes are deterministic.

    The folder appears complete or not at all; of processes that race, one writes it and the others find it there.
    FileExistsError where ``output`` holds something else.
    """
    output = Path(output).resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f".{output.name}.{secrets.token_hex(4)}"
    temporary.mkdir()  # with the user's umask, as mkdtemp would not
    try:
        prepare(Digits(), Options(temporary, samples_per_shard), quiet=True)
        try:
            os.rename(temporary, output)  # fails on a folder that is not empty
        except OSError as error:
            theirs = output / MANIFEST
            if not theirs.is_file() or theirs.read_bytes() != (temporary / MANIFEST).read_bytes():
                raise FileExistsError(
                    f"{output} exists and holds something else than these shards: remove it or choose another folder"
                ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def ensure_digits(folder: str | Path) -> Path:
    """Write the digits to ``folder`` unless it has a manifest already; returns the folder."""
    folder = Path(folder)
    return folder if (folder / MANIFEST).is_file() else write_digits(folder)
