"""From a configuration's `objective` to what it needs, its networks, and the object that computes it."""

from __future__ import annotations

from typing import Any

from lzn_dist.config import Config, ConfigError
from lzn_dist.modalities import modality
from lzn_dist.networks import Networks, make_network
from lzn_dist.objectives.base import Gather, Needs, Objective
from lzn_dist.objectives.clip import CLIP, SigLIP
from lzn_dist.objectives.lzn import LZN
from lzn_dist.objectives.moco import MoCo
from lzn_dist.objectives.rectified_flow import RectifiedFlow
from lzn_dist.objectives.simclr import SimCLR
from lzn_dist.objectives.supervised import Supervised
from lzn_dist.zones import FieldFactory

OBJECTIVES: dict[str, type[Objective]] = {
    "lzn": LZN, "rectified_flow": RectifiedFlow, "simclr": SimCLR, "moco": MoCo, "supervised": Supervised,
    "clip": CLIP, "siglip": SigLIP,
}  # fmt: skip


def needs(config: Config) -> Needs:
    """What the configured objective needs of data and networks. Raises ConfigError for what cannot be together."""
    found = OBJECTIVES[config.objective].declare(config)
    data = config.data
    if found.labels and data.num_classes == 0:
        raise ConfigError("labels are needed here (for the objective, or to condition a decoder): set data.num_classes")
    if config.anchors == "ring" and config.objective != "lzn":
        raise ConfigError("anchors=ring is for objective=lzn")
    for name in found.modalities:
        most = modality(name, config).most_views
        if found.views(name) > most:
            raise ConfigError(f"alignment.pairs: there is no {name}.{found.views(name)}, but {name}.1 to {name}.{most}")
    if found.views("image") > 1 and data.views == "none":
        raise ConfigError("data.views=none is for objective=supervised: two equal views teach nothing")
    if found.augmented and data.views == "simclr":
        if data.image_channels == 1:
            raise ConfigError("data.views=simclr changes colours: set data.image_channels=3, or data.views=digits")
        if data.cache_decoded:
            raise ConfigError("data.views=simclr crops anew in each epoch: set data.cache_decoded=false")
    return found


def given_for(config: Config, name: str, role: str) -> dict[str, Any]:
    """What follows from data and run for the constructor of a network: of it the class gets what it takes."""
    wanted = needs(config)
    given = modality(name, config).given() | {"latent_dim": config.latent.dim}
    if role == "decoder":
        conditional = any(decoding.class_conditional for decoding in wanted.decodes if decoding.what == name)
        given["num_classes"] = config.data.num_classes if conditional else 0
        given["latent_dim"] = config.latent.dim if wanted.latents else 0
    elif wanted.logits:
        given |= {"latent_dim": config.data.num_classes, "head": "linear"}
    return given


def build_networks(config: Config) -> Networks:
    """Fresh networks, those that the objective needs; the initial weights come from torch's global generator, which the
    caller seeds.

    Raises ConfigError, naming the argument, for arguments that a class does not take and sizes that do not fit
    together.
    """
    made: dict[str, dict[str, Any]] = {}
    for name, role in needs(config).networks:
        given = given_for(config, name, role)
        network = make_network(config.network(name, role), role, given, f"modalities.{name}.{role}")
        made.setdefault(name, {})[role] = network
    return Networks(made)


def build_objective(config: Config, networks: Networks, gather: Gather, field: FieldFactory | None = None) -> Objective:
    """The objective over all ranks that gather and field reach. networks: whole, with their initial weights."""
    if config.objective == "lzn":
        return LZN(config, gather, field)
    if config.objective == "moco":
        return MoCo(config, gather, networks)
    return OBJECTIVES[config.objective](config, gather)
