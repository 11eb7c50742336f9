"""What knows ranks: topology, launch and engines, gather and ring of anchors, gradient caching, guards."""

from lzn_dist.distributed.gather import gather_anchors
from lzn_dist.distributed.ring import ring_field
from lzn_dist.distributed.topology import Topology

__all__ = ["Topology", "gather_anchors", "ring_field"]
