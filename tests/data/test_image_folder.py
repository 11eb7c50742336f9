"""People's own folders: splits, classes, links, what systems add, tables, and the account of it all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lzn_dist.data import ShardIndex
from lzn_dist.data.index import split_name
from lzn_dist.prepare.image_folder import ImageFolder, image_kind, make_keys, read_table, sort_classes
from lzn_dist.prepare.writer import Options, PrepareError, prepare
from tests.helpers.launching import python
from tests.helpers.messy import PICTURES, check_folder, check_tar

ROOT = Path(__file__).parents[2]
PNG = PICTURES["PNG", 0]


def make(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(PNG)
    return folder


def grid(*tops: str, classes: tuple[str, ...] = ("cat", "dog"), each: int = 2) -> list[str]:
    return [f"{top}/{name}/{i}.png" for top in tops for name in classes for i in range(each)]


def counts(source: ImageFolder) -> dict[str, int]:
    return {split: len(items) for split, items in source.splits().items()}


@pytest.mark.parametrize(
    ("tops", "splits"),
    [
        (("train", "val", "test"), {"train": 4, "val": 4, "test": 4}),
        (("training", "testing"), {"train": 4, "test": 4}),
        (("Train", "Val"), {"train": 4, "val": 4}),
        (("TRAIN", "valid"), {"train": 4, "val": 4}),
        (("train", "validation", "dev-less"), None),
        (("training_set", "test_set"), {"train": 4, "test": 4}),
        (("train", "eval"), {"train": 4, "test": 4}),
        (("train", "valid", "test", "extra"), None),
        (("train", "val", "validation"), None),
        (("val", "test"), None),
        (("test",), None),
    ],
)
def test_splits_are_recognised_or_asked_for(
    tops: tuple[str, ...], splits: dict[str, int] | None, tmp_path: Path
) -> None:
    source = ImageFolder(make(tmp_path, *grid(*tops)))
    if splits is None:
        with pytest.raises(PrepareError, match=r"which are splits\? Name them, as in --splits") as refused:
            source.splits()
        assert all(top in str(refused.value) for top in tops)
        return
    assert counts(source) == splits and source.classes() == ["cat", "dog"]
    assert {item.key for item in source.splits()["train"]} == {"cat/0", "cat/1", "dog/0", "dog/1"}


def test_splits_that_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", *grid("train", "valid", "extra"), "holdout/cat/0.png")
    source = ImageFolder(folder, split_folders="train,valid")
    assert counts(source) == {"train": 4, "val": 4}
    assert source.account().left_out == {"in none of the splits": (5, "extra/cat/0.png")}
    source = ImageFolder(folder, split_folders="train, holdout/", allow_empty=True)
    assert counts(source) == {"train": 4, "holdout": 1} and source.classes() == ["cat", "dog"]
    source = ImageFolder(folder, split_folders="none")
    assert source.splits() and source.classes() == ["extra", "holdout", "train", "valid"]
    with pytest.raises(PrepareError, match="has no images in tests; it has extra, holdout, train, valid"):
        ImageFolder(folder, split_folders="train,tests").splits()


def test_images_that_lie_loose_beside_splits_are_not_lost_unsaid(tmp_path: Path) -> None:
    folder = make(tmp_path, *grid("train", "val"), "loose.png")
    for labelled in (True, False):
        with pytest.raises(PrepareError, match=r"1 of 9 images .*\(1 in none of the splits, as loose\.png\)"):
            ImageFolder(folder, labelled).splits()
        assert counts(ImageFolder(folder, labelled, max_left_out=0.2)) == {"train": 4, "val": 4}


def test_splits_whose_images_lie_in_no_classes(tmp_path: Path) -> None:
    """ImageNet's validation as it is published; and classes that are called as splits are."""
    folder = make(tmp_path / "flat", *grid("train"), *[f"val/{i}.png" for i in range(3)])
    with pytest.raises(PrepareError, match=r"flat/val has 3 images in no class folders.*--csv.*--splits train$"):
        ImageFolder(folder).splits()
    assert counts(ImageFolder(folder, split_folders="train")) == {"train": 4}
    folder = make(tmp_path / "both", "train/0.png", "val/0.png")
    with pytest.raises(PrepareError, match="--unlabelled, or --csv, or --splits none"):
        ImageFolder(folder).splits()
    assert counts(ImageFolder(folder, labelled=False)) == {"train": 1, "val": 1}
    source = ImageFolder(make(tmp_path / "vehicles", "train/0.png", "car/0.png"))
    assert counts(source) == {"train": 2} and source.classes() == ["car", "train"]
    assert counts(ImageFolder(make(tmp_path / "plain", "0.png", "x/1.png", "train/2.png"), False)) == {"train": 3}


