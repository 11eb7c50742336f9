"""lzn_dist infer on files of all kinds, as people have them; what is damaged costs itself alone."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from lzn_dist import infer, load
from lzn_dist.inference.files import InferError, Parts, asked_for
from lzn_dist.inference.inputs import as_images
from tests.helpers.launching import ranks

pytestmark = pytest.mark.slow  # a run is trained and exported for them, once a worker

SCRIPT = Path(infer.__file__)


def run(*arguments: object, status: int = 0) -> None:
    assert infer.main([str(argument) for argument in arguments]) == status


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images of several sizes and kinds with names of all sorts, and five files that are none."""
    folder = tmp_path_factory.mktemp("infer") / "photos #1"
    (folder / "sub dir").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(23):
        size = [(8, 8), (20, 30), (40, 24)][number % 3]
        pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(["RGB", "L", "RGBA"][number % 3])
        name = f"{'sub dir/' if number % 4 == 0 else ''}é{number:02d}, x" + (".png" if number % 2 else ".webp")
        image.save(folder / name)
    whole = (folder / "é01, x.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[:60])
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("no image")
    (folder / ".DS_Store").write_text("")
    (folder / "nowhere.png").symlink_to("gone.png")
    return folder


def test_classes_of_a_messy_folder(
    exported: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("classify", exported, photos, "--output", tmp_path / "c.csv", "--batch", 5)
    rows = table(tmp_path / "c.csv")
    names = [Path(row["name"]) for row in rows]
    assert len(rows) == 23 and set(names) == {p for p in photos.rglob("é*")}
    assert [str(name) for name in names] == [n for n in asked_for([str(photos)]).names if "broken" not in n]
    model = load(exported)
    expected = model.classify([str(name) for name in names])
    assert [int(row["class"]) for row in rows] == expected.tolist()
    assert [row["class_name"] for row in rows] == [model.classes[k] for k in expected.tolist()]
    left = {Path(row["name"]).name: row["why"] for row in table(tmp_path / "c.csv.left_out.csv")}
    assert set(left) == {"broken.png", "empty.jpg", "notes.txt", "nowhere.png"}
    assert "not a whole image" in left["broken.png"] and left["nowhere.png"] == "a link that leads nowhere"
    said = capsys.readouterr()
    assert "23 rows; 4 left out, listed in" in said.out and "left out: " in said.err
    assert not (tmp_path / "c.csv.parts").exists()
    # probabilities are keyed by the sample's number, whatever the parts are
    run("classify", exported, photos, "--output", tmp_path / "p.jsonl", "--batch", 7, "--draws", 9, "--seed", 4)
    found = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    index = {str(name): number for number, name in enumerate(asked_for([str(photos)]).names)}
    one = found[11]
    alone = model.class_probabilities([one["name"]], 9, seed=4, first=index[one["name"]])[0]
    np.testing.assert_allclose(one["probabilities"], alone.numpy(), atol=1e-6)
    assert one["class"] == int(alone.argmax()) and one["probability"] == pytest.approx(float(alone.max()))


@pytest.mark.parametrize("what", ["features", "anchor", "latent", "map"])
def test_vectors(what: Any, exported: Path, photos: Path, tmp_path: Path) -> None:
    run("embed", exported, photos, "--output", tmp_path / "v.npz", "--what", what, "--batch", 4)
    with np.load(tmp_path / "v.npz") as found:
        expected = load(exported).embed([Path(name) for name in found["name"]], what)
        np.testing.assert_allclose(found["embedding"], expected.numpy(), atol=1e-5)


def test_vectors_of_shards_and_of_texts(exported: Path, digits: Path, tmp_path: Path) -> None:
    run("embed", exported, digits, "--split", "test", "--output", tmp_path / "v.npz", "--batch", 100)
    with np.load(tmp_path / "v.npz") as found:
        assert found["embedding"].shape[0] == len(found["name"]) == 360
        assert sorted(set(found["label"].tolist())) == list(range(10))
    (tmp_path / "texts.txt").write_text("a thin three\n\n  a   bold two \n", encoding="utf-8-sig")
    run("embed", exported, tmp_path / "texts.txt", "--output", tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as found:
        assert found["name"].tolist() == ["a thin three", "a bold two"]
        expected = load(exported).embed_text(["a thin three", "a bold two"])
        np.testing.assert_allclose(found["embedding"], expected.numpy(), atol=1e-6)


def test_vectors_as_parquet_part_by_part(exported: Path, digits: Path, tmp_path: Path) -> None:
    run("embed", exported, digits, "--split", "test", "--output", tmp_path / "v.npz", "--batch", 100)
    run("embed", exported, digits, "--split", "test", "--output", tmp_path / "v.parquet", "--batch", 100)
    found = parquet.read_table(tmp_path / "v.parquet")
    assert parquet.ParquetFile(tmp_path / "v.parquet").num_row_groups == 4
    with np.load(tmp_path / "v.npz") as expected:
        assert found["name"].to_pylist() == expected["name"].tolist()
        assert found["label"].to_pylist() == expected["label"].tolist()
        np.testing.assert_array_equal(np.stack(found["embedding"].to_numpy()), expected["embedding"])


def test_captions_and_zero_shot(exported: Path, photos: Path, tmp_path: Path) -> None:
    model = load(exported)
    run("caption", exported, photos, "--output", tmp_path / "c.csv", "--temperature", "1", "--seed", 2, "--batch", 6)
    names = asked_for([str(photos)]).names
    for row in table(tmp_path / "c.csv")[::7]:
        expected = model.caption([row["name"]], seed=2, first=names.index(row["name"]), temperature=1.0)
        assert row["caption"] == expected[0]
    (tmp_path / "texts.txt").write_text("a zero\na one\n")
    run("classify", exported, photos, "--texts", tmp_path / "texts.txt", "--output", tmp_path / "z.csv")
    rows = table(tmp_path / "z.csv")
    shares = model.zero_shot([row["name"] for row in rows], ["a zero", "a one"])
    assert [row["class_name"] for row in rows] == [["a zero", "a one"][k] for k in shares.argmax(1).tolist()]
    run("classify", exported, tmp_path / "texts.txt", "--output", tmp_path / "t.csv")
    assert len(table(tmp_path / "t.csv")) == 2


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)).astype(np.float32) / 127.5 - 1)


