"""What a configuration leaves to the data: image size and channels, number of classes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch
from pydantic import ValidationError

from lzn_dist.config import Config, ConfigError
from lzn_dist.data import ShardIndex, Tokenizer, load_tokenizer
from lzn_dist.data.pixels import load_with_pillow
from lzn_dist.data.storage import RemoteError
from lzn_dist.objectives import build_networks, needs
from lzn_dist.prepare.digits import ensure_digits


def resolve(config: Config) -> Config:
    """A configuration with what it leaves to the data: image size and channels, number of classes; the networks
    that it describes can be made. Reads the shards' index and the first images: every process finds the same.

    Raises ConfigError, and RemoteError where a server is away.
    """
    try:
        return _resolved(config)
    except (ConfigError, RemoteError):
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def _resolved(config: Config) -> Config:
    data = config.data
    if data.embedded == "none" and (not data.image_size or not data.image_channels or data.num_classes < 0):
        index = ShardIndex.load(data.shards, data.cache, data.retry_seconds)
        found: dict[str, int] = {}
        if data.num_classes < 0:
            found["num_classes"] = len(index.classes)
            if not index.identity:
                raise ConfigError(f"{index.folder} has no manifest, which counts the classes: set data.num_classes")
        if not data.image_size or not data.image_channels:
            images = first_images(index)
            height = images[0][0]
            if not data.image_size and {size[:2] for size in images} != {(height, height)}:
                other = next(size for size in images if size[:2] != (height, height))
                raise ConfigError(
                    f"images of {index.folder} are not squares of one size, one is {other[0]}x{other[1]}: prepare the "
                    "shards with --resize and --crop, or set data.image_size and data.resize"
                )
            colours = max(channels for *_, channels in images)  # one in colour makes it a set in colour
            found |= {"image_size": data.image_size or height, "image_channels": data.image_channels or colours}
        config = _updated(config, data=found)
    if "text" in needs(config).modalities and not (data.vocabulary and data.tokenizer_sha256):
        if data.embedded == "digits":  # of processes that race, one writes it
            ensure_digits(data.shards)
        index = ShardIndex.load(data.shards, data.cache, data.retry_seconds)
        if data.embedded == "digits" and "txt" not in index.split("train").offsets:
            raise ConfigError(f"{data.shards} was written when digits had no captions: remove it, to write it anew")
        tokenizer = tokenizer_of(config, index)
        assert tokenizer is not None
        config = _updated(config, data={"vocabulary": tokenizer.vocabulary, "tokenizer_sha256": tokenizer.sha256})
    with torch.device("meta"):  # what the networks' classes refuse is told before any work
        build_networks(config)
    return config


def _updated(config: Config, **sections: Mapping[str, object]) -> Config:
    """Checked anew."""
    values = config.model_dump()
    for section, changes in sections.items():
        values[section] = {**values[section], **changes}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())) from None


def tokenizer_of(config: Config, index: ShardIndex) -> Tokenizer | None:
    """The run's, where it has text. Raises ConfigError where it is another one than the run was made for."""
    if "text" not in needs(config).modalities:
        return None
    data = config.data
    try:
        found = load_tokenizer(index, data.tokenizer)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if data.tokenizer_sha256 not in ("", found.sha256) or data.vocabulary not in (0, found.vocabulary):
        where = data.tokenizer or f"{index.folder}/tokenizer.json"
        raise ConfigError(
            f"{where} (vocabulary {found.vocabulary}) is not the tokenizer that this model was made for (vocabulary "
            f"{data.vocabulary}, SHA-256 {data.tokenizer_sha256[:12]}…): set data.tokenizer to that one"
        )
    return found


_LOOKED_AT = 32


def first_images(index: ShardIndex) -> list[tuple[int, int, int]]:
    """Height, width and channels (1 or 3) of the first training images, of those that can be read."""
    split, found = index.split("train"), []
    for row in range(min(len(split), _LOOKED_AT)):
        content = index.storage.read(split.shard_of(row).name, *split.images[row].tolist())
        with suppress(ValueError):
            image = load_with_pillow(content)
            grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
            found.append((image.height, image.width, 1 if grey else 3))
    if not found:
        raise ConfigError(
            f"{index.folder}: none of its first images can be read: see python data_prep/check.py --decode"
        )
    return found
