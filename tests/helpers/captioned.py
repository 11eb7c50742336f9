"""Digits of which some have no caption, some no label, and some neither."""

from __future__ import annotations

from pathlib import Path

from lzn_dist.prepare.digits import Digits
from lzn_dist.prepare.writer import Item, Options, prepare


class PartialDigits(Digits):
    name = "digits, some without caption or label"

    def splits(self) -> dict[str, list[Item]]:
        return {split: [_without(item) for item in items] for split, items in super().splits().items()}


def _without(item: Item) -> Item:
    """Of four digits in a row the second has no caption, the third no label, the fourth neither."""
    turn = int(item.key) % 4
    if turn in (1, 3):
        item = item._replace(captions=())
    return item._replace(label=-1) if turn in (2, 3) else item


class _Unchecked(PartialDigits):
    def classes(self) -> list[str]:
        return []  # counts of classes are of labelled samples alone


def write_partial_digits(folder: Path) -> Path:
    if not folder.exists():
        prepare(_Unchecked(), Options(folder, 300), quiet=True)
    return folder