def test_pictures(exported: Path, photos: Path, tmp_path: Path) -> None:
    model = load(exported)
    run("generate", exported, "--labels", "3,1", "-n", 10, "--seed", 7, "--batch", 4, "--output", tmp_path / "g")
    rows = table(tmp_path / "g" / "list.csv")
    assert [row["class"] for row in rows] == ["3", "1"] * 5 and len(list((tmp_path / "g").glob("0*.png"))) == 10
    expected = model.generate(10, [3, 1] * 5, seed=7)
    found = torch.stack([pixels(tmp_path / "g" / row["picture"]) for row in rows])
    torch.testing.assert_close(found, expected[:, 0], rtol=0, atol=0.51 / 127.5)
    grid = Image.open(tmp_path / "g" / "grid.png")
    assert grid.width > grid.height
    run("generate", exported, "--texts", "a bold two", "-n", 3, "--output", tmp_path / "t", "--steps", 1)
    expected = model.generate(texts=["a bold two"] * 3, steps=1)
    torch.testing.assert_close(pixels(tmp_path / "t" / "000002.png"), expected[2, 0], rtol=0, atol=0.51 / 127.5)
    run("generate", exported, "--images", photos, "--output", tmp_path / "i")
    assert len(table(tmp_path / "i" / "list.csv")) == 23
    assert "broken.png" in (tmp_path / "i.left_out.csv").read_text()
    run("reconstruct", exported, photos, "--output", tmp_path / "r", "--batch", 10)
    rows = table(tmp_path / "r" / "list.csv")
    assert len(rows) == 23 and re.fullmatch(r"\d{6}_é\d\d_x\.png", rows[0]["picture"])
    names = asked_for([str(photos)]).names
    number = names.index(rows[20]["name"])
    expected = model.reconstruct(as_images(names[number], 1, 8), first=number)
    torch.testing.assert_close(pixels(tmp_path / "r" / rows[20]["picture"]), expected[0, 0], rtol=0, atol=1.1 / 127.5)
    run("interpolate", exported, names[1], "a thin three", "-n", 5, "--output", tmp_path / "way.png")
    assert Image.open(tmp_path / "way.png").width > 5 * 8


def test_a_stopped_command_goes_on_and_another_is_refused(
    exported: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "v.npz"
    command = ["embed", exported, photos, "--output", out, "--batch", 5]
    real, calls = infer.Work.part, list[range]()

    def part(self: infer.Work, rows: range) -> Any:
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, rows)

    monkeypatch.setattr(infer.Work, "part", part)
    with pytest.raises(KeyboardInterrupt):
        run(*command)
    assert not out.exists() and len(list((tmp_path / "v.npz.parts").glob("part-*.npz"))) == 2
    run(*command, "--what", "latent", status=2)
    assert "holds the beginning of another request (what differ)" in capsys.readouterr().err
    calls.append(range(0))  # no more interrupts
    run(*command)
    assert [len(rows) for rows in calls[4:]] == [5, 5, 5] or len(calls) == 4 + 3
    assert "going on: 2 of 5 parts are there" in capsys.readouterr().err
    with np.load(out) as found:
        assert len(found["name"]) == 23
    run(*command, status=2)
    assert "is there already: name another --output, or say --overwrite" in capsys.readouterr().err
    run(*command, "--overwrite")


