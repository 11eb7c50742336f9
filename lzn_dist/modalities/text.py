"""Text: encoded by any network from the tokens of a caption to D numbers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lzn_dist.data import Batch, CaptionReader, MemberReader, Tokenizer
from lzn_dist.keyed_random import fold
from lzn_dist.modalities.base import Modality, Network


class Text(Modality):
    """Tokens int64 [b, l], negative behind a caption's end (and everywhere where there is none)."""

    name: ClassVar[str] = "text"

    def given(self) -> dict[str, Any]:
        return {"vocabulary": self.config.data.vocabulary, "text_length": self.config.data.text_length}

    def reader(self, tokenizer: Tokenizer | None) -> MemberReader | None:
        data = self.config.data
        assert tokenizer is not None
        return CaptionReader(tokenizer, data.text_length, self.config.seed, data.partial)

    def views(self, batch: Batch, index: Tensor, count: int, augmented: bool) -> tuple[Tensor, ...]:
        """One of each sample's captions, and a column more than fits, which is there where it was longer."""
        tokens = batch.members[self.name]
        longest = int((tokens >= 0).sum(1).amax())  # on the host still
        return (tokens[:, : max(8, -(-longest // 8) * 8)].to(index.device, non_blocking=True),)

    def present(self, samples: Tensor) -> Tensor | None:
        return samples[:, 0] >= 0

    def same(self, samples: Tensor) -> Tensor | None:
        """A hash of the tokens, whatever is behind their end."""
        places = torch.arange(samples.shape[1], device=samples.device)
        return torch.where(samples >= 0, fold(samples, places), 0).sum(1)

    def watched(self, samples: Tensor) -> dict[str, Tensor]:
        length = self.config.data.text_length
        cut = samples[:, length:] >= 0 if samples.shape[1] > length else torch.zeros_like(samples[:, :1])
        return {"captions_cut": cut.any(1).float().mean()}

    def encode(self, encoder: Network, samples: Tensor, key: Tensor) -> Tensor:
        return encoder(samples[:, : self.config.data.text_length], key=key)
