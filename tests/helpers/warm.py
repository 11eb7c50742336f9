"""What the processes that tests start need, imported once for all of them (`launching.forked`)."""

from importlib import import_module

import lzn_dist.evaluate
import lzn_dist.infer
import lzn_dist.train
import lzn_dist.verify  # noqa: F401

# what these, DeepSpeed and accelerate import when they first need it: one to five seconds of a process
for name in (
    "deepspeed.ops", "deepspeed.runtime.zero.muon.muon_optimizer", "matplotlib.pyplot", "sklearn.datasets",
    "sklearn.linear_model", "sklearn.neural_network", "torch._dynamo", "transformers.integrations",
):  # fmt: skip
    import_module(name)
