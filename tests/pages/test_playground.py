"""The playground: what it shows of a model, and a click through it in a real browser."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lzn_dist import load, playground
from lzn_dist.inference import LZN
from lzn_dist.pages import playground as pages
from lzn_dist.pages.playground import SHOWN, Playground, Unclear
from tests.helpers.browser import open_browser
from tests.helpers.hand_made import class_images, hand_made
from tests.helpers.launching import forked

WHITE = Image.new("RGBA", (64, 64), "white")


@pytest.fixture
def joint(tmp_path: Path) -> Playground:
    return Playground(hand_made("joint", data={"num_classes": 4, "shards": str(tmp_path)}))  # no training data


@pytest.fixture(scope="module")
def all_three(exported: Path) -> Playground:
    return Playground(load(exported))


def test_an_image_is_looked_at(joint: Playground) -> None:
    seen = joint.look(class_images(torch.tensor([2])))
    assert seen.words == "class 2" and seen.probabilities is not None
    assert torch.equal(seen.probabilities[0], torch.tensor([0.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(seen.probabilities.sum(1), torch.ones(len(pages.SCALES)))
    assert seen.reconstruction is not None and seen.reconstruction.shape == (128, 128, 3)
    assert seen.neighbours == []
    assert seen.place is not None
    marked = joint.map([seen.place])
    assert marked is not None and marked.shape == (SHOWN, SHOWN, 3) and (marked != joint.ground).any()
    assert (joint.map([(1e9, 0.0)]) != joint.ground).any()  # outside: at the rim


@pytest.mark.slow
def test_what_is_generated_at_a_place_is_of_its_zone(joint: Playground) -> None:
    """The map's colour, the words and the images agree."""
    anchors = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)) * 2  # zones without symmetry
    joint.model.networks["label"]["encoder"].anchors.data.copy_(anchors)  # type: ignore[index, union-attr, operator]
    found: dict[int, Counter[tuple[int, ...]]] = {}
    steps = range(27, 640, 50)
    for column, row in ((c, r) for c in steps for r in steps if (c - 320) ** 2 + (r - 320) ** 2 < 300**2):
        images, (x, _), words = joint.at(column, row, 2, 0)
        zone = int(words.rsplit(" ", 1)[1])
        expected = pages.pixels(class_images(torch.tensor([zone]))[0])
        assert len(images) == 2 and abs(images[0].astype(int) - expected).max() <= 1
        assert abs(x) <= joint.extent and (x > 0) == (column > 320)
        found.setdefault(zone, Counter())[tuple(joint.ground[row, column])] += 1
    most = [colours.most_common(1)[0] for colours in found.values()]
    assert len({colour for colour, _ in most}) == len(found) > 1
    # but for the borders and the names
    assert sum(count for _, count in most) > 0.9 * sum(colours.total() for colours in found.values())


@pytest.mark.slow
def test_text(all_three: Playground) -> None:
    seen = all_three.read("a thin three")
    assert seen.words.startswith("class ") and isinstance(seen.caption, str) and len(seen.neighbours) in (0, 8)
    assert len(all_three.generate(3, 0, text="a bold two")) == 3
    assert all_three.plane is None  # its decoder is given anchors
    mixed = all_three.mix(all_three.image(WHITE), "a thin three", 4)
    assert len(mixed) == 4
    for wrong, says in (("", "type a text"), ("x" * 3000, "3,000 characters is too long: 2,000 at most")):
        with pytest.raises(Unclear, match=says):
            all_three.text(wrong)


def test_uploads_are_bounded(joint: Playground, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unclear, match="draw something, or upload an image"):
        joint.image(None)
    monkeypatch.setattr(pages, "MOST_PIXELS", 4000)
    with pytest.raises(Unclear, match="64×64 pixels is too large: 4,000 at most"):
        joint.image(WHITE)
    transparent = Image.new("RGBA", (20, 20), (255, 255, 255, 0))
    assert joint.image(transparent).max() == -1  # nothing drawn is black


