"""The data types that share one latent space: to add one, a file here and its line in MODALITIES."""

from __future__ import annotations

from lzn_dist.config import Config, ConfigError
from lzn_dist.modalities.base import Keys, Modality, Network
from lzn_dist.modalities.image import Image
from lzn_dist.modalities.label import Label
from lzn_dist.modalities.logits import Logits
from lzn_dist.modalities.text import Text

MODALITIES: dict[str, type[Modality]] = {"image": Image, "label": Label, "text": Text, "logits": Logits}


def modality(name: str, config: Config) -> Modality:
    """A run's data type. Raises ConfigError for one that there is not."""
    if name not in MODALITIES:
        raise ConfigError(f"there is no data type {name!r}: {', '.join(MODALITIES)} are known")
    return MODALITIES[name](config)


__all__ = ["MODALITIES", "Image", "Keys", "Label", "Modality", "Network", "Text", "modality"]
