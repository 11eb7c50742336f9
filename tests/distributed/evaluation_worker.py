"""One rank, started by the tests: evaluates small untrained models, writes the values as JSON.

evaluation_worker.py OUTPUT SHARDS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from lzn_dist.config import load_config
from lzn_dist.distributed import Topology
from lzn_dist.evaluation import EvaluationData, evaluate_model
from lzn_dist.evaluation.fid import fid_values
from lzn_dist.evaluation.inception import InceptionOutput
from lzn_dist.evaluation.linear_probe import ProbeSettings, published_probe
from lzn_dist.inference import LZN
from lzn_dist.objectives import build_networks
from lzn_dist.terminal import command
from lzn_dist.training.resolve import resolve
from tests.helpers.launching import ROOT, SMALL

TEXT = [f"modalities.text.{role}.arguments={{width: 16, depth: 1, heads: 2}}" for role in ("encoder", "decoder")]
CELLS = [
    ("joint", []), ("generation", ["objective=rectified_flow"]),
    ("representation", ["objective=supervised"]),
    ("three", TEXT),
]  # fmt: skip


def projection(images: Tensor) -> InceptionOutput:
    """Stands for Inception, whose weights are not here."""
    generator = torch.Generator().manual_seed(0)
    pool, spatial, logits = (images.flatten(1) @ torch.randn(64, width, generator=generator) for width in (6, 4, 5))
    return InceptionOutput(pool.numpy(), spatial.numpy(), logits.softmax(1).numpy())


def main() -> int:
    output, shards = map(Path, sys.argv[1:])
    PartialState(cpu=True)
    torch.set_num_threads(1)
    results = []
    for task, more in CELLS:
        overrides = ["evaluation.batch=100", "evaluation.samples_per_class=60", "flow.sampler_steps=2"]
        overrides += ["evaluation.alignment_steps=5", "evaluation.noise_scales=[1.0]", f"data.shards={shards}"]
        config = resolve(load_config(ROOT / "configs" / f"digits_{task}.yaml", [*SMALL, *overrides, *more]))
        torch.manual_seed(0)
        centres = {name: torch.zeros(8) for name in ("image", "text")}
        model = LZN(build_networks(config), config, centres=centres)
        data = EvaluationData(config)
        values = evaluate_model(model, figures=False, data=data, quick=True)
        if model.has_decoder and model.draws_prior:
            cache = output.with_suffix(".cache")
            values |= fid_values(model, data, projection, weights="", cache=cache, samples=600, seeds=[0, 1])
        if model.has_logits:
            values |= published_probe(model, data, ProbeSettings(2, 128, 1e-2), output.with_suffix(".probe"))
        results.append(values)
    if Topology.current().is_main:
        output.write_text(json.dumps(results))
    PartialState().destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
