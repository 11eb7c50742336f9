"""Model FLOPs: what the networks' arithmetic asks for, and what the device could do."""

from __future__ import annotations

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from lzn_dist.config import Config
from lzn_dist.networks import Networks

# Dense peak in FLOP/s by (part of the device's name): float32 without tensor cores, TF32, bf16 (vendor data sheets).
PEAKS = {
    "H200": (67e12, 494.7e12, 989.4e12),
    "H100 PCIe": (51e12, 378e12, 756e12),
    "H100": (67e12, 494.7e12, 989.4e12),
    "A100": (19.5e12, 156e12, 312e12),
    "L40S": (91.6e12, 183e12, 362e12),
}


def peak_flops(config: Config) -> float:
    """The device's peak in the run's precision; 0 on the CPU, in float64 and on devices that are not in the table."""
    if not torch.cuda.is_available() or config.precision == "float64":
        return 0.0
    name = torch.cuda.get_device_name()
    row = next((peaks for part, peaks in PEAKS.items() if part in name), (0.0, 0.0, 0.0))
    return row[2] if config.precision == "bf16" else row[1] if config.tf32 else row[0]


def training_flops_per_image(networks: Networks, config: Config) -> float:
    """FLOPs of a training step an image: three times the networks' forward (one forward, two products a backward).

    The zones, optimiser, normalisations and recomputation are not counted: it is the model's FLOPs, not the hardware's.
    """
    shadow = copy.deepcopy(networks).to("meta").eval()
    data = config.data
    image = torch.zeros(1, data.image_channels, data.image_size, data.image_size, device="meta")
    image = image.to(next(shadow.parameters()).dtype)
    total = 0
    if shadow.encoder is not None:
        views = 2 if config.task == "representation" and config.objective != "supervised" else 1
        with FlopCounterMode(display=False) as encoder, torch.no_grad():
            shadow.encoder(image)
        total += views * encoder.get_total_flops()
    if shadow.decoder is not None:
        one = torch.ones(1, device="meta", dtype=image.dtype)
        latents = torch.zeros(1, config.decoder_latent_dim, device="meta", dtype=image.dtype)
        labels = torch.zeros(1, dtype=torch.int64, device="meta") if config.labels_decoder else None
        with FlopCounterMode(display=False) as decoder, torch.no_grad():
            shadow.decoder(image, one, latents, labels=labels)
        total += decoder.get_total_flops()
    return 3.0 * total
