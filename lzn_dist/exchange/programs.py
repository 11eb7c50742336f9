"""A model as programs that need no lzn_dist: ONNX graphs and torch.export programs, of any batch.

encoder: images → anchors. classifier: images → class int64, at the centres of the images' zones among the reference's
anchors, which are inside. decoder_step: (x_t, t, latents[, labels]) → the velocity. sampler: (noise, latents[, labels])
→ images, by the configuration's Euler steps. Images are [b, c, h, w] in [−1, 1], labels int64 [b].
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lzn_dist.exchange.folder import ExportError, Loaded
from lzn_dist.modalities import modality
from lzn_dist.objectives import needs
from lzn_dist.terminal import one_line
from lzn_dist.zones.schedules import Schedule, alignment_schedule, dpm_solver_schedule, euler_schedule


def _network(model: Loaded, name: str, role: str) -> nn.Module:
    found = model.networks.find(name, role)
    assert found is not None
    return found


class Encoder(nn.Module):
    """images → anchors [b, D], as they are coupled."""

    centre: Tensor | None

    def __init__(self, model: Loaded) -> None:
        super().__init__()
        kind = modality("image", model.config)
        self.network = _network(model, "image", "encoder")
        lzn = model.config.objective == "lzn"
        self.norm = kind.norm if lzn else None
        centre = model.centres.get("image") if lzn and kind.centred else None
        self.register_buffer("centre", centre)

    def forward(self, images: Tensor) -> Tensor:
        anchors: Tensor = self.network(images)
        if self.centre is not None:
            anchors = anchors - self.centre
        return anchors if self.norm is None else self.norm * F.normalize(anchors, dim=-1)


def _walk(
    e: Tensor, own: Tensor, anchors: Tensor, schedule: Schedule, *, beside: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`zones.trajectory` without its short cuts, in float64: the last state e and the last Δ, by the fixed steps of a
    schedule; the field is relative to each row's own anchor (`zones.field`).

    beside: the own anchors are none of `anchors`, and each weighs as one more of them.
    """
    squares = anchors.square().sum(1)
    deltas: list[Tensor] = []
    for r, update in zip(schedule.r, schedule.coefficients, strict=True):
        query = r * e + (r * r) * own
        scores = query @ anchors.T - (0.5 * r * r) * squares
        highest = scores.amax(1, keepdim=True)
        mine = torch.zeros_like(highest)
        if beside:
            reference = (query * own).sum(1, keepdim=True) - (0.5 * r * r) * own.square().sum(1, keepdim=True)
            highest = torch.maximum(highest, reference)
            mine = (reference - highest).exp()
        weights = (scores - highest).exp()
        total = weights.sum(1, keepdim=True)
        deltas.insert(0, (weights @ anchors - total * own) / (total + mine))
        for delta, coefficient in zip(deltas, update, strict=False):
            e = e + coefficient * delta
    return e, deltas[0]


class Classifier(nn.Module):
    """images → class int64 [b]: image → anchor → centre of its zone among the reference → the class it flows to."""

    labels: Tensor
    reference: Tensor

    def __init__(self, model: Loaded) -> None:
        super().__init__()
        config = model.config
        self.encoder = Encoder(model)
        kind = modality("label", config)
        with torch.no_grad():
            table = _network(model, "label", "encoder")()
        table = kind.placed(table, table.mean(0) if kind.centred else None)
        self.register_buffer("labels", table.detach().double())
        self.register_buffer("reference", model.reference["image"].double())
        steps, euler = config.latent.steps, config.latent.solver == "euler"
        self.to_latent = euler_schedule(steps) if euler else dpm_solver_schedule(steps)
        self.to_class = alignment_schedule(config.evaluation.alignment_steps)

    def forward(self, images: Tensor) -> Tensor:
        anchors = self.encoder(images).double()
        # the field does not feel a common shift: around the mean, fewer digits are lost
        centre, middle = self.reference.mean(0), self.labels.mean(0)
        e, _ = _walk(torch.zeros_like(anchors), anchors - centre, self.reference - centre, self.to_latent, beside=True)
        sigma = self.to_latent.sigma_end
        latents = (1.0 - sigma) * anchors + sigma * e
        own = (self.labels[:1] - middle).expand_as(latents)
        _, delta = _walk(latents, own, self.labels - middle, self.to_class, beside=False)
        distance = (own + delta)[:, None] - (self.labels - middle)
        return distance.square().sum(2).argmin(1)


