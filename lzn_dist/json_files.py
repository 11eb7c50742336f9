"""JSON files: written whole or not at all, and checked to be what they should before anything of them is used."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import PlainValidator, TypeAdapter, ValidationError

_Kind = TypeVar("_Kind")


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def _is_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("should be text")
    return value


# pydantic's own refuses the surrogates by which Python writes down names that are no UTF-8
Text = Annotated[str, PlainValidator(_is_text)]


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parse_json(content: bytes, kind: type[_Kind], name: object) -> _Kind:
    """JSON that says what a dataclass asks for, and perhaps more. Raises ValueError: one line that begins with `name`
    and says where it is damaged, or not of that kind."""
    try:
        found: _Kind = _adapter(cast(Hashable, kind)).validate_python(json.loads(content))
        return found
    except ValidationError as error:
        first = error.errors()[0]
        why = ": ".join([".".join(map(str, first["loc"]))[:200], first["msg"]]).removeprefix(": ")
    except (ValueError, RecursionError) as error:
        why = str(error)
    raise ValueError(f"{name} is damaged, or of another version ({why})")


def read_json(path: Path, kind: type[_Kind]) -> _Kind:
    """As `parse_json`, of a file. Raises OSError and ValueError."""
    return parse_json(path.read_bytes(), kind, path)
