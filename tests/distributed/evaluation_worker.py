"""Started by accelerate launch in the tests: evaluates small untrained models, writes the values as JSON.

evaluation_worker.py OUTPUT SHARDS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from launching import ROOT, SMALL

from lzn_dist.config import load_config
from lzn_dist.distributed import Topology
from lzn_dist.evaluation import EvaluationData, evaluate_model
from lzn_dist.model import LZN
from lzn_dist.networks import build_networks

CELLS = [
    ("joint", []), ("generation", ["objective=rectified_flow", "decoder.class_conditional=true"]),
    ("representation", ["objective=supervised"]),
]  # fmt: skip


def main() -> None:
    output, shards = map(Path, sys.argv[1:])
    PartialState(cpu=True)
    torch.set_num_threads(1)
    results = []
    for task, more in CELLS:
        overrides = ["evaluation.batch=100", "evaluation.samples_per_class=60", "flow.sampler_steps=2"]
        overrides += ["evaluation.alignment_steps=5", "evaluation.noise_scales=[1.0]", f"data.shards={shards}"]
        config = load_config(ROOT / "configs" / f"digits_{task}.yaml", [*SMALL, *overrides, *more])
        torch.manual_seed(0)
        model = LZN(build_networks(config), config)
        results.append(evaluate_model(model, figures=False, data=EvaluationData(config), quick=task != "joint"))
    if Topology.current().is_main:
        output.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
