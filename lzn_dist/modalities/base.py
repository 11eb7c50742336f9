"""What a data type is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lzn_dist.config import Config
from lzn_dist.data import Batch, MemberReader, Tokenizer

Keys = Callable[[str], Tensor]  # of a stream of random numbers: int64 [b], a key a sample
Network = Callable[..., Tensor]  # a network's forward, in the run's precision


class Modality(ABC):
    """Samples that an encoder takes to anchors in the latent space, and that a decoder makes from latents.

    table: there is a finite set of values, each with an anchor of its own (labels), which every rank has; else each
    sample is encoded by itself and the batch's samples make the zones. most_views: of a sample, that can be had.
    """

    name: ClassVar[str]
    table: ClassVar[bool] = False
    most_views: ClassVar[int] = 1

    def __init__(self, config: Config) -> None:
        self.config = config

    def stream(self, name: str) -> str:
        """A name for random numbers of this data type."""
        return f"{self.name}/{name}"

    def given(self) -> dict[str, Any]:
        """What follows from the data for the constructors of networks: they are given of it what they take."""
        return {}

    @abstractmethod
    def views(self, batch: Batch, index: Tensor, count: int, augmented: bool) -> tuple[Tensor, ...]:
        """What networks see of a rank's share of a batch, on the device of index int64 [b] (the samples' numbers):
        ``count`` views of each sample at least. augmented: as the policy of the data says."""

    def encode(self, encoder: Network, samples: Tensor, key: Tensor) -> Tensor:
        """Anchors [b, D] of samples; key int64 [b] for dropout. A table: those of all values, [K, D]; no samples."""
        return encoder(samples, key=key)

    def reader(self, tokenizer: Tokenizer | None) -> MemberReader | None:
        """How a sample's own member becomes what `views` finds in a batch's `members`; None: images and labels are
        read for everybody."""
        return None

    def present(self, samples: Tensor) -> Tensor | None:
        """Bool [b]: which samples have data of this type; None: all have."""
        return None

    def same(self, samples: Tensor) -> Tensor | None:
        """int64 [b], equal where two samples are meant to have one anchor; None: each has its own."""
        return None

    def watched(self, samples: Tensor) -> dict[str, Tensor]:
        """Scalars of the samples that are worth watching."""
        return {}

    @property
    def centred(self) -> bool:
        section = self.config.modalities.get(self.name)
        return section is not None and section.anchor_centred

    @property
    def norm(self) -> float | None:
        section = self.config.modalities.get(self.name)
        return None if section is None else section.anchor_norm

    def placed(self, anchors: Tensor, centre: Tensor | None) -> Tensor:
        """Anchors [..., D] around a centre [D] (None: as they lie) and brought to the length `anchor_norm`; as they
        are where it is not set.

        Their length is an inverse temperature of alignment: a point x of noise level σ weighs them by
        exp(r aᵀx/σ − r²‖a‖²/2), r = (1 − σ)/σ. Latents near their zones' centres have a length of about 2. The flow
        does not feel a common shift of one type's anchors, so that between two types cosines say nothing without one.
        """
        if centre is not None:
            anchors = anchors - centre
        return anchors if self.norm is None else self.norm * functional.normalize(anchors, dim=-1)

    def decoding_loss(
        self, decoder: Network, samples: Tensor, latents: Tensor, labels: Tensor | None, keys: Keys,
        shares: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """A scalar: the mean loss of making these samples from latents [b, D] (and labels int64 [b]); shares [b]: of
        the samples in the mean (None: equal)."""
        raise NotImplementedError(f"no decoder makes data of type {self.name}")


def shared_mean(losses: Tensor, shares: Tensor | None) -> Tensor:
    """The mean of losses [b] with weights [b]; what has none counts nothing, whatever its loss is."""
    return (losses if shares is None else losses.masked_fill(torch.eq(shares, 0), 0.0) * shares).mean()
