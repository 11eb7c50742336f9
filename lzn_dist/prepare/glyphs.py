"""Letters and numerals drawn from fonts, one class a character: a set in the manner of notMNIST, from any fonts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from lzn_dist.keyed_random import make_key, permutation
from lzn_dist.prepare.captions import glyph_captions
from lzn_dist.prepare.sources import png
from lzn_dist.prepare.writer import Account, Item, PrepareError, Source
from lzn_dist.terminal import one_line

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
LOWER = slice(36, 62)
UPPER = slice(10, 36)
EXTENSIONS = {".ttf", ".otf"}
HELD_OUT = {"test": 0.15, "val": 0.1}  # of all images, by whole families
MARGIN = 2  # pixels around the largest glyph of a face, of SIDE
SIDE = 32
ALIKE = 0.97  # cosine of two faces' glyphs from which on their families share a split
SAME_CASE = 0.98  # cosine of a lower-case letter and its capital, drawn at one size, from which on they are the same
READABLE = 0.1  # of a face's glyphs that must be nearest to their own letter's mean over all faces (chance: 0.03)

Glyphs = np.ndarray  # uint8 [62, SIDE, SIDE], black where there is none


@dataclass
class Face:
    """One font file. weight: 1 to 1000 (OpenType usWeightClass); width: 1 to 9 (usWidthClass); angle: italic angle in
    degrees, negative to the right; serif: None where the font does not say (PANOSE, sFamilyClass)."""

    path: Path
    family: str
    style: str
    weight: int
    width: int
    angle: float
    serif: bool | None
    characters: set[str]
    symbols: bool
    case: bool = True


def read_face(path: Path) -> Face:
    """What a font file says of itself. Raises ValueError where it cannot be read."""
    try:
        with TTFont(path, lazy=True, fontNumber=0) as font:
            names, os2 = font["name"], font.get("OS/2")
            family = names.getDebugName(16) or names.getDebugName(1) or path.stem
            style = names.getDebugName(17) or names.getDebugName(2) or "Regular"
            tables = font["cmap"].tables
            best = font.getBestCmap() or {}
            panose = os2.panose if os2 is not None and hasattr(os2, "panose") else None
            return Face(
                path,
                " ".join(family.split()),
                " ".join(style.split()),
                int(os2.usWeightClass) if os2 is not None else 400,
                int(os2.usWidthClass) if os2 is not None else 5,
                float(font["post"].italicAngle) if "post" in font else 0.0,
                _serif(panose, int(os2.sFamilyClass) >> 8 if os2 is not None else 0),
                {character for character in CHARACTERS if ord(character) in best},
                all(table.platformID == 3 and table.platEncID == 0 for table in tables)
                or (panose is not None and panose.bFamilyType == 5),
            )
    except Exception as error:  # whatever a damaged file makes of the reader
        raise ValueError(one_line(error)) from error


def _serif(panose: Any, family_class: int) -> bool | None:
    if panose is not None and panose.bFamilyType == 2 and panose.bSerifStyle >= 2:
        return bool(panose.bSerifStyle <= 10)  # 11 to 15 are sans-serif (PANOSE 2.0)
    if family_class in (1, 2, 3, 4, 5, 7):
        return True
    return False if family_class == 8 else None


def draw_face(face: Face) -> Glyphs:
    """All characters of a face, white on black, at one size and on one base line, so that the largest just fits.

    Raises ValueError where FreeType cannot draw them, or there is nothing to draw.
    """
    try:
        large = ImageFont.truetype(str(face.path), 200, layout_engine=ImageFont.Layout.BASIC)
        boxes = [large.getbbox(character, anchor="ls") for character in sorted(face.characters)]
        boxes = [box for box in boxes if box[2] > box[0] and box[3] > box[1]]
        if not boxes:
            raise ValueError("nothing is drawn")
        top, bottom = min(box[1] for box in boxes), max(box[3] for box in boxes)
        extent = max(bottom - top, *(box[2] - box[0] for box in boxes))
        size = max(1, int(200 * (SIDE - 2 * MARGIN) / extent))
        font = ImageFont.truetype(str(face.path), size, layout_engine=ImageFont.Layout.BASIC)
        base = SIDE / 2 - (top + bottom) / 2 * size / 200
        drawn = np.zeros((len(CHARACTERS), SIDE, SIDE), np.uint8)
        for row, character in enumerate(CHARACTERS):
            if character in face.characters:
                left, _, right, _ = font.getbbox(character, anchor="ls")
                image = Image.new("L", (SIDE, SIDE))
                at = (round(SIDE / 2 - (left + right) / 2), round(base))
                ImageDraw.Draw(image).text(at, character, fill=255, font=font, anchor="ls")
                drawn[row] = np.asarray(image)
        return drawn
    except (OSError, OverflowError, MemoryError) as error:
        raise ValueError(one_line(error)) from error


def present(drawn: np.ndarray) -> np.ndarray:
    """Which glyphs show anything: bool [..., 62]."""
    return np.asarray(drawn.max((-2, -1)) > 0)


def without_case(drawn: Glyphs) -> bool:
    """Whether most lower-case letters are their capitals, perhaps smaller (then drawn anew at one height)."""
    pairs = [
        (_filled(small), _filled(capital))
        for small, capital in zip(drawn[LOWER], drawn[UPPER], strict=True)
        if small.any() and capital.any()
    ]
    same = [float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())) > SAME_CASE for a, b in pairs]
    return len(same) > 0 and sum(same) > 0.6 * len(same)  # c, o, s, v, w, x and z alone are 7 of 26


def _filled(glyph: np.ndarray) -> np.ndarray:
    """A glyph's box, brought to 16x16: float [16, 16]."""
    image = Image.fromarray(glyph)
    return np.asarray(image.crop(image.getbbox()).resize((16, 16), Image.Resampling.BOX), np.float64)


