"""The rooms of the house: which part of lzn_dist may import which, read off the sources."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lzn_dist"
ENTRIES = {"train", "evaluate", "verify"}
ALLOWED = {
    "keyed_random": {"torch"},
    "zones": {"torch", "torchdiffeq", "xformers", "triton", "lzn_dist.zones"},
    "flow": {"torch", "torchdiffeq", "lzn_dist.flow"},
    "models": {"torch", "xformers", "lzn_dist.models", "lzn_dist.keyed_random"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_the_mathematics_imports_only_what_it_may(room: str) -> None:
    files = sorted((ROOT / room).glob("*.py")) if (ROOT / room).is_dir() else [ROOT / f"{room}.py"]
    assert files
    for file in files:
        for name in imports(file):
            standard = name.split(".")[0] in sys.stdlib_module_names
            inside = any(name == allowed or name.startswith(allowed + ".") for allowed in ALLOWED[room])
            assert standard or inside, f"{file.relative_to(ROOT)} imports {name}"


def test_nothing_imports_an_entry_point() -> None:
    for file in ROOT.rglob("*.py"):
        if file.stem not in ENTRIES or file.parent != ROOT:
            assert not imports(file) & {f"lzn_dist.{entry}" for entry in ENTRIES}, file


def test_no_module_hides_another_when_the_folder_is_first_on_the_path() -> None:
    installed = {"wandb", "accelerate", "datasets", "deepspeed", "torch", "numpy", "webdataset", "submitit", "yaml"}
    for path in ROOT.iterdir():
        assert path.stem.startswith("__") or path.stem not in sys.stdlib_module_names | installed, path
