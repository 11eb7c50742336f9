"""Configurations: lzn_dist config --list | --show NAME [key=value ...] | --keys

--list: those that come with lzn_dist. --show: all values of one, each with where it is from. --keys: every key with its
default and a sentence.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lzn_dist.config import Config, ConfigError, layers, load_config
from lzn_dist.shipped import shipped
from lzn_dist.terminal import command
from lzn_dist.yaml_core import dump_yaml


def listing() -> Iterator[str]:
    """A line a configuration: its name and its first remark."""
    files = [path for path in sorted(shipped("configs").glob("*.yaml")) if not path.stem.endswith(("_base", "_256"))]
    width = max(len(path.stem) for path in files)
    for path in files:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        yield f"{path.stem:<{width}}  {first.removeprefix('#').strip()}"


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Two lines a key."""
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        by_name = get_origin(field.annotation) is dict
        if section is not None and not by_name and get_origin(field.annotation) is not tuple:
            yield from keys(section, f"{prefix}{name}.")
            continue
        default = "needed" if field.default is PydanticUndefined else _text(field.default)
        yield f"{prefix}{name}: {default}\n    {field.description}"
        if section is not None:
            yield from keys(section, f"{prefix}{name}.{'NAME' if by_name else 'N'}.")


def _section(kind: Any) -> type[BaseModel] | None:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next((found for part in get_args(kind) if (found := _section(part)) is not None), None)


def _text(value: Any) -> str:
    return dump_yaml({"x": list(value) if isinstance(value, tuple) else value}).strip().removeprefix("x:").strip()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted key."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, dict) and bool(value)
        found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def shown(name: str, overrides: list[str]) -> Iterator[str]:
    """A line a value: key, value and its source. Raises ConfigError."""
    config = load_config(name, overrides)
    sources: dict[str, str] = {}
    for where, values in layers(name, overrides):
        sources |= dict.fromkeys(flat(values), where)
    rows = [(key, _one_line(value), sources.get(key, "default")) for key, value in flat(config.model_dump()).items()]
    widths = [min(48, max(len(row[column]) for row in rows)) for column in range(2)]
    for key, value, source in rows:
        yield f"{key:<{widths[0]}}  {value:<{widths[1]}}  {source}"


def _one_line(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(_one_line(part) for part in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_one_line(part)}" for key, part in value.items()) + "}"
    return _text(value)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--list", action="store_true", help="the configurations that come with lzn_dist")
    chosen.add_argument("--show", metavar="NAME", help="a configuration's values and where they are from")
    chosen.add_argument("--keys", action="store_true", help="all keys, defaults and meanings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with --show")
    options = parser.parse_intermixed_args(arguments)
    try:
        lines = listing() if options.list else keys()
        if options.show:
            lines = shown(options.show, options.overrides)
        print("\n".join(lines))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
