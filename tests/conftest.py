from __future__ import annotations

import multiprocessing.process
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from beartype import BeartypeConf
from beartype.claw import beartype_packages

# Triton decides when it is imported whether its own functions are interpreted; the tests of kernels need them so, where
# there is no GPU
if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as _patch, suppress(ImportError):
        _patch.setenv("TRITON_INTERPRET", "1")
        import_module("triton.experimental.gluon")

# What one room hands to another inside of lzn_dist is of the types that the signatures say. Not zones, flow and
# models, whose own refusals are tested.
ROOMS = ("modalities", "objectives", "distributed", "engines")
beartype_packages(tuple(f"lzn_dist.{room}" for room in ROOMS), conf=BeartypeConf(is_pep484_tower=True))

from lzn_dist.data import ShardIndex  # noqa: E402
from lzn_dist.prepare.digits import write_digits  # noqa: E402

# processes that tests start by a file's name find lzn_dist and tests.helpers
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These batches are small: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def processes_are_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What starts a process is slow, and says so."""
    if request.node.get_closest_marker("process"):
        return

    def refuse(*_: Any, **__: Any) -> NoReturn:
        pytest.fail("it starts a process: mark it pytest.mark.process, or test what it tests in this one")

    for owner, name in ((subprocess.Popen, "__init__"), (multiprocessing.process.BaseProcess, "start")):
        monkeypatch.setattr(owner, name, refuse)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' shards; not to be changed."""
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="session")
def three(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of images, labels and text; not to be changed."""
    from tests.helpers.trained import train_three

    return train_three(tmp_path_factory.mktemp("runs") / "three", digits)


@pytest.fixture(scope="session")
def exported(three: Path) -> Path:
    """The same as an exported folder, with all of its training samples' anchors; not to be changed."""
    from lzn_dist.export import main

    folder = three.with_name("exported")
    assert main([str(three), str(folder), "--anchors", "all"]) == 0
    return folder


@pytest.fixture(scope="session")
def index(digits: Path) -> ShardIndex:
    return ShardIndex.load(digits)
