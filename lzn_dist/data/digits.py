"""The embedded data set: scikit-learn's handwritten digits as WebDataset shards, made on the spot.

1,797 images of 8x8 pixels in 17 grey levels, 10 classes (E. Alpaydin and C. Kaynak, UCI "Optical Recognition of
Handwritten Digits", its test part). 360 of them, stratified by class, are held out as split ``test``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import webdataset as wds

from lzn_dist import __version__
from lzn_dist.data.shards import MANIFEST, write_manifest

SOURCE = "scikit-learn digits (UCI Optical Recognition of Handwritten Digits, test part)"
HELD_OUT = 360


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


def write_digits(output: str | Path, samples_per_shard: int = 300) -> Path:
    """Write ``train-000000.tar`` …, ``test-000000.tar`` … and ``manifest.json`` to the folder ``output``.

    A sample is ``KEY.png`` and ``KEY.cls``; KEY is the row in scikit-learn's order. The bytes are deterministic. The
    folder appears complete or not at all; of processes that race, one writes it and the others find it there.
    FileExistsError where ``output`` holds something else.
    """
    output = Path(output).resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    pixels, labels = digits_pixels()
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        for split, rows in digits_splits(labels).items():
            for number, start in enumerate(range(0, len(rows), samples_per_shard)):
                path = temporary / f"{split}-{number:06d}.tar"
                with open(path, "wb") as file, wds.TarWriter(file, user="", group="", mode=0o644, mtime=0) as shard:
                    for row in rows[start : start + samples_per_shard]:
                        shard.write({"__key__": f"{row:06d}", "png": pixels[row], "cls": int(labels[row])})
        write_manifest(
            temporary, source=SOURCE, classes=[str(digit) for digit in range(10)], tool=f"lzn_dist {__version__}"
        )
        temporary.chmod(0o755)  # mkdtemp's folders are private
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
