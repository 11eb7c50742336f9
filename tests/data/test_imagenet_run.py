"""ImageNet from its published archives into ResNet-50 on two ranks: the configuration as it stands, a smaller batch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.helpers.launching import ROOT, data_prep, ranks
from tests.helpers.published import imagenet, imagenet_arguments


@pytest.mark.soak  # README's commands take the same way with small networks
@pytest.mark.process
def test_shards_stream_into_resnet_50_on_two_ranks(tmp_path: Path) -> None:
    imagenet(tmp_path / "published", per_class=6, val=6, size=(150, 200))
    data_prep("imagenet", *imagenet_arguments(tmp_path / "published"), "--output", tmp_path / "shards")
    run = tmp_path / "run"
    done = ranks(
        "ddp", ROOT / "lzn_dist" / "train.py", ROOT / "configs" / "imagenet_representation.yaml",
        f"data.shards={tmp_path / 'shards'}", f"output_dir={run}", "data.global_batch=4", "data.streams=2",
        "data.workers=1", "max_steps=3", "log_every=1", "evaluation.batch=6", "tracking.wandb=disabled", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "28,231,232 parameters, engine ddp on 2 process(es)" in done.stdout
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["images"] == 12
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert not (run / "bad_samples.jsonl").exists()
    evaluation = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    assert evaluation.pop("measured_on")["split"] == "val"
    assert evaluation.pop("left_out") == {"probe_10_labels": "class 0 has 6 training images: 10 are needed"}
    assert evaluation["step"] == 3 and all(math.isfinite(v) for v in evaluation.values())
