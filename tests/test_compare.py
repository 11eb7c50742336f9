"""The comparison: files that do not fit together, and a small one run to its table."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lzn_dist import compare
from lzn_dist.config import ConfigError, load_config
from lzn_dist.evaluation.figures import comparison_figure
from tests.helpers.settings import encoder_with

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits_representation.yaml")


def written(path: Path, rows: list[dict[str, object]], **more: object) -> Path:
    table = {"title": "T", "measures": ["knn", "linear_probe"], "rows": rows}
    path.write_text(yaml.safe_dump({"output_dir": str(path.parent / "out"), "seeds": [3], "tables": [table], **more}))
    return path


@pytest.mark.parametrize(
    "rows,message",
    [
        ([{"name": "a"}], "row 'a' needs one of config, from, or like with time_of"),
        ([{"name": "a", "config": DIGITS}, {"name": "b", "like": "a"}], "row 'b' needs one of config"),
        ([{"name": "a", "config": DIGITS}, {"name": "b", "from": "c"}], "names 'c', which is no row with a config"),
        ([{"name": "a b", "config": DIGITS}, {"name": "A-b", "config": DIGITS}], "two rows have the same name"),
        ([{"name": "a", "config": DIGITS, "seeds": 3}], r"rows\.0\.seeds: Extra inputs"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: list[dict[str, object]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        compare.read_comparison(written(tmp_path / "c.yaml", rows))


@pytest.mark.parametrize(
    "options,message",
    [(["--seeds", "0", "0"], "seeds: .*stands there twice"), (["--jobs", "-1"], "jobs: .*greater than 0")],
)
def test_seeds_and_jobs_that_cannot_be_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "c.yaml", [{"name": "a", "config": DIGITS}])
    assert compare.main([str(path), *options]) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_every_row_is_checked_before_any_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": "a", "config": DIGITS}, {"name": "b", "config": DIGITS, "overrides": {"objectiv": "moco"}}]
    assert compare.main([str(written(tmp_path / "c.yaml", rows))]) == 2
    assert "unknown key 'objectiv'" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_projects_own_comparisons_can_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (ROOT / "configs" / "compare").glob("*.yaml"):
        found = compare.read_comparison(path)
        for row in found.rows.values():
            if row.config:
                compare.make_job(found, path.parent, row, 0, [])


def test_comparisons_and_launches_are_found_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compare.main(["digts"]) == 2 and "no comparison" in (said := capsys.readouterr().err) and "digits?" in said
    assert compare.main(["digits", "--launch", "dpd"]) == 2 and "ddp" in capsys.readouterr().err
    # it is read: its rows are checked
    assert compare.main(["digits", "latent.dim=0"]) == 2 and "latent.dim" in capsys.readouterr().err


def test_mean_and_deviation_are_over_seeds() -> None:
    assert compare.mean_and_deviation([1.0, 2.0, 6.0]) == pytest.approx((3.0, 7.0**0.5))
    assert compare.mean_and_deviation([0.5]) == (0.5, 0.0)


@pytest.mark.process
def test_a_comparison_from_training_to_table_and_figure(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rows, one of them for as long as the other took; a second call finds everything done. The file's overrides
    and evaluate's options reach all rows."""
    rows = [
        {"name": "pixels", "from": "SimCLR", "prefix": "pixels."},
        {
            "name": "SimCLR",
            "config": DIGITS,
            "overrides": {"objective": "simclr", "modalities.image.encoder.arguments.blocks": [1]},
        },
        {"name": "again", "like": "SimCLR", "time_of": "SimCLR"},
    ]
    more = {"overrides": {"log_every": 2}, "evaluate": ["--no-figures"], "jobs": 2}
    arguments = [str(written(tmp_path / "c.yaml", rows, **more)), "max_steps=6", f"data.shards={digits}"]
    arguments += [*encoder_with(channels=8), "data.global_batch=16", "tracking.wandb=disabled"]
    assert compare.main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())["tables"]["T"]
    run = tmp_path / "out" / "simclr" / "seed_3"
    assert load_config(run / "config.yaml").seed == 3 and load_config(run / "config.yaml").log_every == 2
    assert load_config(run / "config.yaml").cpu_threads == max(1, (os.cpu_count() or 1) // 2)  # beside another
    assert not (run / "figures").exists()
    values = json.loads((run / "evaluation.json").read_text())
    assert found["SimCLR"]["knn"] == [values["knn"]] and found["pixels"]["knn"] == [values["pixels.knn"]]
    other = json.loads((tmp_path / "out" / "again" / "seed_3" / "evaluation.json").read_text())
    assert "knn" in other and not [name for name in other if name.startswith(("pixels.", "untrained."))]  # nobody reads
    # its own time: the same steps, so the same model
    assert found["again"]["steps"] == [6] and found["again"]["linear_probe"] == found["SimCLR"]["linear_probe"]
    assert any(
        line.startswith("pixels") and f"{values['pixels.knn']:.4f} ± 0.0000" in line for line in printed.split("\n")
    )
    assert np.asarray(Image.open(tmp_path / "out" / "comparison.png").convert("L")).std() > 5
    before = (run / "evaluation.json").stat().st_mtime_ns
    assert compare.main(arguments) == 0 and (run / "evaluation.json").stat().st_mtime_ns == before
    capsys.readouterr()
    assert compare.main([*arguments, "latent.noise_scale=0.9"]) == 2  # not the other settings' result as its own
    assert "seed_3 was trained with other settings (latent.noise_scale: 0.2 → 0.9)" in capsys.readouterr().err
    (run / "evaluation.json").write_text(json.dumps(values | {"knn": "x"}))  # damage is not an absent measure
    assert compare.main(arguments) == 2
    assert "evaluation.json is damaged (knn is no number)" in capsys.readouterr().err


def test_the_figure_shows_a_dot_for_every_seed(tmp_path: Path) -> None:
    rows = {"LZN": {"a": [0.1, 0.2], "b": [1.0, 2.0]}, "SimCLR": {"a": [0.3]}}
    one = comparison_figure({"T": rows}, {"T": ["a", "b"]}, tmp_path / "one.png")
    two = comparison_figure({"T": {**rows, "SimCLR": {}}}, {"T": ["a", "b"]}, tmp_path / "two.png")
    images = [np.asarray(Image.open(path).convert("L")).astype(int) for path in (one, two)]
    assert images[0].shape == images[1].shape and (images[0] < 200).sum() > (images[1] < 200).sum() + 20
