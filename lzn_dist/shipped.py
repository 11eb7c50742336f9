"""What comes with the package besides its modules: configs, launch, data_prep and slurm, in a checkout or installed."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path


def shipped(folder: str) -> Path:
    """The folder: beside the package in a checkout, inside of it where it was installed from a wheel."""
    package = Path(__file__).parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def find(name: str, folder: str, kind: str = ".yaml") -> Path:
    """A file that is named by its path, or one of a shipped folder by its name (digits_joint). Raises
    FileNotFoundError, which names those that are alike."""
    path = Path(name)
    if path.is_file():
        return path
    home = shipped(folder)
    inside = home / f"{name.removesuffix(kind)}{kind}"
    if inside.is_file() and inside.resolve().is_relative_to(home.resolve()):
        return inside
    alike = get_close_matches(path.stem, [found.stem for found in home.glob(f"*{kind}")], 3, 0.5)
    raise FileNotFoundError(
        f"no file {name}, and none of that name among those of lzn_dist" + (f": {', '.join(alike)}?" if alike else "")
    )
