"""What is in a folder of shards: python -m lzn_dist.tools.inspect DIR [--views simclr] [--output FILE]

Prints splits, classes and how many samples they have, sizes of images and files, and draws a contact sheet: samples,
and beside each its two augmented views.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lzn_dist.data.augment import DigitsPolicy, Policy, SimCLRPolicy, make_views
from lzn_dist.data.index import ABSENT, ShardIndex, Split
from lzn_dist.data.pixels import RandomResizedCrops, decode, resize
from lzn_dist.data.shards import to_unit_range
from lzn_dist.keyed_random import make_key, permutation
from lzn_dist.paths import folder_or_url, path_argument
from lzn_dist.terminal import command, printable

LOOKED_AT = 500  # images whose sizes are measured


@dataclass(frozen=True)
class Picture:
    """A decoded sample: key, label (-1 without one), pixels uint8 [h, w, c]."""

    row: int
    key: str
    label: int
    pixels: NDArray[np.uint8]


def pictures(index: ShardIndex, split: Split, count: int, seed: int = 0) -> list[Picture]:
    """Some samples of a split, spread over it at random; damaged ones are left out."""
    found = []
    for row in permutation(make_key(seed, "inspect"), len(split))[:count].tolist():
        if split.images[row, 0] == ABSENT:
            continue
        try:
            label = index.label(split, row)
            pixels = decode(index.storage.read(split.shard_of(row).name, *split.images[row].tolist()), 3)
        except ValueError:
            continue
        found.append(Picture(row, split.key(row), label, pixels))
    return found


def count_labels(index: ShardIndex, name: str, split: Split) -> dict[int, int]:
    """How many samples each class has: as the manifest says, without one as the labels do."""
    if counts := index.counts.get(name):
        return dict(enumerate(counts))
    found: Counter[int] = Counter()
    for row in range(len(split)) if not index.identity else ():
        with contextlib.suppress(ValueError):
            found[index.label(split, row)] += 1
    del found[-1]
    return dict(sorted(found.items()))


def describe(index: ShardIndex) -> list[str]:
    """Lines for people: splits, classes, sizes."""
    lines = [f"{index.folder}: {index.source or 'no manifest'}"]
    for name, split in index.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        lines.append(f"{name}: {len(split):,} samples in {len(split.shards)} shards, {size / 1e9:.3f} GB")
        image_bytes = split.images[:, 1]
        low, middle, high = np.percentile(image_bytes, [0, 50, 100])
        lines.append(f"  image files: {low:,.0f} to {high:,.0f} bytes, median {middle:,.0f}")
        looked = pictures(index, split, min(LOOKED_AT, len(split)))
        shapes = Counter(f"{p.pixels.shape[0]}x{p.pixels.shape[1]}" for p in looked)
        common = ", ".join(f"{shape} ({count})" for shape, count in shapes.most_common(4))
        lines.append(f"  height x width of {len(looked)}: {common}{', …' if len(shapes) > 4 else ''}")
        if counts := count_labels(index, name, split):
            sizes = counts.values()
            lines.append(f"  {len(counts)} classes of {min(sizes):,} to {max(sizes):,} samples")
            for label in sorted(counts, key=lambda label: counts[label], reverse=True)[:10]:
                known = f" {printable(index.classes[label])}" if 0 <= label < len(index.classes) else ""
                lines.append(f"    {label:>5}{known}: {counts[label]:,}")
            if len(counts) > 10:
                lines.append(f"    … {len(counts) - 10} more")
    return lines


def contact_sheet(index: ShardIndex, split: Split, path: Path, *, count: int, size: int, views: str, seed: int) -> None:
    """Draw samples in columns of three: the sample and its two views, as training makes them.

    ValueError where none of them can be shown.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from lzn_dist.evaluation.figures import literal

    shown = pictures(index, split, count, seed)
    if not shown:
        raise ValueError(f"{index.folder}: no contact sheet, all samples that were tried are damaged: write them again")
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, 3 * columns, figsize=(3 * columns * 1.3, rows * 1.55), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for place, picture in enumerate(shown):
        trio = [torch.from_numpy(picture.pixels).permute(2, 0, 1), *two_views(picture, size, views, seed)]
        for column, image in enumerate(trio):
            axis = axes[place // columns, 3 * (place % columns) + column]
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            if column == 0:
                name = index.classes[picture.label] if 0 <= picture.label < len(index.classes) else str(picture.label)
                name = re.sub(r"^n\d{8} ", "", name)  # ImageNet's WNIDs say little
                axis.set_title(literal(name[:20] if picture.label >= 0 else picture.key[-18:]), fontsize=7)
            elif place < columns:
                axis.set_title(f"view {column}", fontsize=7, color="0.4")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def two_views(picture: Picture, size: int, views: str, seed: int) -> list[Tensor]:
    """The views of epoch 0: two uint8 [3, size, size]."""
    rows = torch.tensor([picture.row])
    policy: Policy
    if views == "simclr":
        policy = SimCLRPolicy()
        boxed = RandomResizedCrops(size, seed).views_of(picture.pixels, rows, 0)
    else:
        policy = DigitsPolicy()
        boxed = resize(picture.pixels, (size, size)).unsqueeze(0)
    images = [to_unit_range(image).unsqueeze(0) for image in boxed]
    found = make_views(images, rows, 0, seed, policy)
    return [((image[0] + 1) * 127.5).round().to(torch.uint8) for image in found]


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="lzn_dist.tools.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=folder_or_url, metavar="DIR", help="folder or URL of the shards")
    parser.add_argument("--split", default="train", help="of the contact sheet (default: train)")
    parser.add_argument("--samples", type=int, default=24, metavar="N", help="on the contact sheet (default: 24)")
    parser.add_argument("--views", choices=("simclr", "digits"), default="simclr", help="default: simclr")
    parser.add_argument("--size", type=int, default=224, metavar="N", help="pixels of a view (default: 224)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=path_argument, default=Path("contact_sheet.png"), metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        if options.samples < 0 or options.size < 1:
            raise ValueError("--size must be positive, --samples too, or 0 for no contact sheet")
        index = ShardIndex.load(options.folder)
        split = index.split(options.split)
        print("\n".join(describe(index)))
        if not options.samples:
            return 0
        contact_sheet(
            index, split, options.output, count=options.samples, size=options.size, views=options.views,
            seed=options.seed,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"contact sheet: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
