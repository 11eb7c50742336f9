"""What people write for a path or a URL: `~`, `~user` and `$HOME` at a path's beginning are theirs, everywhere alike;
a URL holds no secrets, since it is written down and passed on with every run."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

_VARIABLE = re.compile(r"\$(\{\w+\}|\w+)")
_URL = re.compile(r"(?<=://)[^\s'\"<>]+")


def expand_path(text: str) -> str:
    """A path with `~`, `~user`, `$HOME` or `${HOME}` at its beginning written out; URLs and all else stay as they are.

    Raises ValueError for a user who is not known here, for other variables, which a shell would have written out, and
    for URLs with a password, a query or a fragment, without saying them.
    """
    if "://" in text:
        check_url(text)
        return text
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


def check_url(text: str) -> None:
    """A URL of shards holds no secrets and names a folder. A password would be copied into config.yaml, checkpoints and
    job folders; a query, mostly a signature, is one file's, where shards are many.

    Raises ValueError, without saying them.
    """
    for url in text.split("::"):  # fsspec's chains: simplecache::https://...
        try:
            parts = urlsplit(url)
            login = parts.password is not None or (parts.username is not None and parts.scheme in ("http", "https"))
            _ = parts.port  # what stands behind an @ or a colon too many
        except ValueError:
            raise ValueError(f"{without_secrets(text)} is not a URL of the form https://host/folder") from None
        if login:
            raise ValueError(
                f"{without_secrets(text)} has a user or password in it, which would be written into every run: put "
                f"them into ~/.netrc (machine {parts.hostname} login USER password PASSWORD; mode 0600), or where the "
                "library for such URLs looks (fsspec's configuration, the cloud's own)"
            )
        if parts.query or parts.fragment:
            raise ValueError(
                f"{without_secrets(text)} has a query (? or #) in it, which a folder of shards cannot have: a signed "
                "one is for a single file, and would be written into every run. Give the URL up to there, and the "
                "credentials where the library for such URLs looks (~/.netrc, fsspec's configuration, the cloud's own)"
            )


def without_secrets(text: str) -> str:
    """A message with the users, passwords, queries and fragments of its URLs cut out: servers and libraries say whole
    URLs, also those of redirections to signed ones."""

    def bare(match: re.Match[str]) -> str:
        if "@" in match[0]:
            return "…"
        where, mark, _ = re.split(r"([?#]|$)", match[0], maxsplit=1)
        return where + (f"{mark}…" if mark else "")

    return _URL.sub(bare, text)


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
