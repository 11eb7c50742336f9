"""What a data type is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from lzn_dist.config import Config
from lzn_dist.data import Batch

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

    def scaled(self, anchors: Tensor) -> Tensor:
        """Anchors [..., D] brought to the length `anchor_norm`; as they are where it is not set.

        Their length is an inverse temperature of alignment: a point x of noise level σ weighs them by
        exp(r aᵀx/σ − r²‖a‖²/2), r = (1 − σ)/σ. Latents near their zones' centres have a length of about 2.
        """
        section = self.config.modalities.get(self.name)
        if section is None or section.anchor_norm is None:
            return anchors
        return section.anchor_norm * functional.normalize(anchors, dim=-1)

    def decoding_loss(
        self, decoder: Network, samples: Tensor, latents: Tensor, labels: Tensor | None, keys: Keys
    ) -> Tensor:
        """A scalar: the mean loss of making these samples from latents [b, D] (and labels int64 [b])."""
        raise NotImplementedError(f"no decoder makes data of type {self.name}")
