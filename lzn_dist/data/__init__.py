"""From shards to batches: a pure function of seed and step, the same on any number of ranks."""

from lzn_dist.data.augment import DigitsPolicy, Policy, random_flip, two_views
from lzn_dist.data.digits import ensure_digits, write_digits
from lzn_dist.data.shards import (
    Batch,
    BatchStream,
    CorruptSampleError,
    EvaluationBatch,
    Shard,
    ShardedDataset,
    ShardIndex,
    to_unit_range,
    write_manifest,
)

__all__ = [
    "Batch",
    "BatchStream",
    "CorruptSampleError",
    "DigitsPolicy",
    "EvaluationBatch",
    "Policy",
    "Shard",
    "ShardIndex",
    "ShardedDataset",
    "ensure_digits",
    "random_flip",
    "to_unit_range",
    "two_views",
    "write_digits",
    "write_manifest",
]