def test_a_second_command_beside_it_is_refused(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "out.csv", {"a": 1}, False)
    with parts.held(), pytest.raises(InferError, match=r"another command is writing .*out\.csv"), parts.held():
        pass


@pytest.mark.process
def test_several_processes_give_the_same(exported: Path, photos: Path, tmp_path: Path) -> None:
    command = ["classify", exported, photos, "--draws", "5", "--batch", "4"]
    run(*command, "--output", tmp_path / "one.jsonl")
    done = ranks("ddp", SCRIPT, *command, "--output", tmp_path / "two.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    left = (tmp_path / "two.jsonl.left_out.csv").read_text()
    assert left == (tmp_path / "one.jsonl.left_out.csv").read_text()


REFUSED: dict[str, tuple[list[str], str]] = {
    "no run": (["embed", "gone", "{photos}", "--output", "a.npz"], "no run in gone"),
    "no input": (["embed", "{model}", "gone", "--output", "a.npz"], r"gone cannot be read \(No such file"),
    "empty folder": (["embed", "{model}", "{empty}", "--output", "a.npz"], "empty: no image in it"),
    "wrong name": (["embed", "{model}", "{photos}", "--output", "a.csv"], r"embed writes \.npz or \.parquet"),
    "map": (["embed", "{model}", "{photos}", "--what", "map", "--output", "a.parquet"], "feature maps have more"),
    "no class": (["generate", "{model}", "--labels", "cat", "--output", "g"], "there is no class 'cat'"),
    "how many": (["generate", "{model}", "--output", "g"], "-n: how many images"),
    "mixed": (["embed", "{model}", "{photos}", "{texts}", "--output", "a.npz"], "images and texts together"),
    "split": (["embed", "{model}", "{digits}", "--split", "dev", "--output", "a.npz"], "--split dev: .* has test"),
    "all damaged": (["embed", "{model}", "{bad}", "--output", "a.npz"], "none of them can be read"),
    "no file": (["interpolate", "{simple}", "gone.png", "b.png", "--output", "i.png"], "no such file, and this model"),
    "no text": (["embed", "{simple}", "{texts}", "--output", "a.npz"], "trained without text"),
    "binary": (["embed", "{model}", "{binary}", "--output", "a.npz"], "is no image; texts stand in a .txt"),
    "reconstruct texts": (["reconstruct", "{model}", "{texts}", "--output", "r"], "reconstruct takes images"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_done_is_one_line(
    kind: str, exported: Path, photos: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], simple: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    (tmp_path / "texts.txt").write_text("a two\n")
    (tmp_path / "data.bin").write_bytes(bytes(range(256)))
    places = {
        "model": exported, "photos": photos, "digits": digits, "empty": tmp_path / "empty", "bad": tmp_path / "bad",
        "texts": tmp_path / "texts.txt", "binary": tmp_path / "data.bin", "simple": simple,
    }  # fmt: skip
    arguments, says = REFUSED[kind]
    run(*(text.format(**places) for text in arguments), status=2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(says, errors[0]), errors
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("a.") and path.name.endswith(".parts")]


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model without text."""
    from lzn_dist.inference import LZN
    from lzn_dist.objectives import build_networks
    from tests.helpers.small_run import small_config

    config = small_config()
    model = LZN(
        build_networks(config), config, reference={"image": torch.randn(9, config.latent.dim)}, classes="0123456789"
    )
    model.save_pretrained(tmp_path_factory.mktemp("simple") / "model")
    return next(tmp_path_factory.getbasetemp().glob("simple*/model"))


def test_overwrite_removes_nothing_of_a_persons_and_nothing_of_another_command(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures"
    run("generate", exported, "-n", 3, "--labels", 1, "--output", out)
    (out / "holiday.jpg").write_text("mine")
    run("generate", exported, "-n", 2, "--labels", 1, "--output", out, "--overwrite", status=2)
    assert "holds more than such a command writes" in capsys.readouterr().err and len(list(out.iterdir())) == 6
    (out / "holiday.jpg").unlink()
    run("generate", exported, "-n", 2, "--labels", 1, "--output", out, "--overwrite")
    assert len(list(out.glob("0*.png"))) == 2
    parts = Parts(tmp_path / "v.npz", {"a": 1}, False)
    with parts.held():
        parts.keep(0, {"x": [1]})
        other = Parts(tmp_path / "v.npz", {"a": 2}, True)
        with pytest.raises(InferError, match="another command is writing"), other.held():
            pass
        assert parts.missing(1) == []
