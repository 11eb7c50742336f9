"""Averaged weights: s ← s + (1 − d_n)(θ − s), d_n = min(d, (1 + n)/(10 + n)), n = 1 at the first update."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of a module's trainable parameters, by name, in float32 at least.

    The parameters' names and shapes are fixed when it is made. Where another object holds the weights (a sharded
    engine), a mapping from names to tensors does in place of the module.
    """

    def __init__(self, source: nn.Module | Mapping[str, Tensor], decay: float) -> None:
        """Starts as a copy of the parameters. Raises ValueError for a decay outside [0, 1)."""
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: a number in [0, 1) is needed, not {decay}")
        self.decay = decay
        self.num_updates = 0
        # at least float32: an average whose steps are a millionth of the difference is lost in bfloat16
        self.shadow: dict[str, Tensor] = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in _trainable(source).items()
        }

    def _matching(self, source: nn.Module | Mapping[str, Tensor]) -> list[Tensor]:
        """The source's tensors in the shadow's order. Raises ValueError where one is missing or of another shape."""
        tensors = dict(source.named_parameters()) if isinstance(source, nn.Module) else source
        for name, shadow in self.shadow.items():
            if name not in tensors:
                raise ValueError(f"source: parameter {name} of the average is missing")
            if tensors[name].shape != shadow.shape:
                raise ValueError(
                    f"source: {name} has shape {list(tensors[name].shape)}, its average {list(shadow.shape)}"
                )
        return [tensors[name].detach() for name in self.shadow]

    @torch.no_grad()
    def update(self, source: nn.Module | Mapping[str, Tensor], frozen: Container[str] = ()) -> None:
        """One update, after an optimiser step; frozen averages stay as they are. Nothing waits for the device."""
        parameters = dict(zip(self.shadow, self._matching(source), strict=True))
        moving = {name: shadow for name, shadow in self.shadow.items() if name not in frozen}
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        if moving:
            ends = [parameters[name].to(shadow.device, shadow.dtype) for name, shadow in moving.items()]
            torch._foreach_lerp_(list(moving.values()), ends, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, target: nn.Module | Mapping[str, Tensor]) -> None:
        """Write the averages into the module's parameters, in their type and place."""
        for parameter, shadow in zip(self._matching(target), self.shadow.values(), strict=True):
            parameter.copy_(shadow)

    @contextmanager
    def applied(self, module: nn.Module | Mapping[str, Tensor]) -> Iterator[None]:
        """Within the context the module has the averaged weights; afterwards its own again, bit by bit."""
        parameters = self._matching(module)
        saved = [parameter.clone() for parameter in parameters]
        try:
            self.copy_to(module)
            yield
        finally:
            with torch.no_grad():
                for parameter, own in zip(parameters, saved, strict=True):
                    parameter.copy_(own)

    def state_dict(self) -> dict[str, Any]:
        """decay, num_updates and the shadow: its own tensors, not copies."""
        return {"decay": self.decay, "num_updates": self.num_updates, "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state_dict, onto this average's devices.

        Raises ValueError, changing nothing, where names or shapes differ.
        """
        shadow: Mapping[str, Tensor] = state["shadow"]
        unknown = sorted(set(shadow) - set(self.shadow))
        if unknown:
            raise ValueError(f"state: {len(unknown)} averages of unknown parameters, among them {unknown[0]}")
        for own, loaded in zip(self.shadow.values(), self._matching(shadow), strict=True):
            own.copy_(loaded)
        self.decay = float(state["decay"])
        self.num_updates = int(state["num_updates"])


def _trainable(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(source, nn.Module):
        return {name: parameter for name, parameter in source.named_parameters() if parameter.requires_grad}
    return dict(source)
