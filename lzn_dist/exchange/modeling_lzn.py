"""An encoder of a Latent Zoning Network (arXiv 2509.15591) for transformers:

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    model(images).anchors    # images [b, c, h, w] in [-1, 1]; of a text encoder: token ids, negative where none is

Written beside the weights by `lzn_dist export`, with the sources of the network that it needs and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from lzn_dist.models.ncsnpp import ImageEncoder as Network


@dataclass
class LZNEncoderOutput(ModelOutput):
    """anchors [b, D], centred and scaled as in training; features [b, F]: what a probe reads, before the head."""

    anchors: Tensor | None = None
    features: Tensor | None = None


class LZNEncoderConfig(PretrainedConfig):
    model_type = "lzn_encoder"

    def __init__(
        self,
        arguments: dict[str, Any] | None = None,
        latent_dim: int = 0,
        centred: bool = False,
        norm: float | None = None,
        **more: Any,
    ) -> None:
        """arguments: of the network's class. centred: the anchors' mean is subtracted; norm: then they are brought to
        this length."""
        super().__init__(**more)
        self.arguments, self.latent_dim, self.centred, self.norm = arguments or {}, latent_dim, centred, norm


class LZNEncoder(PreTrainedModel):
    config_class = LZNEncoderConfig
    main_input_name = "inputs"

    def __init__(self, config: LZNEncoderConfig) -> None:
        super().__init__(config)
        self.network = Network(**config.arguments)
        self.register_buffer("centre", torch.zeros(config.latent_dim))
        self.post_init()

    def forward(self, inputs: Tensor, features: bool = True) -> LZNEncoderOutput:
        """features=False: without them, which are a second pass through most of the network."""
        anchors = self.network(inputs)
        if self.config.centred:
            anchors = anchors - self.centre
        if self.config.norm is not None:
            anchors = self.config.norm * torch.nn.functional.normalize(anchors, dim=-1)
        read = getattr(self.network, "features", None) if features else None
        return LZNEncoderOutput(anchors=anchors, features=None if read is None else read(inputs))
