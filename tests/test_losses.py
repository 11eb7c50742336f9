"""Losses of four steps of every task and baseline, in float64, as they were before data types and networks became
settings: a change that is not meant to change results shows here. All of them, also on ranks: tests/soak/losses.py."""

from __future__ import annotations

import pytest
import torch

from lzn_dist.training.step import train_step
from tests.helpers.settings import BOTH_DIRECTIONS
from tests.helpers.small_run import small_config, small_samples, small_state

BEFORE = {
    "joint": ([3.5053024886045, 3.368971510989339, 3.2559991827912986, 3.5391349008945383], "joint", ["micro_batch=5"]),
    "generation": ([1.3870471722039965, 1.3011852083455102, 1.267761517397054, 1.330754122092073], "generation", []),
    "representation": (
        [2.344686926342113, 2.351172092591022, 2.2091904776108784, 2.373497045946868], "representation",
        [BOTH_DIRECTIONS, "latent.noise_scale=0.45"],
    ),
    "rectified_flow": (
        [1.3870485648596593, 1.300331992814484, 1.2686099733203655, 1.3333732575413555], "generation",
        ["objective=rectified_flow"],
    ),
    "simclr": (
        [3.153882797279916, 3.1421797773608287, 3.131330336215375, 3.1346868370743985], "representation",
        ["objective=simclr"],
    ),
    "moco": (
        [0.7287424087134907, 2.6933433243161122, 3.2038886846155923, 3.1782914853579496], "representation",
        ["objective=moco", "data.global_batch=12", "contrast.queue=24"],
    ),
    "supervised": (
        [2.3084726994852223, 2.329926979388967, 2.29049164593041, 2.269233049973826], "representation",
        ["objective=supervised"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE)
def test_losses_are_what_they_were(name: str) -> None:
    before, task, overrides = BEFORE[name]
    state = small_state(small_config("precision=float64", *overrides, task=task))
    found = [
        train_step(state, small_samples(number, dtype=torch.float64, views=2)).scalars["loss"].item()
        for number in range(4)
    ]
    assert found == pytest.approx(before, rel=1e-9)  # rounding differs from one machine to the next
