"""One step: gradient caching, skipping, stopping, and what stays as it was."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from lzn_dist.config import ConfigError
from lzn_dist.engines.activation_checkpointing import checkpoint_activations
from lzn_dist.engines.build import build_engine
from lzn_dist.engines.launch import Launch
from lzn_dist.inference import LZN
from lzn_dist.models import ResNetEncoder
from lzn_dist.networks import Networks
from lzn_dist.objectives import build_networks
from lzn_dist.objectives.base import View
from lzn_dist.training.flops import training_flops_per_image
from lzn_dist.training.grad_cache import cached_backward, check_batch_independent
from lzn_dist.training.optimizer import make_optimizer
from lzn_dist.training.step import TrainState, compute_gradients, train_step
from tests.helpers.settings import RESNET, encoder_with
from tests.helpers.small_run import small_config, small_samples, small_state


def gradients(state: TrainState, task: str) -> dict[str, torch.Tensor]:
    views = 2 if task == "representation" else 1
    compute_gradients(state, small_samples(dtype=torch.float64, views=views))
    return state.engine.gradients()


OBJECTIVES = [
    ("generation", "lzn"), ("representation", "lzn"), ("joint", "lzn"), ("generation", "rectified_flow"),
    ("representation", "simclr"), ("representation", "moco"), ("representation", "supervised"),
]  # fmt: skip


@pytest.mark.parametrize("task,objective", OBJECTIVES)
@pytest.mark.parametrize("micro_batch", [1, 5, 12, 100])
def test_caching_gives_the_gradients_of_one_backward(task: str, objective: str, micro_batch: int) -> None:
    plain, cached = (
        gradients(small_state(small_config("precision=float64", f"objective={objective}", *more, task=task)), task)
        for more in ([], [f"micro_batch={micro_batch}"])
    )
    total = torch.stack([value.norm() for value in plain.values()]).norm()
    assert total > 1e-3
    for name, value in plain.items():
        assert (cached[name] - value).norm() <= 1e-11 * total, name


@pytest.mark.parametrize("policy,most", [("selective", 0.7), ("full", 0.1)])
def test_activation_checkpointing_forgets_and_changes_nothing(policy: str, most: float) -> None:
    """most: what may stay of the saved numbers; read-outs, which are no blocks, weigh much in so small networks."""
    plain = gradients(small_state(small_config("precision=float64")), "joint")
    state = small_state(small_config("precision=float64"))
    chosen = checkpoint_activations(state.engine.networks, policy)  # type: ignore[arg-type]
    assert len(chosen) == (2 if policy == "full" else len(state.engine.networks.blocks()))
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(0 if isinstance(tensor, nn.Parameter) else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        state.objective(state.engine.networks, small_samples(dtype=torch.float64))
        few = sum(kept)
        kept.clear()
        fresh = small_state(small_config("precision=float64"))
        fresh.objective(fresh.engine.networks, small_samples(dtype=torch.float64))
    assert few < most * sum(kept)
    found = gradients(state, "joint")
    assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_batch_statistics_are_refused_for_caching() -> None:
    normalised = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ConfigError, match=r"image\.encoder\.1 \(BatchNorm2d\)"):
        check_batch_independent(Networks({"image": {"encoder": normalised}}))
    check_batch_independent(build_networks(small_config()))


@pytest.mark.parametrize("micro_batch", [0, 5])
def test_a_step_that_is_not_finite_changes_nothing_but_the_cursor(micro_batch: int) -> None:
    state = small_state(small_config(f"micro_batch={micro_batch}"))
    train_step(state, small_samples(0))
    before = {name: piece.data.clone() for name, piece in state.engine.weights().items()}
    averages = {name: value.clone() for name, value in state.ema.shadow.items()}
    poisoned = small_samples(1)
    poisoned.inputs["image"][0][3, 0, 2, 2] = float("nan")
    result = train_step(state, poisoned)
    assert not result.applied and not result.scalars["loss"].isfinite()
    assert (state.counters.step, state.counters.batch, state.counters.nonfinite) == (1, 2, 1)
    assert all(torch.equal(piece.data, before[name]) for name, piece in state.engine.weights().items())
    assert all(torch.equal(value, averages[name]) for name, value in state.ema.shadow.items())
    assert state.ema.num_updates == 1
    assert train_step(state, small_samples(2)).applied
    assert (state.counters.step, state.counters.batch, state.counters.nonfinite) == (2, 3, 0)


def test_a_loss_that_is_not_finite_poisons_finite_gradients() -> None:
    """A constant term hides from gradients; the step must be skipped all the same."""
    state = small_state(small_config())
    endless = torch.tensor(float("inf"))
    state.engine.backward(lambda networks: (state.objective(networks, small_samples())[0] + endless, None))
    assert not state.engine.step(1.0).applied


def test_a_stopped_group_stays_while_others_move() -> None:
    state = small_state(small_config("modalities.image.decoder.stop=2"))
    for batch in range(2):
        train_step(state, small_samples(batch))
    before = {name: piece.data.clone() for name, piece in state.engine.weights().items()}
    averages = {name: value.clone() for name, value in state.ema.shadow.items()}
    result = train_step(state, small_samples(2))
    for name, piece in state.engine.weights().items():
        stopped = name.startswith("image.decoder.")
        assert torch.equal(piece.data, before[name]) == stopped or not piece.data.any(), name
        assert torch.equal(state.ema.shadow[name], averages[name]) == stopped or not piece.data.any(), name
    # the frozen network has no part in the norm that is clipped
    again = small_state(small_config())
    compute_gradients(again, small_samples(0))
    whole = again.engine.step(1.0).norm
    frozen = small_state(small_config("modalities.image.decoder.stop=1"))
    frozen.counters.step = 1
    assert train_step(frozen, small_samples(0)).scalars["grad_norm"] < whole
    assert result.applied


def test_the_caching_leaves_no_graph_of_the_whole_batch() -> None:
    """What is alive between the parts of a cached step does not grow with the encoder's activations."""
    state = small_state(small_config(task="representation"))
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.shape[0] if tensor.ndim == 4 and tensor.shape[-1] > 3 else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cached_backward(state.engine, state.objective, small_samples(views=2), 4, state.watch)
    assert max(sizes) == 4


