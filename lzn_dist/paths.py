"""What people write for a path: `~`, `~user` and `$HOME` at its beginning are theirs, everywhere alike."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(\{\w+\}|\w+)")


def expand_path(text: str) -> str:
    """A path with `~`, `~user`, `$HOME` or `${HOME}` at its beginning written out; URLs and all else stay as they are.

    Raises ValueError for a user who is not known here, and for other variables, which a shell would have written out.
    """
    variable = _VARIABLE.match(text)
    if variable is not None:
        if variable[1].strip("{}") != "HOME":
            raise ValueError(f"{text!r}: of variables, a path may begin with $HOME alone: write {variable[0]} out")
        text = "~" + text[variable.end() :]
        if text[1:2] not in ("", "/"):
            return os.path.expanduser("~") + text[1:]
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        raise ValueError(f"{text!r}: {text.split('/')[0]} is nobody's home here (a name that begins with ~: ./{text})")
    return expanded


def plain_name(name: object, what: str) -> str:
    """A name that came from outside (a manifest, a table), as that of something inside the folder it belongs to.

    Raises ValueError, naming `what` it is, for paths, "..", names that begin with a dot, and what no file is called.
    """
    if not isinstance(name, str) or not name or name.startswith(".") or not name.isprintable() or len(name) > 255:
        raise ValueError(f"{what} is called {name!r}, which is no name of a file")
    if "/" in name or "\\" in name:
        raise ValueError(f"{what} is called {name!r}: a path, where the name of a file inside the folder belongs")
    return name


def path_argument(text: str) -> Path:
    """A command line's path, for argparse."""
    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def folder_or_url(text: str) -> str:
    """A command line's path or URL, for argparse."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
