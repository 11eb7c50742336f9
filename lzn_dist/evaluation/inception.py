"""Features of the Inception network that published FIDs, sFIDs and Inception scores are measured with.

The network and its weights (converted from TensorFlow's inception-2015-12-05) are torch-fidelity's, an extra:
``pip install "lzn_dist[measures]"``. It stays out of the base install because it brings torchvision, and a torchvision
that does not fit the installed torch breaks accelerate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lzn_dist.data.index import hash_file
from lzn_dist.zones.trajectory import full_precision

WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SPATIAL_CHANNELS = 7  # of 17 × 17 positions each: about as many numbers as pool features


@dataclass(frozen=True)
class InceptionOutput:
    """Float32 arrays of n images. pool [n, 2048]: for FID, precision and recall. spatial [n, 2023]: for sFID.
    probabilities [n, 1008]: for the Inception score."""

    pool: NDArray[np.float32]
    spatial: NDArray[np.float32]
    probabilities: NDArray[np.float32]


class InceptionFeatures:
    """The network on ``device``. weights: a local file; None: torch.hub's copy, downloaded once.

    sha256: what the weights' digest must start with. Raises ImportError without a working torch-fidelity, and
    ValueError, naming both digests, for other weights; those are not unpickled.
    """

    def __init__(
        self, weights: Path | None = None, *, sha256: str = WEIGHTS_SHA256, device: torch.device | str = "cpu"
    ) -> None:
        module = _torch_fidelity()
        path = weights if weights is not None else download(sha256)
        found = hash_file(path)
        if not found.startswith(sha256):
            raise ValueError(f"{path}: expected weights with SHA-256 {sha256}, found {found}")
        self.digest = found
        # "logits_unbiased", the last layer without its bias, is what the score was published with
        self._network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        ).to(device)
        self._device = torch.device(device)
        self._spatial = torch.empty(0)
        # TensorFlow's mixed_6/conv, after its ReLU: the layer of sFID (arXiv 2103.03841)
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, _module: torch.nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].flatten(1)

    @torch.no_grad()
    def __call__(self, images: Tensor, chunk: int = 64) -> InceptionOutput:
        """Of images [n, c, h, w] in [−1, 1], c = 1 or 3, of any size, as they would look saved in 8 bits.

        The network resizes to 299 × 299 itself, as TensorFlow does. Full float32 (no TF32), ``chunk`` images at a
        time. Raises ValueError for another shape, NaN or infinity.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
            raise ValueError(f"images must be [n, 1 or 3, h, w], got {tuple(images.shape)}")
        parts = []
        with full_precision(self._device), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for batch in images.split(chunk):
                pool, logits = self._network(to_bytes(batch).to(self._device).expand(-1, 3, -1, -1))
                found = (pool, self._spatial, logits.double().softmax(1))
                parts.append([part.float().cpu().numpy() for part in found])
        return InceptionOutput(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def to_bytes(images: Tensor) -> Tensor:
    """uint8 pixels round(127.5 (x + 1)) of images in [−1, 1]; what lies outside is clipped. ValueError for NaN."""
    if not images.isfinite().all():
        raise ValueError("images must be finite, got NaN or infinity")
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _torch_fidelity() -> Any:
    try:
        import torch_fidelity.feature_extractor_inceptionv3 as module
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch raises RuntimeError
        raise ImportError(
            f"Inception features need torch-fidelity, and a torchvision that fits torch {torch.__version__}: "
            f'pip install "lzn_dist[measures]" ({error})'
        ) from error
    return module


def download(sha256: str = WEIGHTS_SHA256) -> Path:
    """Fetch the published weights into torch.hub's folder unless they are there. Raises ImportError and OSError."""
    url = _torch_fidelity().URL_INCEPTION_V3
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
    return path