def test_another_engine_than_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    networks = build_networks(config)
    monkeypatch.setattr("lzn_dist.engines.fsdp.FSDPEngine._spread", lambda self, module: module)
    with pytest.raises(ConfigError, match="asks for engine fsdp, but single"):
        build_engine(config, Launch("fsdp", 1), networks, lambda: make_optimizer(networks, config), Accelerator())


def test_flops_of_resnet50_are_the_published_ones() -> None:
    """He et al. 2016, table 1: 3.8e9 multiply-adds at 224 pixels (4.1e9 with the shortcuts' projections)."""
    config = small_config(
        RESNET, *encoder_with(channels=64, blocks=[3, 4, 6, 3], stem="imagenet"),
        "data.embedded=none", "data.image_size=224", "data.image_channels=3", "latent.dim=256", task="representation",
    )  # fmt: skip
    networks = Networks({"image": {"encoder": ResNetEncoder()}})
    per_forward = training_flops_per_image(networks, config) / 3 / 2  # two views
    assert per_forward / 2 == pytest.approx(4.1e9, rel=0.02)
    # MoCo: the queries' forward and backward, the keys' forward alone
    moco = config.model_copy(update={"objective": "moco"})
    assert training_flops_per_image(networks, moco) == pytest.approx(4 * per_forward)


@pytest.mark.parametrize("objective", ["lzn", "rectified_flow"])
def test_a_data_type_that_is_decoded_twice_has_two_losses(objective: str) -> None:
    """The same decoding twice, of weights 0.3 and 0.7, is once the whole: losses and gradients, cached too."""
    twice = "decode=[{weight: 0.3}, {weight: 0.7}]"
    found = []
    for more in ([], [twice], [twice, "micro_batch=5"]):
        state = small_state(small_config("precision=float64", f"objective={objective}", *more, task="generation"))
        loss, parts = compute_gradients(state, small_samples(dtype=torch.float64))
        assert set(parts) == ({"loss_flow", "loss_flow_2"} if more else {"loss_flow"})
        found.append((loss, state.engine.gradients()))
    (whole, gradients), *others = found
    for loss, ours in others:
        assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
        assert all((ours[name] - value).norm() <= 1e-12 + 1e-9 * value.norm() for name, value in gradients.items())


