"""Activation checkpointing: activations of the forward are dropped and computed again in the backward."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from lzn_dist.networks import Networks, blocks_of

Policy = Literal["none", "selective", "full"]


def checkpoint_activations(networks: Networks, policy: Policy) -> list[nn.Module]:
    """Make the policy's modules forget their activations; returns these modules. Results do not change.

    selective: each block, as the networks name them; full: each network that has any, as a whole, but of those that
    take tokens each block (ZeRO-3 gives the weights of a whole back when the gradients of its inputs are there, and
    whole numbers have none). Dropout is keyed, so
    that the second forward sees the first one's masks without saving any generator's state.
    """
    chosen: list[nn.Module] = []
    if policy == "selective":
        chosen = networks.blocks()
    elif policy == "full":
        for network in networks.named().values():
            whole = [network] if blocks_of(network) else []
            chosen += blocks_of(network) if getattr(network, "takes_tokens", False) else whole
    for module in chosen:
        # on the instance: engines' hooks stay outside, parameters keep their names
        module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
    return chosen
