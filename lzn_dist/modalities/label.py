"""Labels: a learnable anchor a class; the decoder is the nearest anchor (arXiv 2509.15591, section 4.3)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lzn_dist.data import Batch
from lzn_dist.modalities.base import Modality, Network


class Label(Modality):
    """int64 [b]."""

    name: ClassVar[str] = "label"
    table: ClassVar[bool] = True

    def given(self) -> dict[str, Any]:
        return {"num_classes": self.config.data.num_classes}

    def views(self, batch: Batch, index: Tensor, count: int, augmented: bool) -> tuple[Tensor, ...]:
        return (batch.labels.to(index.device),)

    def present(self, samples: Tensor) -> Tensor | None:
        return samples >= 0

    def encode(self, encoder: Network, samples: Tensor, key: Tensor) -> Tensor:
        return encoder()
