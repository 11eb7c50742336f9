"""Latent zones: the analytic flow between the Gaussian prior and a set of anchors (arXiv 2509.15591, section 2).

Time, everywhere in this folder: ``sigma`` is the noise level, 1 = prior, 0 = anchors, x = (1−σ) a + σ ε.
The folder imports torch (torchdiffeq for the adaptive solver, Triton for the kernels) alone and knows no rank: the
field over the anchors is a value (`Field`), and one that spreads them over processes keeps its communication to itself.
"""

from lzn_dist.zones.alignment import Alignment, align, alignment_loss, nearest_anchor
from lzn_dist.zones.field import AnchorField, Field, FieldFactory, block_class
from lzn_dist.zones.latents import compute_latents, latents_beside
from lzn_dist.zones.schedules import SIGMA_MIN

__all__ = [
    "SIGMA_MIN",
    "Alignment",
    "AnchorField",
    "Field",
    "FieldFactory",
    "align",
    "alignment_loss",
    "block_class",
    "compute_latents",
    "latents_beside",
    "nearest_anchor",
]
