"""A Latent Zoning Network made by hand, whose right answers are known: see `hand_made`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lzn_dist.config import Config
from lzn_dist.inference import LZN
from lzn_dist.networks import Networks
from lzn_dist.objectives import build_networks

CLASSES, DIM = 4, 6


class Encoder(nn.Module):
    """An image's anchor is its first DIM pixels, ten times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def forward(self, images: Tensor, key: Tensor | None = None) -> Tensor:
        return self.scale * images.flatten(1)[:, :DIM]


class Decoder(nn.Module):
    """The exact velocity towards one image a class: all pixels −0.8 but pixel ``label``, which is 0.8.

    v = (target − x)/(1−t) ends at the target from anywhere; Euler's last step lands on it exactly.
    """

    def __init__(self, conditional: bool) -> None:
        super().__init__()
        self.conditional = conditional

    def forward(
        self, x_t: Tensor, t: Tensor, latents: Tensor, labels: Tensor | None = None, key: Tensor | None = None
    ) -> Tensor:
        assert t.shape == (len(x_t),) and latents.shape == (len(x_t), DIM)
        if self.conditional:
            assert labels is not None and labels.dtype == torch.int64
            target = class_images(labels)
        else:
            assert labels is None
            target = torch.tanh(latents[:, :1, None, None]).expand_as(x_t)
        return (target - x_t) / (1 - t[:, None, None, None])


class Labels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.anchors = nn.Parameter(8.0 * torch.eye(DIM)[:CLASSES] - 8.0 * (1 - torch.eye(DIM)[:CLASSES]))

    def forward(self) -> Tensor:
        return self.anchors


def class_images(labels: Tensor) -> Tensor:
    """Images [n, 1, 8, 8]: −0.8 everywhere, 0.8 at the pixel whose number is the label."""
    images = torch.full((len(labels), 64), -0.8)
    images[torch.arange(len(labels)), labels] = 0.8
    return images.reshape(-1, 1, 8, 8)


TASKS: dict[str, dict[str, object]] = {
    "generation": {"decode": ({},)},
    "representation": {"alignment": {"pairs": ({"latents": "image.1", "anchors": "image.2"},)}},
    "joint": {
        "alignment": {"pairs": ({"latents": "image", "anchors": "label"},)},
        "decode": ({"class_conditional": True},),
    },
}
SIZES = {
    "channels": 32, "channel_multipliers": (1,), "residual_blocks": 1, "attention_resolutions": (), "dropout": 0.0,
}  # fmt: skip


def make_config(task: str, **values: object) -> Config:
    base = {
        **TASKS[task],
        "output_dir": "unused",
        "max_steps": 1,
        "data": {"num_classes": CLASSES},
        "latent": {"dim": DIM, "noise_scale": 0.3},
        "evaluation": {"batch": 8, "noise_scales": (0.0, 1.0), "samples_per_class": 3, "alignment_steps": 40},
    }
    return Config.model_validate({**base, **values})


def hand_made(task: str, **values: object) -> LZN:
    """Classes are anchors along their own axes, images lie at their class's anchor: everything can be right."""
    decoder = None if task == "representation" else Decoder(task == "joint")
    networks = Networks(
        {
            "image": {"encoder": Encoder()} | ({} if decoder is None else {"decoder": decoder}),
            **({"label": {"encoder": Labels()}} if task == "joint" else {}),
        }
    )
    with torch.no_grad():
        anchors = networks["image"]["encoder"](class_images(torch.arange(8) % CLASSES))  # type: ignore[index, operator]
    return LZN(networks, make_config(task, **values), reference={"image": anchors})


def tiny(task: str, folder: Path, objective: str = "lzn", by_class: bool = False, **data: object) -> LZN:
    config = Config.model_validate(
        {
            **(TASKS[task] | ({"decode": ({"class_conditional": True},)} if by_class else {})),
            "objective": objective, "output_dir": "unused", "max_steps": 1,
            "data": {"shards": str(folder), "embedded": "digits", **data},
            "latent": {"dim": 8, "steps": 4},
            "modalities": {
                "image": {
                    "encoder": {"target": "ncsnpp", "arguments": SIZES},
                    "decoder": {"target": "ncsnpp", "arguments": SIZES},
                },
                "label": {"encoder": {"target": "label_anchors"}},
            },
            "evaluation": {"batch": 200, "samples_per_class": 2, "alignment_steps": 10, "noise_scales": (0.0, 0.5)},
            "flow": {"sampler_steps": 2},
        }
    )  # fmt: skip
    torch.manual_seed(0)
    return LZN(build_networks(config), config, step=1)
