"""From shards to batches: a pure function of seed and step, the same on any number of ranks."""

from lzn_dist.data.augment import DigitsPolicy, Policy, SimCLRPolicy, make_views, random_flip
from lzn_dist.data.captions import CaptionReader, Tokenizer, load_tokenizer
from lzn_dist.data.index import Shard, ShardIndex, Split, write_manifest
from lzn_dist.data.order import SampleOrder
from lzn_dist.data.pixels import CentreCrop, Exact, RandomResizedCrops, Reading, whole_images
from lzn_dist.data.shards import (
    BadSample,
    Batch,
    BatchStream,
    CorruptSampleError,
    EvaluationBatch,
    FixedBatches,
    MemberReader,
    ShardedDataset,
    to_unit_range,
)

__all__ = [
    "BadSample",
    "Batch",
    "BatchStream",
    "CaptionReader",
    "CentreCrop",
    "CorruptSampleError",
    "DigitsPolicy",
    "EvaluationBatch",
    "Exact",
    "FixedBatches",
    "MemberReader",
    "Policy",
    "RandomResizedCrops",
    "Reading",
    "SampleOrder",
    "Shard",
    "ShardIndex",
    "ShardedDataset",
    "SimCLRPolicy",
    "Split",
    "Tokenizer",
    "load_tokenizer",
    "make_views",
    "random_flip",
    "to_unit_range",
    "whole_images",
    "write_manifest",
]
