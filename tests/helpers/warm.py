"""What the processes that tests start need, imported once for all of them (`launching.forked`)."""

import lzn_dist.evaluate
import lzn_dist.infer
import lzn_dist.train
import lzn_dist.verify  # noqa: F401
