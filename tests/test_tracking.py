"""Tracking that cannot start, or go on, stops nothing that did not ask for it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lzn_dist.config import ConfigError
from lzn_dist.training.run_folder import RunFolder
from lzn_dist.training.tracking import Tracker, wandb_mode
from tests.helpers.small_run import small_config


class Trackers:
    """Stands for the Accelerator's part in it. refuses: the modes in which wandb does not start."""

    def __init__(self, *refuses: str) -> None:
        self.refuses, self.trackers, self.logged = refuses, ["half started"], list[dict[str, Any]]()
        self.num_processes, self.full = 1, False

    def init_trackers(self, project: str, config: dict[str, Any], kwargs: dict[str, Any]) -> None:
        settings = kwargs["wandb"]
        assert settings["settings"].init_timeout <= 15
        if settings["mode"] in self.refuses:
            raise RuntimeError(f"no {settings['mode']}\nin two lines")
        self.trackers = [settings["mode"]]

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.logged.append(values)


def tracker(accelerator: Trackers, asked: str, folder: Path) -> Tracker:
    config = small_config(f"tracking.wandb={asked}", f"output_dir={folder / 'run'}")
    return Tracker(config, accelerator, RunFolder(folder / "run").take(), 0)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def known_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("wandb.login", lambda **_: True)


def test_auto_goes_on_offline_then_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accelerator = Trackers("online")
    found = tracker(accelerator, "auto", tmp_path)
    assert found.tracks and accelerator.trackers == ["offline"]
    assert capsys.readouterr().err.count("does not start online (RuntimeError: no online in two lines)") == 1
    accelerator = Trackers("online", "offline")
    found = tracker(accelerator, "auto", tmp_path)
    assert not found.tracks and accelerator.trackers == []  # nothing half started to be ended later
    assert "going on without it" in capsys.readouterr().err
    found.evaluation(1, {"x": 1.0}, {"split": "test"}, {})
    assert not accelerator.logged and (tmp_path / "run" / "eval.jsonl").exists()


@pytest.mark.parametrize("asked", ["online", "offline"])
def test_what_was_asked_for_is_refused(asked: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no {asked} in two lines.*tracking.wandb=offline or disabled"):
        tracker(Trackers(asked), asked, tmp_path)


def test_a_tracker_that_fails_later_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accelerator = Trackers()
    found = tracker(accelerator, "offline", tmp_path)
    found.evaluation(1, {"x": 1.0}, {"split": "test"}, {"y": "too few"})
    assert accelerator.logged == [{"eval/seed": 0, "eval/x": 1.0}]
    accelerator.full = True
    for step in (2, 3):
        found.evaluation(step, {"x": 1.0}, {"split": "test"}, {"y": "too few"})
    told = capsys.readouterr().err
    assert told.count("wandb takes no more (OSError") == 1 and told.count("evaluation leaves out y: too few") == 1
    assert len((tmp_path / "run" / "eval.jsonl").read_text().splitlines()) == 3


def test_without_a_user_a_home_or_the_package_it_is_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(**_: object) -> bool:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr("wandb.login", nobody)
    assert wandb_mode("auto") == "offline"
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    assert wandb_mode("auto") == "offline"
