"""What the package reads from outside is read by readers that run nothing of it, read off the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for room in ("lzn_dist", "data_prep", "slurm", "launch") for path in (ROOT / room).rglob("*.py"))
# whatever runs code that it reads, or writes where what it reads says
UNSAFE = {
    "pickle": {"load", "loads", "_Unpickler"}, "marshal": {"load", "loads"}, "shelve": {"open"},
    "dill": {"load", "loads"}, "cloudpickle": {"load", "loads"}, "joblib": {"load"},
    "yaml": {"unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "load_all", "UnsafeLoader", "FullLoader",
             "Loader"},
    "os": {"system", "popen"}, "shutil": {"unpack_archive"}, "": {"eval", "exec", "__import__"},
}  # fmt: skip
METHODS = {"extractall", "extract"}  # of archives
WITH = {  # calls that are safe with an argument alone
    ("torch", "load"): ("weights_only", True), ("np", "load"): ("allow_pickle", False),
    ("numpy", "load"): ("allow_pickle", False),
}  # fmt: skip
CHECKED = {  # what may stand in one place, where the names it may use are listed
    ("runpy", "run_path"): {"lzn_dist/cli.py"},
    ("pickle", "Unpickler"): {"lzn_dist/training/checkpoint_reader.py", "lzn_dist/prepare/sources.py"},
    ("dcp", "FileSystemReader"): {"lzn_dist/training/checkpoint_reader.py"},
    ("yaml", "load"): {"lzn_dist/yaml_core.py"},
    ("io", "loadmat"): {"lzn_dist/prepare/sources.py"},
    ("hub", "download_url_to_file"): {"lzn_dist/evaluation/inception.py"},
}


def faults(source: str, place: str) -> Iterator[str]:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").rpartition(".")[2]
            names = [(module, name.name) for name in node.names]
        elif isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "?")
            names = [(owner, node.attr)]
            if node.attr in METHODS and owner != "re":
                yield f"{place}:{node.lineno}: .{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [("", node.func.id)]
        else:
            names = []
        for owner, name in names:
            if name in UNSAFE.get(owner, ()) or place not in CHECKED.get((owner, name), {place}):
                yield f"{place}:{node.lineno}: {owner}.{name}"
            if isinstance(node, ast.ImportFrom) and (owner, name) in WITH:
                yield f"{place}:{node.lineno}: {name} by itself"
        if isinstance(node, ast.Call):
            given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                needs = WITH.get((node.func.value.id, node.func.attr))
                if needs and given.get(needs[0]) is not needs[1]:
                    yield f"{place}:{node.lineno}: {node.func.value.id}.load without {needs[0]}={needs[1]}"
            if given.get("shell") or given.get("allow_pickle"):
                yield f"{place}:{node.lineno}: shell or allow_pickle"


def test_every_reader_is_one_that_runs_nothing() -> None:
    assert len(SOURCES) > 80
    found = [fault for path in SOURCES for fault in faults(path.read_text(), path.relative_to(ROOT).as_posix())]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(file)", "from pickle import loads", "torch.load(path)", "torch.load(path, weights_only=False)",
        "np.load(path)", "np.load(path, allow_pickle=True)", "yaml.unsafe_load(text)", "yaml.load(text, yaml.Loader)",
        "dcp.FileSystemReader(path)", "torch.distributed.checkpoint.filesystem.dcp.FileSystemReader(path)",
        "tar.extractall(path)", "eval(text)", "os.system(text)", "subprocess.run(text, shell=True)",
        "class A(pickle.Unpickler): pass", "from torch import load", "scipy.io.loadmat(path)",
    ],
)  # fmt: skip
def test_others_are_found(line: str) -> None:
    assert list(faults(line, "lzn_dist/elsewhere.py"))