def small(drawn: np.ndarray) -> np.ndarray:
    """Glyphs at half the size, of length 1: float32 [n, 62, 256]; zeros where there is none."""
    halves = drawn.reshape(-1, len(CHARACTERS), SIDE // 2, 2, SIDE // 2, 2).mean((3, 5), dtype=np.float32)
    halves = halves.reshape(len(halves), len(CHARACTERS), -1)
    lengths = np.linalg.norm(halves, axis=-1, keepdims=True)
    return np.asarray(halves / np.where(lengths > 0, lengths, 1))


def readable(drawn: np.ndarray) -> np.ndarray:
    """Share of each face's glyphs, cut out and brought to one size, that are nearest to a mean over all faces of their
    own letter, small or capital: [n]."""
    empty = np.zeros((16, 16))
    cut = np.stack([[_filled(glyph) if glyph.any() else empty for glyph in face] for face in drawn])
    cut = cut.reshape(len(drawn), len(CHARACTERS), -1).astype(np.float32)
    cut -= cut.mean(-1, keepdims=True)
    there = np.abs(cut).max(-1) > 0
    cut /= np.maximum(np.linalg.norm(cut, axis=-1, keepdims=True), 1e-9)
    means = cut.sum(0)
    means /= np.maximum(np.linalg.norm(means, axis=-1, keepdims=True), 1e-9)
    letters = np.array(list(CHARACTERS.lower()))
    right = np.stack([letters[(face @ means.T).argmax(-1)] == letters for face in cut])
    return np.asarray((right & there).sum(-1) / np.maximum(there.sum(-1), 1))


def alike(glyphs: np.ndarray) -> np.ndarray:
    """Mean cosine of the characters that two faces both have: [n, n]; 0 where these are fewer than 10."""
    there = (np.abs(glyphs).max(-1) > 0).astype(np.float32)
    flat = glyphs.reshape(len(glyphs), -1)
    both = there @ there.T
    return np.asarray(np.where(both >= 10, flat @ flat.T / np.maximum(both, 1), 0))


def joined(families: Sequence[str], pairs: np.ndarray) -> list[list[int]]:
    """Rows by group: rows of one family, and of families of which two faces are alike, are in one."""
    leader = {family: family for family in families}

    def first(family: str) -> str:
        while leader[family] != family:
            family = leader[family]
        return family

    for one, other in zip(*np.nonzero(pairs), strict=True):
        a, b = sorted((first(families[one]), first(families[other])))
        leader[b] = a
    groups: dict[str, list[int]] = {}
    for row, family in enumerate(families):
        groups.setdefault(first(family), []).append(row)
    return [groups[name] for name in sorted(groups)]


@dataclass
class FontGlyphs(Source):
    """Glyphs of all fonts below some folders. faces: of a family, at most (0: all).

    Left out and counted: files that cannot be read, symbol fonts, faces that are no letters (see `readable`), further
    faces of a family, characters that a font lacks, lower case of fonts that have none.
    """

    fonts: tuple[Path, ...]
    characters: str = CHARACTERS
    faces: int = 2
    name: str = "glyphs of fonts"
    _account: Account = field(default_factory=lambda: Account("glyphs"))

    def archives(self) -> list[Path]:
        return []

    def classes(self) -> list[str]:
        return list(self.characters)

    def account(self) -> Account:
        return self._account

    def splits(self) -> dict[str, list[Item]]:
        self._account = Account("glyphs")
        if self.faces < 0:
            raise PrepareError(f"--faces must be 0 for all, or more, not {self.faces}")
        faces, drawn = self._draw(self._chosen())
        groups = joined([face.family.lower() for face in faces], alike(small(drawn)) > ALIKE)
        return self._split(faces, drawn, groups)

    def read(self, item: Item) -> bytes:
        return png(np.frombuffer(item.where, np.uint8).reshape(SIDE, SIDE))

    def _leave_out(self, why: str, face: Path, glyphs: int | None = None) -> None:
        self._account.leave_out(why, str(face), times=len(self.characters) if glyphs is None else glyphs)

    def _files(self) -> Iterator[Path]:
        for folder in self.fonts:
            if not folder.exists():
                raise PrepareError(f"{folder} is not there: name folders of fonts, as /usr/share/fonts")
            paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
            yield from (path for path in paths if path.suffix.lower() in EXTENSIONS and path.is_file())

    def _chosen(self) -> list[Face]:
        families: dict[str, list[Face]] = {}
        seen: set[tuple[str, str]] = set()
        for path in tqdm(list(self._files()), desc="fonts", unit="font", mininterval=0.5):
            try:
                face = read_face(path)
            except ValueError:
                self._leave_out("of fonts that cannot be read", path)
                continue
            if face.symbols:
                self._leave_out("of symbol fonts", path)
            elif (face.family.lower(), face.style.lower()) in seen:
                self._leave_out("of fonts that are there twice", path)
            else:
                seen.add((face.family.lower(), face.style.lower()))
                families.setdefault(face.family.lower(), []).append(face)
        chosen = []
        for family in sorted(families):
            members = sorted(families[family], key=lambda face: (face.style.lower(), face.path.name))
            order = permutation(make_key(0, f"faces {family}"), len(members)).tolist()
            count = self.faces or len(members)
            chosen += [members[row] for row in order[:count]]
            for row in order[count:]:
                self._leave_out("of further faces of their family", members[row].path)
        return chosen

    def _draw(self, faces: list[Face]) -> tuple[list[Face], np.ndarray]:
        """The faces that have letters, and their glyphs uint8 [n, 62, 32, 32]."""
        kept, drawn = [], []
        for face in tqdm(faces, desc="drawing", unit="font", mininterval=0.5):
            if not face.characters:
                self._leave_out("of fonts that have none of the characters", face.path)
                continue
            try:
                drawn.append(draw_face(face))
            except ValueError:
                self._leave_out("of fonts that cannot be drawn", face.path)
            else:
                kept.append(face)
        if not kept:
            raise PrepareError(
                f"no font with letters in {', '.join(map(str, self.fonts))}{self._account.reasons()}: install some "
                "(--packages lists Debian's)"
            )
        clear = readable(np.stack(drawn)) >= READABLE
        small_letters = sum(character.islower() for character in self.characters)
        for face, glyphs, letters in zip(kept, drawn, clear, strict=True):
            if not letters:
                self._leave_out("of fonts whose glyphs are no letters", face.path)
            elif without_case(glyphs):
                self._leave_out("lower-case letters of fonts without case", face.path, small_letters)
                face.case = False
                glyphs[LOWER] = 0
        return [face for face, letters in zip(kept, clear, strict=True) if letters], np.stack(drawn)[clear]

    def _split(self, faces: list[Face], drawn: np.ndarray, groups: list[list[int]]) -> dict[str, list[Item]]:
        there = present(drawn)
        wanted = [CHARACTERS.index(character) for character in self.characters]
        sizes = [int(there[group][:, wanted].sum()) for group in groups]
        room = {split: share * sum(sizes) for split, share in HELD_OUT.items()}
        held = dict.fromkeys(room, 0)
        chosen: list[str] = ["train"] * len(groups)
        for place in permutation(make_key(0, "families"), len(groups)).tolist():
            free = [split for split in room if held[split] + sizes[place] <= room[split] * 1.1]
            if free:
                chosen[place] = free[0]
                held[free[0]] += sizes[place]
        if len(groups) > 1 and not held["test"]:  # few families, each of them more than the split is to have
            chosen[int(np.argmin(sizes))] = "test"
        found: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
        for split, group in zip(chosen, groups, strict=True):
            for row in group:
                found[split] += self._items(row, faces[row], drawn[row], there[row], split != "train")
        return {split: items for split, items in found.items() if items}

    def _items(self, number: int, face: Face, drawn: Glyphs, there: np.ndarray, held_out: bool) -> list[Item]:
        about = {
            "family": face.family, "style": face.style, "weight": face.weight, "width": face.width,
            "angle": face.angle, "serif": face.serif,
        }  # fmt: skip
        slug = f"{number:04d}-" + re.sub(r"[^a-z0-9]+", "-", f"{face.family} {face.style}".lower()).strip("-")
        items = []
        for label, character in enumerate(self.characters):
            row = CHARACTERS.index(character)
            if not there[row]:
                if face.case or not character.islower():
                    self._leave_out("characters that a font lacks", face.path, 1)
                continue
            attributes = {"character": character, **about}
            captions = glyph_captions(attributes, held_out=held_out)
            key, text = f"{slug}_{ord(character):04x}", json.dumps(attributes, sort_keys=True)
            items.append(Item(key, "png", label, drawn[row].tobytes(), SIDE**2, text, captions))
            self._account.taken += 1
        return items
