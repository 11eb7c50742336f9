"""Activation checkpointing: activations of the forward are dropped and computed again in the backward."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from lzn_dist.models.ncsnpp import AttentionBlock, ResidualBlock
from lzn_dist.models.resnet import BottleneckBlock
from lzn_dist.networks import Networks

Policy = Literal["none", "selective", "full"]
BLOCKS = (ResidualBlock, AttentionBlock, BottleneckBlock)


def blocks(networks: Networks) -> list[nn.Module]:
    """The residual and attention blocks of all networks, in module order."""
    return [module for module in networks.modules() if isinstance(module, BLOCKS)]


def checkpoint_activations(networks: Networks, policy: Policy) -> list[nn.Module]:
    """Make the policy's modules forget their activations; returns these modules. Results do not change.

    selective: each residual and attention block; full: each network as a whole. Dropout is keyed, so that the second
    forward sees the first one's masks without saving any generator's state.
    """
    chosen: list[nn.Module] = []
    if policy == "selective":
        chosen = blocks(networks)
    elif policy == "full":
        chosen = [network for network in (networks.encoder, networks.decoder) if network is not None]
    for module in chosen:
        # on the instance: engines' hooks stay outside, parameters keep their names
        module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
    return chosen
