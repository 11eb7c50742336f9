"""Model FLOPs: what the networks' arithmetic asks for, and what the device could do."""

from __future__ import annotations

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from lzn_dist.config import Config
from lzn_dist.networks import Networks
from lzn_dist.objectives import needs

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
    """FLOPs of a training step an image: of each forward and backward that the objective asks for (a backward is two
    products for a forward's one).

    The zones, optimiser, normalisations and recomputation are not counted: it is the model's FLOPs, not the hardware's.
    Networks of other data types than images are not counted either.
    """
    shadow = copy.deepcopy(networks).to("meta").eval()
    data, wanted = config.data, needs(config)
    image = torch.zeros(1, data.image_channels, data.image_size, data.image_size, device="meta")
    image = image.to(next(shadow.parameters()).dtype)
    total = 0.0
    if (encoder := shadow.find("image", "encoder")) is not None:
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            encoder(image)
        total += (3 * len(wanted.encodes) + len(wanted.without_gradient)) * counted.get_total_flops()
    if (decoder := shadow.find("image", "decoder")) is not None:
        one = torch.ones(1, device="meta", dtype=image.dtype)
        latents = torch.zeros(1, config.latent.dim if wanted.latents else 0, device="meta", dtype=image.dtype)
        labels = torch.zeros(1, dtype=torch.int64, device="meta") if wanted.class_conditional else None
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            decoder(image, one, latents, labels=labels)
        total += 3 * len(wanted.decodes) * counted.get_total_flops()
    return total