def test_latent_dropout_draws_a_share_of_the_latents_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config("decode=[{latent_dropout: 0.3}]", task="generation")
    state, given = small_state(config), []
    objective = state.objective
    kind = type(objective.modalities["image"])
    monkeypatch.setattr(kind, "decoding_loss", lambda self, *of: given.append(of[2]) or of[2].sum())
    for samples in (small_samples(0, 3000), small_samples(0, 3000).part(slice(7, 20)), small_samples(1, 3000)):
        latents = torch.zeros(len(samples), 8, requires_grad=True)
        objective.decode(state.engine.networks, samples, objective.needs.decodes[0], latents).backward()
        kept = given[-1].eq(0).all(1)
        assert torch.equal(kept[:, None].expand(-1, 8).float(), latents.grad)
    share = given[0].ne(0).all(1).float().mean().item()
    drawn = given[0][given[0].ne(0).all(1)]
    assert share == pytest.approx(0.3, abs=0.03)
    assert drawn.mean().item() == pytest.approx(0, abs=0.05) and drawn.std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(given[0][7:20], given[1])  # of the sample, wherever it is
    assert not torch.equal(given[0], given[2])


def test_samples_by_class_from_latents_that_know_no_label_are_warned_of() -> None:
    by_class = "decode=[{class_conditional: true}]"
    for task, more, warned in (
        ("generation", [by_class], True), ("generation", [], False), ("joint", [], False),
        ("joint", ["alignment.pairs=[]"], True), ("generation", ["objective=rectified_flow", by_class], False),
        ("generation", ["decode=[{class_conditional: true, latent_dropout: 0.5}]"], False),
        ("joint", ["alignment.pairs=[]", "decode=[{latents: label, class_conditional: true}]"], False),
    ):  # fmt: skip
        advice = small_state(small_config(*more, task=task)).objective.advice()
        assert [("latent_dropout" in line, "alignment.pairs" in line) for line in advice] == [(True, True)] * warned


@pytest.mark.parametrize("task", ["representation", "joint"])
def test_anchors_of_a_length(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the encoders' outputs had it, in training and in use."""
    views = 2 if task == "representation" else 1
    lengths = ["modalities.image.anchor_norm=3", "modalities.label.anchor_norm=1.5"]
    config = small_config("precision=float64", *(lengths if task == "joint" else lengths[:1]), task=task)
    state, samples = small_state(config), small_samples(dtype=torch.float64, views=views)
    objective, networks = state.objective, state.engine.networks
    raw = {view: objective.encode(networks, samples, view) for view in objective.needs.encodes}
    given: list[tuple[dict[View, torch.Tensor], dict[str, torch.Tensor]]] = []
    placed = type(objective)._placed
    monkeypatch.setattr(type(objective), "_placed", lambda *of: given.append(placed(*of)) or given[-1])
    objective.relate(raw, objective.tables(networks, samples), samples)
    ((found, tables),) = given
    for view, plain in raw.items():
        torch.testing.assert_close(found[view].norm(dim=1), torch.full((12,), 3.0, dtype=torch.float64))
        assert (plain.norm(dim=1) - 3).abs().min() > 0.1
        torch.testing.assert_close(found[view] / 3, plain / plain.norm(dim=1, keepdim=True))
    model = LZN(networks, config)
    images = samples.view(objective.needs.encodes[0])
    torch.testing.assert_close(model.anchors(images).norm(dim=1), torch.full((12,), 3.0, dtype=torch.float64))
    if task == "joint":
        torch.testing.assert_close(model.label_anchors(), tables["label"])
        torch.testing.assert_close(model.label_anchors().norm(dim=1), torch.full((10,), 1.5, dtype=torch.float64))
    else:  # no dropout
        torch.testing.assert_close(model.anchors(images), found[View("image")])
    other = gradients(small_state(small_config("precision=float64", task=task)), task)
    assert any((other[name] - value).norm() > 1e-6 for name, value in gradients(state, task).items())
    supervised = small_config("precision=float64", "objective=supervised", *lengths[:1], task="representation")
    logits = LZN(small_state(supervised).engine.networks, supervised).anchors(images)
    assert (logits.norm(dim=1) - 3).abs().min() > 0.1  # no anchors
