"""YAML 1.2's core schema by PyYAML, which reads 1.1: there `010` is 8, `1e-4` a string and `yes` a boolean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

_PATTERNS = {  # YAML 1.2.2, 10.3.2: what a plain scalar is; whatever matches none is text
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[Any] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _integer(loader: _Loader, node: Any) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


for _tag, (_pattern, _first) in _PATTERNS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), ["" if c == "\0" else c for c in _first]
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


class _Dumper(yaml.SafeDumper):
    """Text that either version would take for something else is quoted, so that every reader reads it as text."""


def _text(dumper: _Dumper, value: str) -> Any:
    special = any(re.fullmatch(pattern, value) for pattern, _ in _PATTERNS.values())
    plain = not special and value.isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def parse_yaml(text: str | bytes) -> Any:
    """The value of a document; bytes in UTF-8 or, with their mark, UTF-16. Raises ValueError, one line."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split()) or "too deep") from error


def read_yaml(path: Path) -> Any:
    """As `parse_yaml`, of a file. Raises OSError and ValueError, which names the file."""
    try:
        return parse_yaml(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from error


def dump_yaml(value: Any) -> str:
    """A document in the order of its keys that `parse_yaml` reads back to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
