from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.helpers.slurm_cluster import Cluster, missing
from tests.helpers.slurm_run import Run


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes of a real SLURM."""
    why = missing()
    if why and os.environ.get("LZN_DIST_INSTALL_SLURM"):
        pytest.fail(f"{why}, though LZN_DIST_INSTALL_SLURM asks for it")
    if why:
        pytest.skip(why)
    found = Cluster(tmp_path_factory.mktemp("slurm")).up(nodes=3)
    yield found
    found.down()


@pytest.fixture(scope="session")
def reference(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The undisturbed run on two nodes, after the checks that can be asked for; its name is one that shells and YAML
    would cut."""
    folder = tmp_path_factory.mktemp("runs")
    profile = folder / "cores.yaml"
    profile.write_text("cpus_per_rank: 1\n")  # the job's and, since 22.05, srun's
    run = Run(cluster, folder / "reference #1")
    run.submit("--profile", str(profile), "--preflight", "--verify")
    assert run.until_ended() == "COMPLETED", run.logs()[-4000:]
    return run
