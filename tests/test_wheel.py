"""What `pip install` brings, tried in an empty folder: everything that a checkout has, by one command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.launching import SMALL
from tests.helpers.small_run import ROOT

Shell = Callable[..., str]


def test_every_room_is_in_the_wheel() -> None:
    """setuptools takes a list; a folder that is not in it would be missing where it was installed."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "lzn_dist").rglob("*.py")}
    assert rooms <= set(listed)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Runs `lzn_dist` of an environment that has the wheel and this environment's packages."""
    folder = tmp_path_factory.mktemp("wheel")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # which leads to the checkout
    source = folder / "source"
    source.mkdir()
    for name in ("lzn_dist", "configs", "launch", "data_prep", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    venv.create(folder / "env", with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "env")}))
    (wheel,) = folder.glob("*.whl")
    python = folder / "env" / "bin" / "python"
    pip += ["--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True, capture_output=True, env=environment)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty = folder / "an empty folder #1"
    empty.mkdir()

    def shell(*words: str, status: int = 0) -> str:
        done = subprocess.run(
            [str(python.with_name("lzn_dist")), *words], cwd=empty, env=environment, timeout=300, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == status, done.stdout[-3000:]
        return done.stdout

    return shell


@pytest.mark.process
def test_an_installed_wheel_prepares_trains_and_tells(installed: Shell) -> None:
    assert "digits_joint " in installed("config", "--list")
    sources = installed("config", "--show", "digits_joint", "seed=3")
    assert "env/lib" in sources and any(line.split() == ["seed", "3", "override"] for line in sources.splitlines())
    installed("prepare", "digits", "--output", "digits")
    settings = [*SMALL, "data.shards=digits", "data.embedded=none", "output_dir=run", "max_steps=2", "cpu_threads=1"]
    installed("train", "digits_joint", "--launch", "zero2", "--processes", "2", *settings)
    status = installed("status", "run")
    assert "finished" in status
    script = installed("submit", "digits_joint", *settings, "output_dir=other", "--dry-run")
    assert script.startswith("#!/bin/bash") and "--nodes=1" in script
    assert "of lzn_dist: digits_joint, " in installed("train", "digits_jiont", status=2)
    assert "error: --launch zero9: " in installed("train", "digits_joint", "--launch", "zero9", status=2)
    assert "no data set 'imagnet'" in installed("prepare", "imagnet", status=2)
