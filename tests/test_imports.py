"""The rooms of the house: which part of lzn_dist may import which, read off the sources."""

from __future__ import annotations

import ast
import os
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lzn_dist"
COMMANDS = {"train", "evaluate", "verify", "compare", "infer", "export", "report", "playground", "cli", "__main__"}
# files and words; they import one another
SMALL = {"paths", "json_files", "yaml_core", "terminal", "exit_status", "shipped", "machine"}
# what each room may import of the others, besides itself and SMALL
ROOMS: dict[str, set[str]] = {
    "keyed_random": set(),
    "zones": set(),
    "flow": set(),
    "models": {"keyed_random"},
    "distributed": {"zones", "keyed_random"},
    "config": set(),
    "networks": {"config"},
    "data": {"keyed_random"},
    "prepare": {"data", "keyed_random"},
    "engines": {"config", "networks", "distributed"},
    "modalities": {"config", "data", "flow", "keyed_random"},
    "objectives": {"config", "networks", "modalities", "zones", "keyed_random"},
    "exchange": {"config", "networks", "objectives", "data", "modalities", "models", "zones"},
    "training": {
        "config", "networks", "models", "data", "prepare", "distributed", "engines", "objectives", "modalities",
        "zones", "exchange",
    },
    "inference": {
        "config", "networks", "modalities", "objectives", "zones", "keyed_random", "training", "data", "exchange",
        "prepare", "distributed",
    },
    "evaluation": {
        "inference", "config", "networks", "data", "prepare", "distributed", "zones", "keyed_random", "training",
        "objectives", "modalities",
    },
    "pages": {"config", "training", "inference", "evaluation", "data"},
    "cluster": {"config", "training", "distributed", "data", "prepare"},
    "tools": {"config", "models", "data", "keyed_random", "training", "evaluation"},
}  # fmt: skip
MATHEMATICS = {
    "keyed_random": {"torch"},
    "zones": {"torch", "torchdiffeq", "xformers", "triton"},
    "flow": {"torch", "torchdiffeq"},
    "models": {"torch", "xformers", "triton", "transformers", "safetensors"},  # the latter for what others have trained
}


def module_of(path: Path) -> str:
    return ".".join(("lzn_dist", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Modules, those of this package by their own names: `from lzn_dist.zones import field` is lzn_dist.zones.field."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                found.add(whole if whole in FILES else str(node.module))
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_imports_only_what_it_may() -> None:
    seen = {room(module) for module in FILES} - {""}
    assert seen == set(ROOMS) | COMMANDS | SMALL
    for module, path in FILES.items():
        own = room(module)
        if own in COMMANDS or not own:
            continue
        allowed = ROOMS.get(own, set()) | SMALL | {own, ""}
        for name in imports(path):
            if name.split(".")[0] == "lzn_dist":
                assert room(name) in allowed, f"{module} imports {name}"


def test_there_are_no_circles() -> None:
    for graph in (
        {module: imports(path) & set(FILES) - {"lzn_dist"} for module, path in FILES.items() if module != "lzn_dist"},
        ROOMS,
    ):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(f"a circle: {' ← '.join(error.args[1])}")


@pytest.mark.parametrize("own", MATHEMATICS)
def test_the_mathematics_imports_few_libraries(own: str) -> None:
    for module, path in FILES.items():
        if room(module) == own:
            for name in {name.split(".")[0] for name in imports(path)} - {"lzn_dist"}:
                assert name in sys.stdlib_module_names or name in MATHEMATICS[own], f"{module} imports {name}"


def test_no_module_hides_another_when_the_folder_is_first_on_the_path() -> None:
    installed = {"wandb", "accelerate", "datasets", "deepspeed", "torch", "numpy", "webdataset", "submitit", "yaml"}
    for path in ROOT.iterdir():
        assert path.stem.startswith("__") or path.stem not in sys.stdlib_module_names | installed, path


@pytest.mark.parametrize("script", ["train", "evaluate", "verify"])
def test_how_threads_wait_is_set_before_torch_is_loaded(script: str) -> None:
    """A run by the file's path, as accelerate starts it, has not gone through the package yet."""
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    names = [
        name.split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    ]
    assert "torch" not in names or names.index("lzn_dist") < names.index("torch")
    assert "lzn_dist" in names
    assert os.environ["OMP_WAIT_POLICY"]
