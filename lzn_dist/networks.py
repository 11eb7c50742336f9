"""The trainable networks of a run, by data type and role, made from the classes that its configuration names."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model
from torch import nn

from lzn_dist.config import ConfigError, NetworkConfig

SHORT = {  # names of our own classes, by role
    "ncsnpp": {"encoder": "lzn_dist.models:ImageEncoder", "decoder": "lzn_dist.models:ImageDecoder"},
    "resnet": {"encoder": "lzn_dist.models:ResNetEncoder"},
    "label_anchors": {"encoder": "lzn_dist.models:LabelAnchors"},
    "transformer": {"encoder": "lzn_dist.models:TextEncoder", "decoder": "lzn_dist.models:TextDecoder"},
    "pretrained": {"encoder": "lzn_dist.models:PretrainedTextEncoder"},
    "static": {"encoder": "lzn_dist.models:StaticTextEncoder"},
    "logit_scale": {"encoder": "lzn_dist.models:LogitScale"},
}
_trusted = {"lzn_dist"}


def trust(packages: Iterable[str]) -> None:
    """From now on classes of these packages may be named by configurations, which may come from others: importing a
    package runs its code."""
    _trusted.update(packages)


class Networks(nn.ModuleDict):
    """networks[modality][role], role being encoder or decoder: one module for all engines. Its parameters' names begin
    with modality.role."""

    def __init__(self, networks: Mapping[str, Mapping[str, nn.Module]]) -> None:
        super().__init__({modality: nn.ModuleDict(roles) for modality, roles in networks.items()})

    def find(self, modality: str, role: str) -> nn.Module | None:
        """None where there is none."""
        return self[modality][role] if modality in self and role in self[modality] else None  # type: ignore[index, operator]

    def named(self) -> dict[str, nn.Module]:
        """By modality.role."""
        return {
            f"{modality}.{role}": network
            for modality, roles in self.items()
            for role, network in roles.items()  # type: ignore[operator]
        }

    def blocks(self) -> list[nn.Module]:
        """The blocks of all networks: what may not be split when they are sharded or recomputed."""
        return [block for network in self.named().values() for block in blocks_of(network)]


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """What the network itself names by its method `blocks`, else all of it."""
    named = getattr(network, "blocks", None)
    return list(named()) if callable(named) and not isinstance(named, nn.Module) else [network]


def network_class(target: str, role: str) -> type[nn.Module]:
    """The class that a target names. Raises ConfigError: for a package that nobody has named as trusted, before it is
    imported; for what is not there or no nn.Module."""
    if target in SHORT:
        if role not in SHORT[target]:
            fitting = ", ".join(name for name, roles in SHORT.items() if role in roles)
            raise ConfigError(f"target {target} is no {role}; these are: {fitting}, or package.module:Class")
        target = SHORT[target][role]
    module, colon, name = target.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), name]):
        raise ConfigError(f"target {target!r} is neither of {', '.join(SHORT)} nor package.module:Class")
    package = module.split(".")[0]
    if package not in _trusted:
        raise ConfigError(
            f"target {target}: its package runs as code of yours, and a configuration may come from others: say "
            f"--trust {package} (or load(..., trust=[{package!r}])) if you trust it"
        )
    if os.getcwd() not in sys.path and package != "lzn_dist":
        sys.path.append(os.getcwd())  # a script's own folder is there instead, where it was started as one
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"target {target} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"target {target} is no class of networks (a subclass of torch.nn.Module)")
    return found


def make_network(config: NetworkConfig, role: str, given: Mapping[str, Any], where: str) -> nn.Module:
    """A fresh network; the initial weights come from torch's global generator, which the caller seeds.

    given: what follows from the data and the run (image_size, latent_dim, …): the class gets of it what it takes.
    where: the key of the configuration. Raises ConfigError, naming the argument, for one that the class does not take,
    of another type, or missing; and for sizes that do not fit together.
    """
    kind = network_class(config.target, role)
    wanted = {
        name: parameter
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    own = {name: value for name, value in given.items() if name in wanted}
    free = [name for name in wanted if name not in own]
    for name in config.arguments:
        if name in own:
            raise ConfigError(f"{where}.arguments.{name} follows from the data and the run ({own[name]}): leave it out")
        if name not in free:
            raise ConfigError(f"{where}: {config.target} takes no {name}; it takes {', '.join(free)}")
    arguments = _checked(kind, {name: wanted[name] for name in free}, config, where)
    try:
        return kind(**own, **arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}.arguments: {error}") from error


def constructed_with(kind: type[nn.Module], given: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What `make_network` calls a class with, for who makes it anew elsewhere."""
    return {name: value for name, value in given.items() if name in inspect.signature(kind).parameters} | dict(
        arguments
    )


def _checked(
    kind: type[nn.Module], wanted: Mapping[str, inspect.Parameter], config: NetworkConfig, where: str
) -> dict[str, Any]:
    """The arguments, of the types that the class says they have."""
    try:
        hints = get_type_hints(kind.__init__)
    except (NameError, TypeError):  # of imports that the module makes for type checkers alone
        hints = {}
    fields: dict[str, Any] = {
        name: (hints.get(name, Any), ... if parameter.default is inspect.Parameter.empty else parameter.default)
        for name, parameter in wanted.items()
    }
    model = create_model("Arguments", __config__=ConfigDict(arbitrary_types_allowed=True, strict=True), **fields)
    try:
        found = model.model_validate(config.arguments)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        what = f"{config.target} needs it" if first["type"] == "missing" else f"{first['msg']} (got {first['input']!r})"
        raise ConfigError(f"{where}.arguments.{name}: {what}") from None
    return {name: getattr(found, name) for name in config.arguments}