def test_what_systems_add_is_passed_over_and_counted(tmp_path: Path) -> None:
    added = [
        "cat/.ipynb_checkpoints/0-checkpoint.png", "cat/._0.png", "__MACOSX/cat/._0.png", ".Trash-0/x.png",
        "cat/Thumbs.db", "dog/.DS_Store", "@eaDir/cat/0.png", "dog/desktop.ini",
    ]  # fmt: skip
    source = ImageFolder(make(tmp_path, *[f"{c}/{i}.png" for c in ("cat", "dog") for i in range(3)], *added))
    assert counts(source) == {"train": 6} and source.classes() == ["cat", "dog"]
    assert source.account().left_out["hidden, or what systems add to folders"][0] == len(added)
    assert source.account().seen == 6 + len(added)


def test_links_are_followed_once(tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "elsewhere", "0.png", "1.png")
    folder = make(tmp_path / "in", "cat/0.png")
    (folder / "dog").symlink_to(elsewhere)
    (folder / "aaa").symlink_to(folder / "cat")  # before it in the order of names, and yet the link
    (folder / "cat" / "round").symlink_to(folder)
    (folder / "cat" / "link.png").symlink_to(elsewhere / "0.png")
    (folder / "cat" / "gone.png").symlink_to(elsewhere / "9.png")
    os.mkfifo(folder / "cat" / "pipe.png")
    (folder / "cat" / "empty.jpg").touch()
    source = ImageFolder(folder, max_left_out=0.9)
    items = source.splits()["train"]
    assert sorted(item.where for item in items) == ["cat/0.png", "cat/link.png", "dog/0.png", "dog/1.png"]
    assert source.classes() == ["cat", "dog"]  # aaa is the same as cat
    left_out = {why: count for why, (count, _) in source.account().left_out.items()}
    assert left_out == {
        "a link to a folder that is there itself": 2, "a link that leads nowhere": 1, "no regular file": 1, "empty": 1
    }  # fmt: skip


def test_what_is_an_image_is_decided_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i, ((kind, _), content) in enumerate(PICTURES.items()):
        for extension in (".jfif", ".JPE", "", ".txt", ".png"):
            (tmp_path / "a" / f"{kind}{i}{extension}").write_bytes(content)
    (tmp_path / "a" / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tmp_path / "a" / "photo.dng").write_bytes(PICTURES["TIFF", 0])
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    source = ImageFolder(tmp_path, max_left_out=0.1)
    assert counts(source) == {"train": 5 * len(PICTURES)}
    assert {item.extension for item in source.splits()["train"]} == {"jpg", "png", "gif", "tif", "webp", "bmp"}
    assert {why: count for why, (count, _) in source.account().left_out.items()} == {
        "an image of a format that is not read (.heic)": 1, "an image of a format that is not read (.dng)": 1,
        "no image (.txt)": 1,
    }  # fmt: skip
    assert image_kind(b"") is image_kind(b"BMW 3 series\0\0\0") is image_kind(b"P5is a page") is None
    prepare(source, Options(tmp_path / "out"), quiet=True)
    dataset = ShardIndex.load(tmp_path / "out").split("train")
    assert len(dataset) == 5 * len(PICTURES) and (dataset.images[:, 1] > 0).all()


def test_a_share_left_out_and_an_empty_class_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", *grid("x", each=10))
    folder = folder / "x"
    (folder / "cat" / "3.png").write_bytes(b"")
    with pytest.raises(PrepareError, match=r"1 of 20 images .*\(1 empty, as cat/3\.png\).*--max-left-out 0\.05$"):
        ImageFolder(folder).splits()
    assert counts(ImageFolder(folder, max_left_out=0.05)) == {"train": 19}
    (folder / "cat" / "3.png").unlink()
    (folder / "emu").mkdir()
    (folder / "emu" / "notes.txt").write_text("to come")
    with pytest.raises(PrepareError, match=r"^emu: a class without an image .*--allow-empty-classes"):
        ImageFolder(folder).splits()
    source = ImageFolder(folder, allow_empty=True)
    assert counts(source) == {"train": 19} and source.classes() == ["cat", "dog", "emu"]


def test_numbers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    source = ImageFolder(make(tmp_path, *[f"{i}/0.png" for i in (0, 1, 2, 10, 11)]))
    items = sorted(source.splits()["train"], key=lambda item: int(item.where.split("/")[0]))
    assert [item.label for item in items] == [0, 1, 2, 3, 4]
    assert source.classes() == ["0", "1", "2", "10", "11"]
    assert sort_classes({"10", "9", "a"}) == ["10", "9", "a"]