def test_nearest_training_images(digits: Path) -> None:
    model = hand_made("joint", data={"num_classes": 4, "shards": str(digits)})
    first = Playground(model)
    assert first._training is not None
    images, _ = first._training
    nearest = first.neighbours(images[5:6].float() / 127.5 - 1)
    assert len(nearest) == 8 and (nearest[0] == pages.pixels(images[5].float() / 127.5 - 1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["joint", "generation", "representation"])
def test_the_page_has_what_the_model_can(task: str) -> None:
    page = playground.build(Playground(hand_made(task)))
    there = {block.elem_id for block in page.blocks.values()}
    assert ("by-class" in there) == (task == "joint")
    assert ("of-prior" in there) == (task != "representation") == ("mixed" in there)
    assert {"canvas", "upload"} <= there and "text" not in there


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert playground.main([str(tmp_path / "gone")]) == 2
    assert "no run in" in capsys.readouterr().err
    monkeypatch.setattr(playground, "find_spec", lambda name: None)
    assert playground.main([str(tmp_path)]) == 2
    assert "pip install" in capsys.readouterr().err


def wait_for(page: Any, box: str, what: str) -> None:
    """Until the words in a box are such."""
    page.wait_for_function(f"document.querySelector('#{box} textarea, #{box} input').value.{what}", timeout=60_000)


@pytest.mark.process
def test_a_click_through_it(tmp_path: Path) -> None:
    """Draw, look, click into the latent space, generate, mix; nothing is asked of another machine."""
    model: LZN = hand_made("joint")
    with open_browser() as browser:
        script = (
            "import sys; from unittest.mock import patch; from lzn_dist import playground; "
            "from tests.helpers.hand_made import hand_made\n"
            "with patch.object(playground, 'load_everywhere', lambda *_: hand_made('joint')):\n"
            "    sys.exit(playground.main(['run', '--port', '0']))"
        )
        server = forked(
            ["-c", script], cwd=tmp_path, said=tmp_path / "said", environment={**os.environ, "HOME": str(tmp_path)}
        )
        try:
            address = ""
            for _ in range(600):
                text = (tmp_path / "said").read_text() if (tmp_path / "said").exists() else ""
                assert server.exitcode is None, text
                if "(Ctrl-C ends it)" in text:
                    address = next(word for word in text.split() if word.startswith("http"))
                    break
                time.sleep(0.1)
            assert address.startswith("http://127.0.0.1:"), text
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            away: list[str] = []
            errors: list[str] = []
            page.on("request", lambda request: away.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(address)
            page.wait_for_selector("#canvas canvas", timeout=60_000)
            time.sleep(1.5)  # until the canvas has its size
            box = page.locator("#canvas canvas").first.bounding_box()
            middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.mouse.move(*middle)
            page.mouse.down()
            page.mouse.move(middle[0] + 40, middle[1] + 40, steps=8)
            page.mouse.up()
            page.click("#look-drawn")
            words = page.locator("#words textarea, #words input").first
            page.wait_for_function("document.querySelector('#words textarea, #words input').value.startsWith('class')")
            assert words.input_value().removeprefix("class ") in model.classes
            plane = page.locator("#map img").first
            plane.scroll_into_view_if_needed()
            size = plane.bounding_box()
            plane.click(position={"x": size["width"] * 0.7, "y": size["height"] * 0.4})
            page.wait_for_function("document.querySelector('#place textarea, #place input').value.includes('zone of')")
            page.wait_for_selector("#made img")
            assert page.locator("#made img").count() >= 8
            page.click("#by-class")
            wait_for(page, "place", "includes('class 0')")
            picture = tmp_path / "white.png"
            WHITE.convert("RGB").save(picture)
            for name in ("first", "second"):
                page.locator(f"#{name} input[type=file]").first.set_input_files(picture)
                page.wait_for_selector(f"#{name} img")
            page.click("#mix")
            page.wait_for_selector("#mixed img")
            assert not errors
            assert not [url for url in away if not url.startswith((address, "data:", "blob:"))]
        finally:
            server.terminate()
            server.join(20)
