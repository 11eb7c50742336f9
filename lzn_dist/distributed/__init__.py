"""What knows ranks: topology, the differentiable gather of anchors, the engine."""

from lzn_dist.distributed.anchors import gather_anchors
from lzn_dist.distributed.topology import Topology

__all__ = ["Topology", "gather_anchors"]
