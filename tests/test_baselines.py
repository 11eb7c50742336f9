"""The baselines' losses against their equations written out, and what they remember from step to step."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from lzn_dist.config import Config, ConfigError
from lzn_dist.objectives import View, build_networks
from lzn_dist.objectives.moco import MoCo
from lzn_dist.training.checkpoint import CheckpointError, CheckpointWriter, find_checkpoint, load_weights, resume_state
from lzn_dist.training.step import TrainState, train_step
from tests.helpers.small_run import small_config, small_samples, small_state

MOCO = ["objective=moco", "data.global_batch=12", "contrast.queue=24", "contrast.momentum=0.9"]


def baseline(*overrides: str, task: str = "representation") -> Config:
    return small_config("precision=float64", *overrides, task=task)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a @ b) / (a @ a).sqrt() / (b @ b).sqrt())


def test_simclr_is_equation_1_over_all_pairs() -> None:
    state = small_state(baseline("objective=simclr", "contrast.temperature=0.3"))
    samples = small_samples(count=7, dtype=torch.float64, views=2)
    loss, parts = state.objective(state.engine.networks, samples)
    with torch.no_grad():
        z = [
            row
            for view in range(2)
            for row in state.objective.encode(state.engine.networks, samples, View("image", view))
        ]
    total, found = 0.0, 0
    for i in range(14):
        j = (i + 7) % 14
        weights = {k: cosine(z[i], z[k]) / 0.3 for k in range(14) if k != i}
        total -= weights[j] - torch.tensor(list(weights.values())).logsumexp(0).item()
        found += max(weights, key=lambda k: weights[k]) == j
    assert loss.item() == pytest.approx(total / 14, rel=1e-6)
    assert parts["partner_found"].item() == pytest.approx(found / 14)


def moco(state: TrainState) -> MoCo:
    assert isinstance(state.objective, MoCo)
    return state.objective


def test_moco_is_algorithm_1() -> None:
    """Three steps by hand: the loss from keys of the momentum encoder and the queue, what enters it and where."""
    state = small_state(baseline(*MOCO, "contrast.temperature=0.2"))
    objective, networks = moco(state), state.engine.networks
    encoder = networks.find("image", "encoder")
    assert encoder is not None
    queue = objective.queue.clone()
    assert torch.allclose(queue.norm(dim=1), torch.ones(24, dtype=torch.float64))
    mirror = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    for number in range(3):
        samples = small_samples(number, dtype=torch.float64, views=2)
        with torch.no_grad():
            queries = objective.encode(networks, samples, View("image"))
            keys = objective.key_encoder(
                samples.view(View("image", 1)), key=objective._keys("dropout/encoder", samples, 1)
            )
        expected = 0.0
        for q, k in zip(queries, keys, strict=True):
            logits = torch.tensor([cosine(q, k), *(cosine(q, old) for old in queue)], dtype=torch.float64) / 0.2
            expected -= (logits[0] - logits.logsumexp(0)).item() / 12
        result = train_step(state, samples)
        assert result.scalars["loss"].item() == pytest.approx(expected, rel=1e-9)
        queue[12 * (number % 2) : 12 * (number % 2) + 12] = keys / keys.norm(dim=1, keepdim=True)
        assert torch.allclose(objective.queue, queue, atol=1e-12)
        for name, p in encoder.named_parameters():
            mirror[name] = 0.9 * mirror[name] + 0.1 * p.detach()
            assert torch.allclose(dict(objective.key_encoder.named_parameters())[name], mirror[name], atol=1e-12)


def test_a_skipped_step_leaves_moco_as_it_was() -> None:
    state = small_state(baseline(*MOCO))
    train_step(state, small_samples(0, dtype=torch.float64, views=2))
    before = {name: value.clone() for name, value in moco(state).state().items()}
    poisoned = small_samples(1, dtype=torch.float64, views=2)
    poisoned.view(View("image"))[3, 0, 2, 2] = float("nan")
    assert not train_step(state, poisoned).applied
    assert all(torch.equal(value, before[name]) for name, value in moco(state).state().items())


def test_moco_resumes_bit_by_bit(tmp_path: Path) -> None:
    config = small_config(*MOCO, task="representation")

    def step(state: TrainState) -> torch.Tensor:
        return train_step(state, small_samples(state.counters.batch, views=2)).scalars["loss"]

    whole = small_state(config)
    for _ in range(3):
        step(whole)
    saver = CheckpointWriter(tmp_path / "checkpoints", config, 1, nullcontext)
    saver.save(whole)
    saver.close()
    parts = small_state(config)
    load_weights(parts.engine.networks, find_checkpoint(tmp_path))
    resume_state(parts, find_checkpoint(tmp_path))
    assert [step(parts) for _ in range(3)] == [step(whole) for _ in range(3)]
    other = small_state(small_config(*MOCO, "contrast.queue=36", task="representation"))
    with pytest.raises(CheckpointError, match=r"holds no objective\.queue of \d+ elements"):
        resume_state(other, find_checkpoint(tmp_path))


def test_supervised_is_the_cross_entropy_of_logits() -> None:
    for task in ("representation", "joint"):  # a ResNet, an NCSN++
        state = small_state(baseline("objective=supervised", "data.num_classes=7", task=task))
        samples = small_samples(count=6, dtype=torch.float64, views=2)
        logits = state.objective.encode(state.engine.networks, samples, View("image")).detach()
        assert logits.shape == (6, 7)
        loss, _ = state.objective(state.engine.networks, samples)
        expected = -logits.log_softmax(1)[torch.arange(6), samples.labels].mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_rectified_flow_has_no_latents_and_takes_labels_where_asked() -> None:
    plain = small_state(baseline("objective=rectified_flow", task="generation")).engine.networks
    config = baseline("objective=rectified_flow", "decode=[{class_conditional: true}]", task="generation")
    labelled = small_state(config).engine.networks
    lzn = small_state(baseline(task="generation")).engine.networks
    assert list(plain.named()) == list(labelled.named()) == ["image.decoder"]
    sizes = [net["image"]["decoder"].all_modules[0].weight.shape[1] for net in (plain, labelled, lzn)]  # type: ignore[index]
    assert sizes == [8, 18, 16]  # time alone; with ten classes; with latents of 8 dimensions


@pytest.mark.parametrize(
    "overrides,task,message",
    [
        (["objective=rectified_flow"], "representation", "rectified_flow needs what is decoded"),
        (["objective=simclr", "data.views=none"], "representation", "two equal views teach nothing"),
        (["decode=[]"], "generation", "has nothing to learn"),
        (["alignment.pairs=[{latents: image.1, anchors: image}]"], "representation", "in its own zones"),
        (
            ["alignment.pairs=[{latents: image.1, anchors: image.3}]"],
            "representation",
            "there is no image.3, but image.1 to",
        ),
        (["alignment.pairs=[{latents: image.0, anchors: image.1}]"], "representation", "'image.0' is no view"),
        (["alignment.pairs=[{latents: image, anchors: sound}]"], "representation", "no data type 'sound'"),
        (["objective=moco", "contrast.queue=1000"], "representation", "no multiple of data.global_batch=256"),
        (["objective=moco", "anchors=ring"], "representation", "anchors=ring is for objective=lzn"),
        (["objective=supervised", "data.num_classes=0"], "representation", "set data.num_classes"),
        (["objective=simclear"], "representation", "objective"),
    ],
)
def test_impossible_objectives_are_refused(overrides: list[str], task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_networks(small_config(*overrides, task=task))