class Logits(nn.Module):
    """images → class int64 [b] of a supervised model."""

    def __init__(self, model: Loaded) -> None:
        super().__init__()
        self.encoder = Encoder(model)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images).argmax(1)


class DecoderStep(nn.Module):
    """(x_t [b, c, h, w], t [b], latents [b, D][, labels int64 [b]]) → dx_t/dt."""

    def __init__(self, model: Loaded) -> None:
        super().__init__()
        self.network = _network(model, "image", "decoder")

    def forward(self, x_t: Tensor, t: Tensor, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        velocity: Tensor = self.network(x_t, t, latents, labels=labels)
        return velocity


class Sampler(nn.Module):
    """(noise [b, c, h, w], latents [b, D][, labels int64 [b]]) → images in [−1, 1], by Euler's steps."""

    def __init__(self, model: Loaded) -> None:
        super().__init__()
        self.step = DecoderStep(model)
        self.flow = model.config.flow

    def forward(self, noise: Tensor, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        x, flow = noise, self.flow
        h = (1.0 - flow.t_min) / flow.sampler_steps
        for k in range(flow.sampler_steps):
            t = torch.full_like(x[:, 0, 0, 0], flow.t_min + k * h)
            x = x + h * self.step(x, t, latents, labels)
        return x.clamp(-1.0, 1.0)


@dataclass(frozen=True)
class Program:
    """name of the file; module; names of the inputs and an example of them, of a batch of 2; name of the output."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    output: str


def programs(model: Loaded) -> list[Program]:
    """Those that the model has."""
    config, found = model.config, list[Program]()
    data, names = config.data, model.networks.named()
    images = torch.zeros(2, data.image_channels, data.image_size, data.image_size)
    if "image.encoder" in names:
        found.append(Program("encoder", Encoder(model), {"images": images}, "anchors"))
    if config.objective == "supervised":
        found.append(Program("classifier", Logits(model), {"images": images}, "class"))
    if "label.encoder" in names and "image" in model.reference and config.latent.solver != "dopri5":
        found.append(Program("classifier", Classifier(model), {"images": images}, "class"))
    if "image.decoder" in names:
        wanted = needs(config)
        more = {"latents": torch.zeros(2, config.latent.dim if wanted.latents else 0)}
        if wanted.class_conditional:
            more["labels"] = torch.zeros(2, dtype=torch.int64)
        found.append(
            Program("decoder_step", DecoderStep(model), {"x_t": images, "t": torch.full((2,), 0.5), **more}, "velocity")
        )
        found.append(Program("sampler", Sampler(model), {"noise": images, **more}, "images"))
    return found


def write_programs(folder: Path, model: Loaded, kind: str) -> Iterator[str]:
    """Write the model's programs into a folder that is there, as `kind` (onnx or pt2), and yield their names. The
    networks have to be on the CPU, in float32. Raises ExportError where a network cannot be exported, or a package is
    missing."""
    for program in programs(model):
        arguments = tuple(program.inputs.values())
        dynamic = tuple({0: torch.export.Dim("batch", min=1)} for _ in arguments)
        path = folder / f"{program.name}.{kind}"
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # of the exporters' own making
                logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # that torchvision is not there
                exported = torch.export.export(program.module.eval(), arguments, dynamic_shapes=dynamic)
                if kind == "pt2":
                    torch.export.save(exported, path)
                else:
                    made = torch.onnx.export(
                        exported, dynamo=True, verbose=False, input_names=list(program.inputs),
                        output_names=[program.output],
                    )  # fmt: skip
                    assert made is not None
                    made.save(path)
        except ModuleNotFoundError as error:
            raise ExportError(f"ONNX needs {error.name}: pip install 'lzn_dist[export]'") from error
        except Exception as error:  # the exporters raise what they like, of networks that may be anybody's
            raise ExportError(
                f"{program.name} cannot be exported: {type(error).__name__}: {one_line(error)}"
            ) from error
        yield path.name
