"""Damage to any file that is kept is refused, told or mended; a little of tests/soak/fuzz_files.py."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from lzn_dist.data import storage
from tests.soak.fuzz_files import World, damaged, fuzz


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    block = storage.BLOCK
    yield World(tmp_path_factory.mktemp("damage"))
    storage.BLOCK = block


@pytest.mark.process
def test_damage_is_refused_told_or_mended(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    ends: Counter[str] = Counter()
    for kind, end, lost in fuzz(world, 132, seed=0):
        assert not lost
        ends[f"{kind}: {end}"] += 1
    # each kind was used, and noticed where it can be
    for expected in (
        "checkpoint: small files: refused", "checkpoint: tensors: refused", "run: lines: told",
        "run and job: state: told", "data set: manifest, index: refused", "data set: shards: found by check.py",
        "copies of a server's shards: as it was, or fetched again",
        "preparation that was stopped: as it was, or made anew", "statistics of real images: made anew",
        "linear probe: refused", "profile: refused",
    ):  # fmt: skip
        assert ends[expected], (expected, ends)


def test_faults_are_faults() -> None:
    chance = random.Random(0)
    content = bytes(600) + bytes(range(256)) + bytes(600)
    assert all(damaged(content, chance)[0] != content for _ in range(200))
