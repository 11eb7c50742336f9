"""Measures are the same on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lzn_dist.distributed.spread import once, spread
from tests.helpers.launching import ranks

WORKER = Path(__file__).with_name("evaluation_worker.py")


def test_spread_keeps_the_order_and_raises_what_is_raised() -> None:
    assert spread(5, lambda i: i * i) == [0, 1, 4, 9, 16] and spread(0, str) == []
    with pytest.raises(ZeroDivisionError):
        spread(3, lambda i: 1 // (i - 2))
    assert once(lambda: "once") == "once"


@pytest.mark.process
def test_one_and_four_ranks_measure_the_same(digits: Path, tmp_path: Path) -> None:
    found = []
    for processes in (1, 4):
        output = tmp_path / f"{processes}.json"
        done = ranks("ddp", WORKER, output, digits, processes=processes, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-4000:]
        found.append(json.loads(output.read_text()))
    one, four = found
    assert "fid_std" in one[0] and "recall" in one[1] and "published_probe_top5" in one[2]
    text = {"zero_shot_accuracy", "text_to_image_recall_at_5", "caption_attributes_right", "generated_attributes_right"}
    six = {"accuracy_centre", "text_to_label_accuracy", "label_to_text_right", "label_to_image_right"}
    assert text | six <= set(one[3])
    for expected, values in zip(one, four, strict=True):
        assert values == pytest.approx(expected, rel=1e-6)
