"""Networks: encoders and decoders of images and text, label anchors, averaged weights.

The folder imports torch, lzn_dist.keyed_random and, where it is installed, xformers (transformers and safetensors for
what others have trained); it knows no rank, no configuration object and no trainer. Images are [b, c, h, w] in [−1, 1].
Initial weights come from torch's global generator, which the caller seeds.

Every encoder offers ``forward(images, key=None)`` → anchors [b, D], ``features(images, key=None)`` →
[b, feature_dim] (what a linear probe reads), ``feature_dim``, and ``batch_independent``: True, since all
normalisation is within a sample, so that micro-batches may be encoded one after the other.
"""

from lzn_dist.models.ema import EMA
from lzn_dist.models.label_anchors import LabelAnchors
from lzn_dist.models.layers import KeyedDropout, attention
from lzn_dist.models.ncsnpp import ImageDecoder, ImageEncoder
from lzn_dist.models.pretrained import PretrainedTextEncoder, StaticTextEncoder
from lzn_dist.models.resnet import ResNetEncoder
from lzn_dist.models.text import LogitScale, TextDecoder, TextEncoder

__all__ = [
    "EMA",
    "ImageDecoder",
    "ImageEncoder",
    "KeyedDropout",
    "LabelAnchors",
    "LogitScale",
    "PretrainedTextEncoder",
    "ResNetEncoder",
    "StaticTextEncoder",
    "TextDecoder",
    "TextEncoder",
    "attention",
]
