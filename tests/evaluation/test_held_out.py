"""What measures are taken on: held-out images, or the training images where that is asked for, and named so."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from lzn_dist import evaluate
from lzn_dist.config import ConfigError, override
from lzn_dist.evaluation import EvaluationData, evaluate_model
from lzn_dist.evaluation.data import Unmeasurable
from lzn_dist.evaluation.probe import FeatureSet, few_label_probe, knn_accuracy, linear_probe
from lzn_dist.inference import LZN
from tests.helpers.hand_made import tiny


def of_split(task: str, digits: Path, folder: Path, held_out: str) -> LZN:
    """A model whose data has a training split, and the test images under another name or not at all."""
    folder.mkdir()
    for shard in digits.glob("train-*.tar"):
        shutil.copy(shard, folder / shard.name)
    if held_out:
        shutil.copy(digits / "test-000000.tar", folder / f"{held_out}-000000.tar")
    model = tiny(task, digits)
    model.config = override(model.config, ["data.embedded=none", f"data.shards={folder}"])
    return model


@pytest.mark.slow
@pytest.mark.parametrize("task", ["joint", "representation", "generation"])
def test_without_held_out_images_their_measures_are_left_out(task: str, digits: Path, tmp_path: Path) -> None:
    model = of_split(task, digits, tmp_path / "data", "")
    data = EvaluationData(model.config)
    assert data.measured_on == {"split": "train", "images": 1437, "held_out": False}
    left_out: dict[str, str] = {}
    values = evaluate_model(model, data=data, quick=task != "generation", left_out=left_out)
    measured = {"joint": "accuracy", "representation": "probes", "generation": "reconstruction_error"}[task]
    assert "no test or val split" in left_out[measured] and "evaluation.split=train" in left_out[measured]
    held = ("accuracy", "linear", "knn", "probe", "recon")
    assert not [key for key in values if key.startswith(held)] and "zones.variance" in values
    assert "TRAINING" in evaluate.describe(data.measured_on, left_out)

    model.config = override(model.config, ["evaluation.split=train"])  # asked for: named so
    left_out = {}
    values = evaluate_model(model, quick=task != "generation", left_out=left_out)
    assert not left_out and any(key.startswith(tuple(f"train.{name}" for name in held)) for key in values)
    assert not [key for key in values if key.startswith(held)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["validation", "Test", "dev"])
def test_held_out_splits_by_other_names_are_found(name: str, digits: Path, tmp_path: Path) -> None:
    model = of_split("representation", digits, tmp_path / "data", name)
    data = EvaluationData(model.config)
    assert data.measured_on == {"split": name, "images": 300, "held_out": True}
    assert set(evaluate_model(model, data=data, quick=True)) >= {"knn", "probe_10_labels"}


def test_a_split_that_is_not_there_is_refused(digits: Path) -> None:
    model = tiny("joint", digits)
    with pytest.raises(ConfigError, match=r"evaluation\.split=holdout: .* but test, train"):
        EvaluationData(override(model.config, ["evaluation.split=holdout"]))


def test_what_cannot_be_computed_says_why() -> None:
    random = np.random.default_rng(0)

    def features(labels: list[int], test: list[int]) -> FeatureSet:
        return FeatureSet(random.normal(size=(len(labels), 3)), np.array(labels), random.normal(size=(len(test), 3)),
                          np.array(test))  # fmt: skip

    for measure in (linear_probe, knn_accuracy, few_label_probe):
        with pytest.raises(Unmeasurable, match="have 1 class: two are needed"):
            measure(features([0] * 20, [0]))
        with pytest.raises(Unmeasurable, match="no images to measure"):
            measure(features([0, 1] * 10, []))
    with pytest.raises(Unmeasurable, match="class 1 has 9 training images: 10 are needed"):
        few_label_probe(features([0] * 11 + [1] * 9, [0, 1]))
    with pytest.raises(Unmeasurable, match="there are 4 training images: 10 are needed"):
        knn_accuracy(features([0, 1, 0, 1], [0]))
    assert 0 <= knn_accuracy(features([0, 1] * 5, [0, 1])) <= 1


@pytest.mark.slow
def test_results_are_printed_where_they_cannot_be_written(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "load_everywhere", lambda *_, **__: tiny("joint", digits))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "file").touch()
    arguments = [str(tmp_path), "--quick", "--no-figures", "evaluation.samples_per_class=1", "--output"]
    assert evaluate.main([*arguments, str(tmp_path / "file" / "out")]) == 0
    told = capsys.readouterr()
    assert "accuracy_centre" in told.out and "cannot be written to" in told.err and "--output DIR" in told.err

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate, "write_json", full)
    assert evaluate.main([*arguments, str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert "accuracy_centre" in told.out and f"No space left on device: {tmp_path}/out/evaluation.json" in told.err
    monkeypatch.undo()
    monkeypatch.setattr(evaluate, "load_everywhere", lambda *_, **__: tiny("joint", digits))
    monkeypatch.setattr(evaluate, "write_figures", full)
    del arguments[2]
    assert evaluate.main([*arguments, str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert "not all figures could be drawn: OSError" in told.err and (tmp_path / "out" / "evaluation.json").is_file()


def test_the_published_probe_needs_held_out_images_too(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = of_split("representation", digits, tmp_path / "data", "")
    monkeypatch.setattr(evaluate, "load_everywhere", lambda *_, **__: model)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert evaluate.main([str(tmp_path), "--probe-epochs", "1"]) == 2
    told = capsys.readouterr()
    assert "error: --probe-epochs: " in told.err and "no test or val split" in told.err and not told.out
