"""A trained model in use: `load` one of a run, a checkpoint or an exported folder; `LZN` is what one can do with it."""

from lzn_dist.inference.encoding import MissingCapability
from lzn_dist.inference.generative import Generated
from lzn_dist.inference.loading import load
from lzn_dist.inference.model import LZN

__all__ = ["LZN", "Generated", "MissingCapability", "load"]
