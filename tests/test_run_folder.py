"""The run's folder: incarnations, lines, status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lzn_dist.run_folder import RunFolder, SupersededError, read_lines


def test_an_older_incarnation_writes_nothing_more(tmp_path: Path) -> None:
    old = RunFolder(tmp_path)
    old.append("metrics.jsonl", {"step": 1})
    old.status("running", 1)
    new = RunFolder(tmp_path)
    assert new.incarnation == old.incarnation + 1
    with pytest.raises(SupersededError, match=f"incarnation {new.incarnation}"):
        old.append("metrics.jsonl", {"step": 2})
    with pytest.raises(SupersededError):
        old.status("finished", 2)
    with pytest.raises(SupersededError):
        old.trim(0)
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"
    new.status("running", 1, engine="ddp")
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "state": "running", "step": 1, "why": "", "incarnation": new.incarnation, "engine": "ddp"
    }  # fmt: skip


def test_lines_past_the_checkpoint_and_half_lines_go(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.append("metrics.jsonl", {"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    folder.trim(2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "eval.jsonl").read_text() == ""


def test_a_damaged_lock_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text("{")
    assert RunFolder(tmp_path).incarnation == 1
