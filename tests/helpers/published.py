"""Small data sets in the very formats in which the large ones are published."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from lzn_dist.prepare.sources import ImageNet

WNIDS = {"n02119789": "kit fox, Vulpes macrotis", "n01440764": "tench, Tinca tinca", "n03400231": "frying pan"}


def picture(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(pixels: np.ndarray, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def imagenet(folder: Path, per_class: int = 7, val: int = 8, size: tuple[int, int] = (40, 50)) -> dict[str, bytes]:
    """The three archives of ILSVRC2012 with three classes; returns the bytes of each image by its key.

    ILSVRC2012_IDs are not in the order of WNIDs, and the devkit's meta.mat has inner nodes, as in the real one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images: dict[str, bytes] = {}
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for number, wnid in enumerate(WNIDS):  # the real tar is sorted; nothing may depend on it
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for image in range(per_class):
                    key = f"{wnid}_{image * 37 + number}"
                    # a PNG that is called .JPEG, as n02105855_2933 is
                    images[key] = encode(picture(number * 100 + image, *size), "PNG" if image == 3 else "JPEG")
                    add(inner, f"{key}.JPEG", images[key])
            add(outer, f"{wnid}.tar", buffer.getvalue())
    ids = {wnid: number for number, wnid in enumerate(WNIDS, start=1)}
    truth = [1 + i % 3 for i in range(val)]
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in reversed(range(val)):
            key = f"ILSVRC2012_val_{number + 1:08d}"
            images[key] = encode(picture(1000 + number, *size))
            add(tar, f"{key}.JPEG", images[key])
    dtype = [(name, object) for name in (
        "ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images"
    )]  # fmt: skip
    rows = [(ids[w], w, WNIDS[w], "a gloss", 0, np.array([]), 0, per_class) for w in WNIDS]
    rows += [(4, "n00001740", "entity", "what is", 2, np.array([1, 5]), 2, 0),
             (5, "n00021939", "artifact", "what is made", 2, np.array([2, 3]), 1, 0)]  # fmt: skip
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=dtype).reshape(-1, 1)})
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/readme.txt", b"read me")
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", buffer.getvalue())
        text = "".join(f"{number}\n" for number in truth).encode()
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", text)
    return images


NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar10(folder: Path, per_batch: int = 6) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """cifar-10-python.tar.gz and cifar-10-binary.tar.gz with the same numbers; by split: pixels [n, 3072], labels."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(0)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    pixels = {name: chance.integers(0, 256, (per_batch, 3072)).astype(np.uint8) for name in names}
    labels = {name: chance.integers(0, 10, per_batch) for name in names}
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as tar:
        meta = {b"label_names": [name.encode() for name in NAMES], b"num_vis": 3072}
        # protocol 2, as Python 2 wrote them
        add(tar, "cifar-10-batches-py/batches.meta", pickle.dumps(meta, protocol=2))
        for name in names:
            batch = {b"batch_label": name.encode(), b"labels": labels[name].tolist(), b"data": pixels[name],
                     b"filenames": [b"x.png"] * per_batch}  # fmt: skip
            content = pickle.dumps(batch, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            add(tar, f"cifar-10-batches-py/{name}", content)
        add(tar, "cifar-10-batches-py/readme.html", b"<html>")
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
        add(tar, "cifar-10-batches-bin/batches.meta.txt", ("\n".join(NAMES) + "\n\n").encode())
        for name in names:
            rows = np.concatenate([labels[name].astype(np.uint8)[:, None], pixels[name]], axis=1)
            add(tar, f"cifar-10-batches-bin/{name}.bin", rows.tobytes())
        add(tar, "cifar-10-batches-bin/readme.html", b"<html>")
    train = names[:5]
    return {
        "train": (np.concatenate([pixels[n] for n in train]), np.concatenate([labels[n] for n in train])),
        "test": (pixels["test_batch"], labels["test_batch"]),
    }


def afhq(folder: Path) -> dict[str, bytes]:
    """afhq.zip; returns the cats' bytes by split/key."""
    folder.mkdir(parents=True, exist_ok=True)
    cats: dict[str, bytes] = {}
    with zipfile.ZipFile(folder / "afhq.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split, count in (("train", 5), ("val", 2)):
            for animal in ("cat", "dog", "wild"):
                for number in range(count):
                    content = encode(picture(number + 10 * len(animal) + 100 * count))
                    archive.writestr(f"afhq/{split}/{animal}/flickr_{animal}_{number:06d}.jpg", content)
                    if animal == "cat":
                        cats[f"{'train' if split == 'train' else 'test'}/flickr_cat_{number:06d}"] = content
    return cats


def imagenet_arguments(folder: Path) -> list[object]:
    return [
        "--train", folder / "ILSVRC2012_img_train.tar", "--val", folder / "ILSVRC2012_img_val.tar",
        "--devkit", folder / "ILSVRC2012_devkit_t12.tar.gz",
    ]  # fmt: skip


def imagenet_source(folder: Path) -> ImageNet:
    return ImageNet(
        folder / "ILSVRC2012_img_train.tar", folder / "ILSVRC2012_img_val.tar", folder / "ILSVRC2012_devkit_t12.tar.gz"
    )
