"""What turns cosines into logits, trained with the encoders: no data, but a network of the run as any other."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lzn_dist.data import Batch
from lzn_dist.modalities.base import Modality, Network


class Logits(Modality):
    """CLIP's and SigLIP's log-scale and bias: [2]."""

    name: ClassVar[str] = "logits"
    table: ClassVar[bool] = True

    def views(self, batch: Batch, index: Tensor, count: int, augmented: bool) -> tuple[Tensor, ...]:
        return ()

    def encode(self, encoder: Network, samples: Tensor, key: Tensor) -> Tensor:
        return encoder()