def test_keys_of_all_files_differ() -> None:
    paths = ["c/a.jpg", "c/a.png", "c/a", "c/a_jpg", "c/b.c.jpg", "c/b_c", "c/d.txt.png", "c/e.", "f.jpg"]
    keys = make_keys(paths, "c/")
    assert len(set(keys)) == len(keys) and all("." not in key.rpartition("/")[2] for key in keys)
    assert keys[-3:] == ["d_txt", "e_", "f"] and make_keys(["c/a.jpg"], "") == ["c/a"]


@pytest.mark.parametrize("name", ["validation", "VALID", "dev", "val_set"])
def test_names_of_splits(name: str) -> None:
    assert split_name(name) == "val" and split_name("value") is None


HEADERS = [
    "path,label,split",
    '"Path";Label ;SPLIT',
    "label\tpath\tsplit",
    "path|label|split",
    "sep=;\npath;label;split",
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_tables_as_excel_writes_them(header: str, encoding: str, newline: str, tmp_path: Path) -> None:
    delimiter = next(sign for sign in ";\t|," if sign in header)
    columns = [name.strip(' "').lower() for name in header.splitlines()[-1].split(delimiter)]
    rows = [
        {"path": "a\\1.png", "label": "café", "split": "validation"},
        {"path": "b/2.png", "label": "thé", "split": ""},
    ]
    lines = header.splitlines() + [delimiter.join(row[name] for name in columns) for row in rows] + [""]
    (tmp_path / "t.csv").write_bytes(newline.join(lines).encode(encoding))
    folder = make(tmp_path / "in", "a/1.png", "b/2.png")
    source = ImageFolder(folder, table=tmp_path / "t.csv")
    assert counts(source) == {"train": 1, "val": 1} and source.classes() == ["café", "thé"]
    first = next(iter(read_table(tmp_path / "t.csv")))
    assert first.number == len(header.splitlines()) + 1 and first.path == "a/1.png"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("/etc/passwd,a", "line 3: '/etc/passwd' is no path inside"),
        ("../x.png,a", r"line 3: '\.\./x\.png' is no path"),
        ("a/../../x.png,a", "is no path inside"), ("b.png,a", "line 3: there is no .*/b.png"),
        ("a.png,b", "line 3: a.png stands in line 2 already"), ("c.png,", "line 3: c.png has no label"),
        ("c.png,a,train,more,and more", "5 values for 3 columns"), ("c.png,a,../x", "cannot be a split's name"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_meant(row: str, says: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "a.png", "c.png")
    (tmp_path / "x.png").write_bytes(PNG)
    (tmp_path / "t.csv").write_text(f"path,label,split\na.png,a,train\n{row}\n")
    with pytest.raises(PrepareError, match=says):
        ImageFolder(folder, table=tmp_path / "t.csv").splits()


@pytest.mark.process
def test_the_account_is_printed_and_kept_and_survives_a_restart(tmp_path: Path) -> None:
    folder = make(tmp_path / "my photos #1", *grid("x", each=4), "x/cat/a.jpg", "x/cat/a.png", "x/cat/caf\udce9.png")
    (folder / "x" / "cat" / "broken.png").write_bytes(PNG[:-30])
    (folder / "x" / "README.txt").write_text("mine")
    command = [
        ROOT / "data_prep" / "image_folder.py", "--folder", folder / "x", "--output", folder / "x" / "shards",
        "--processes", "1",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    refused = python(*command, cwd=tmp_path, environment=environment)
    assert refused.returncode == 2 and f"{folder}/x/cat/broken.png cannot be decoded" in refused.stdout
    assert "BytesIO" not in refused.stdout and "Traceback" not in refused.stdout
    done = python(*command, "--skip-corrupt", cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stdout
    assert "13 files seen, 11 taken, 2 left out" in done.stdout
    assert f"1 damaged: cannot be decoded, as {folder}/x/cat/broken.png" in done.stdout
    assert "1 no image (.txt), as README.txt" in done.stdout
    manifest = json.loads((folder / "x" / "shards" / "manifest.json").read_text())
    assert manifest["account"]["taken"] == 11 and len(manifest["account"]["left_out"]) == 2
    keys = set(ShardIndex.load(folder / "x" / "shards").split("train").keys)
    assert {b"cat/a_jpg", b"cat/a_png", b"cat/caf\xe9"} <= keys


def test_random_folders_and_tars(tmp_path: Path) -> None:
    """tests/soak/fuzz_folders.py takes thousands."""
    ends = []
    for seed in range(40):
        work = tmp_path / str(seed)
        work.mkdir()
        ends.append(check_folder(work, seed))
        check_tar(work, seed)
    assert ends.count("written") >= 10
