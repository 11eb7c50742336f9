"""Emoji with their names, as the npm package emoji-datasource-google carries them: 64x64 pixels in colour."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from lzn_dist.prepare.captions import emoji_captions
from lzn_dist.prepare.sources import keyed_splits, unpack
from lzn_dist.prepare.writer import Account, Item, PrepareError, Source
from lzn_dist.terminal import one_line

FOLDER = "package/img/google/64/"
HELD_OUT = {"test": 0.15, "val": 0.1}  # of each category's emoji
SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}


@dataclass
class Emoji(Source):
    """One class a category; an emoji and its variants of skin tone are in one split.

    Transparent pixels become white. Attributes of each: name, short_names, category, subcategory, skin_tone (of each
    person shown; empty for the emoji as it is without one). Captions are made of these; those of test and val are the
    name alone.
    """

    archive: Path
    name: str = "emoji-datasource-google (images of Google's Noto Emoji, Apache-2.0)"
    _classes: list[str] = field(default_factory=list)
    _account: Account = field(default_factory=lambda: Account("emoji"))

    def archives(self) -> list[Path]:
        return [self.archive]

    def classes(self) -> list[str]:
        return self._classes

    def account(self) -> Account:
        return self._account

    def splits(self) -> dict[str, list[Item]]:
        self._account = Account("emoji")
        files = unpack(self.archive)
        try:
            entries = json.loads(files["package/emoji.json"])
            self._classes = sorted({entry["category"] for entry in entries if entry["has_img_google"]})
            families: dict[str, list[list[Item]]] = {category: [] for category in self._classes}
            for entry in sorted(entries, key=lambda entry: entry["unified"]):
                family = self._family(entry, files)
                if family:
                    families[entry["category"]].append(family)
        except (KeyError, TypeError, ValueError) as error:
            raise PrepareError(
                f"{self.archive} is not npm's emoji-datasource-google ({one_line(error)}): npm pack "
                "emoji-datasource-google"
            ) from error
        found: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
        for category, members in families.items():
            held_out = {split: round(share * len(members)) for split, share in HELD_OUT.items()}
            for split, chosen in keyed_splits(f"emoji {category}", len(members), held_out).items():
                found[split] += [
                    item._replace(captions=emoji_captions(json.loads(item.attributes), held_out=split != "train"))
                    for row in chosen
                    for item in members[row]
                ]
        return {split: sorted(items) for split, items in found.items()}

    def _family(self, entry: dict[str, Any], files: dict[str, bytes]) -> list[Item]:
        """An emoji and its variants."""
        items = []
        variants = entry.get("skin_variations", {})
        for tones, image in [("", entry), *sorted(variants.items())]:
            content = files.get(FOLDER + image["image"])
            if not image["has_img_google"] or content is None:
                self._account.leave_out("have no image", entry["name"], image=True)
                continue
            attributes = {key: entry[key] for key in ("name", "short_names", "category", "subcategory")}
            attributes["skin_tone"] = [SKIN_TONES[tone] for tone in tones.split("-")] if tones else []
            label = self._classes.index(entry["category"])
            key = image["image"].removesuffix(".png")
            items.append(Item(key, "png", label, content, len(content), json.dumps(attributes, sort_keys=True)))
            self._account.taken += 1
        return items

    def read(self, item: Item) -> bytes:
        drawn = Image.open(io.BytesIO(item.where)).convert("RGBA")
        buffer = io.BytesIO()
        Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()
