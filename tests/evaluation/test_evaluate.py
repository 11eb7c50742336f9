import errno
import json
import re
from pathlib import Path

import pytest

from lzn_dist import evaluate
from lzn_dist.data import CorruptSampleError
from tests.helpers.hand_made import tiny


def test_a_missing_run_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no run in" in error and "nothing" in error
    (tmp_path / "empty").mkdir()
    assert evaluate.main([str(tmp_path / "empty")]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err


def test_overrides_are_of_what_evaluation_may_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path), "latent.dim=3"])
    assert "overrides are of evaluation., flow. or data." in capsys.readouterr().err


def test_table_and_json_tell_the_same(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "load_everywhere", lambda *_, **__: tiny("joint", digits))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert (
        evaluate.main(
            [
                str(tmp_path),
                "evaluation.samples_per_class=1",
                "--quick",
                "--no-figures",
                "--output",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    values = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert values.pop("step") == 1 and values.pop("task") == "joint" and values.pop("seed") == 0
    settings = values.pop("settings")
    assert values.pop("measured_on") == {"split": "test", "images": 360, "held_out": True}
    assert values.pop("left_out") == {}
    assert settings["evaluation"]["samples_per_class"] == 1 and settings["flow"]["sampler"] == "euler"
    printed = capsys.readouterr().out
    assert "measured on split test: 360 held-out images" in printed
    for key, value in values.items():
        assert f"{value:.4f}" in next(line for line in printed.splitlines() if line.split()[:1] == [key])
    assert not (tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize(
    "task,objective,batch,says",
    [
        ("representation", "lzn", 8192, "linear probe: .*8192"),
        ("generation", "rectified_flow", 64, "has no image encoder: it cannot embed"),
    ],
)
def test_a_probe_that_cannot_be_is_refused_before_anything_is_measured(
    task: str, objective: str, batch: int, says: str, tmp_path: Path, digits: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(evaluate, "load_everywhere", lambda *_, **__: tiny(task, digits, objective))
    monkeypatch.setattr(evaluate, "evaluate_model", lambda *args, **more: pytest.fail("measured"))
    assert evaluate.main([str(tmp_path), "--probe-epochs", "1", "--probe-batch", str(batch)]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error) and error.count("\n") == 1


@pytest.mark.parametrize(
    "error,status",
    [
        (CorruptSampleError("images of another size"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (ConnectionError("no answer"), 74),
    ],
)
def test_data_that_fails_is_one_line(
    error: Exception, status: int, tmp_path: Path, digits: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*args: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(evaluate, "load_everywhere", lambda *_, **__: tiny("joint", digits))
    monkeypatch.setattr(evaluate, "evaluate_model", fail)
    assert evaluate.main([str(tmp_path)]) == status
    assert capsys.readouterr().err == f"error: {error}\n" and not (tmp_path / "evaluation.json").exists()
