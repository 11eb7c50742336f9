"""The quickstart's last page; the quickstart itself takes minutes and is run by hand."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JOINT = {"accuracy_centre": 0.98, "accuracy_centre_low": 0.96, "accuracy_centre_high": 0.99, "recognised": 0.93,
         "recognised_prior": 0.94, "frechet": 0.75}  # fmt: skip
PROBES = {f"{of}{probe}": at + i / 100 for i, of in enumerate(("", "untrained.", "pixels."))
          for probe, at in (("linear_probe", 0.5), ("knn", 0.7))}  # fmt: skip


@pytest.mark.slow
def test_the_last_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for task, values in (("joint", JOINT), ("representation", PROBES)):
        (tmp_path / task / "figures").mkdir(parents=True)
        (tmp_path / task / "figures" / "training.png").write_bytes(task.encode())
        (tmp_path / task / "evaluation.json").write_text(json.dumps({"step": 1, **values}))
        (tmp_path / task / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "images_per_second": 3}\n')
    monkeypatch.setattr(sys, "argv", ["summary.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "launch" / "summary.py"), run_name="__main__")
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "joint.accuracy_centre": 0.98, "joint.recognised": 0.93, "joint.recognised_prior": 0.94, "joint.frechet": 0.75,
        "representation.linear_probe": 0.5, "untrained.linear_probe": 0.51, "pixels.linear_probe": 0.52,
        "representation.knn": 0.7, "untrained.knn": 0.71, "pixels.knn": 0.72,
    }  # fmt: skip
    figures = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert figures.pop("zones_in_two_dimensions.png").startswith(b"\x89PNG")
    assert figures == {"joint_training.png": b"joint", "representation_training.png": b"representation"}
    printed = capsys.readouterr().out
    assert "98.0%   (95 % interval 96.0% to 99.0%)" in printed and "0.750" in printed
    assert all(str(tmp_path / "figures" / name) in printed for name in figures)
    assert printed.endswith(f"report, for a browser: {tmp_path / 'report.html'}\n")
    assert "linear_probe" in (tmp_path / "report.html").read_text()
