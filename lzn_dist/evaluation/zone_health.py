"""Do the zones of a fixed batch do what the method promises? Gaussian latents, zones apart, a solver that converges."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lzn_dist.zones import AnchorField, compute_latents
from lzn_dist.zones.arguments import Backend, check_count, check_index, check_points
from lzn_dist.zones.latents import Solver
from lzn_dist.zones.schedules import alignment_schedule
from lzn_dist.zones.trajectory import full_precision, integrate

PROJECTIONS = 8
CHUNK_ELEMENTS = 1 << 24
FINER = 4


@torch.no_grad()
def zone_health(
    anchors: Tensor, noise: Tensor, *, solver: Solver = "euler", steps: int = 20, backend: Backend = "auto"
) -> dict[str, float]:
    """Measures of the latents of anchors [n, D] with noise [n, D], those of `compute_latents`; n is at least 2.

    zones.entropy, in nats: the mean of `assignment_entropy`, with as many steps. zones.effective_anchors: exp of it:
    how many anchors a latent belongs to, from 1 (zones apart) to n (all anchors in one place).
    zones.mean, zones.variance, zones.correlation, zones.kurtosis, zones.normality_p: `gaussianity`.
    zones.solver_error: ‖z − z'‖ / ‖z'‖ of all latents z and those z' of 4 times the steps; 0 for the adaptive solver.
    Raises ValueError, naming the argument, for what `compute_latents` refuses and for a single anchor.
    """
    latents = compute_latents(anchors, noise, solver=solver, steps=steps, backend=backend)
    finer = compute_latents(anchors, noise, solver=solver, steps=FINER * steps, backend=backend)
    own = torch.arange(len(anchors), device=anchors.device)
    entropy = assignment_entropy(latents, anchors, own, steps=steps).mean().item()
    return {
        "zones.entropy": entropy,
        "zones.effective_anchors": math.exp(entropy),
        **{f"zones.{key}": value for key, value in gaussianity(latents.double().cpu().numpy()).items()},
        "zones.solver_error": ((latents - finer).double().norm() / finer.double().norm()).item(),
    }


@torch.no_grad()
def assignment_entropy(latents: Tensor, anchors: Tensor, targets: Tensor, *, steps: int = 20) -> Tensor:
    """Entropy [b], in nats and float64, of the posterior over anchors [n, D] at the end of each latent's flow.

    A latent [b, D] is carried from the prior along the flow of the anchors, as `align` does it, to its last step at
    σ = 1/steps. There the posterior is w_j ∝ exp(−½ ‖(x − (1−σ) a_j)/σ‖²) (paper, section 2), the weights that
    alignment reads at that step. At σ = 1 they would say nothing: every anchor has 1/n. 0: the latent is one anchor's;
    log m: m anchors lie so close (within about σ) that it is as much one's as another's.

    targets int64 [b]: the anchors that positions are relative to; they decide about rounding alone.
    Raises ValueError, naming the argument, for wrong shapes, dtypes, a target out of range or steps < 1.
    """
    check_points("latents", latents)
    check_points("anchors", anchors, latents.shape[1], latents.dtype)
    check_index("targets", targets, len(latents), range(len(anchors)))
    check_count("steps", steps)
    references = anchors[targets]
    e, _, _ = integrate(
        latents, references, anchors, targets, AnchorField(anchors), alignment_schedule(steps), from_anchors=False
    )
    # x = (1−σ) a_o + σ e, so that (x − (1−σ) a_j)/σ = (e + r a_o) − r a_j with r = (1−σ)/σ
    r = steps - 1.0
    centre = anchors.double().mean(0)
    keys = r * (anchors.double() - centre)
    queries = e.double() + r * (references.double() - centre)
    entropies = []
    with full_precision(latents.device):
        for part in queries.split(max(1, CHUNK_ELEMENTS // len(anchors))):
            log_w = (-0.5 * torch.cdist(part, keys).square()).log_softmax(1)
            entropies.append(torch.special.entr(log_w.exp()).sum(1))
    return torch.cat(entropies)


def gaussianity(latents: NDArray[np.float64], seed: int = 0) -> dict[str, float]:
    """How far are latents [n, D] from draws of N(0, I)?

    mean: the largest |mean| of a dimension. variance: mean over dimensions. correlation: root mean square over pairs
    of dimensions; 1/√n is noise. kurtosis: mean excess over dimensions. The four are 0, 1, 0 and 0 for N(0, I).

    normality_p: p-value of N(0, I), scale and mean included. Kolmogorov–Smirnov tests of the projections on up to 8
    random orthonormal directions, which are independent N(0, 1) and so combined by Fisher's method, and of the squared
    norms against χ²_D, which see heavy tails that projections average away; Bonferroni over the two. Small: the
    latents are not Gaussian, by more than chance; with enough of them a small error of the solver is enough. Large: no
    evidence against it, even less than the figure says, as latents of different zones lie more evenly than independent
    draws. Latents of scaled noise are not meant to be N(0, I).
    Raises ValueError for fewer than two latents, another shape, NaN or infinity.
    """
    if latents.ndim != 2 or len(latents) < 2 or not np.isfinite(latents).all():
        raise ValueError(f"latents must be finite and [at least 2, D], got shape {latents.shape}")
    dim = latents.shape[1]
    centred = latents - latents.mean(0)
    variance = np.square(centred).mean(0)
    # a dimension without spread has neither correlation nor tails
    unit = centred / np.sqrt(np.maximum(variance, np.finfo(np.float64).tiny))
    correlation = unit.T @ unit / len(latents)
    pairs = correlation[~np.eye(dim, dtype=bool)]
    return {
        "mean": float(np.abs(latents.mean(0)).max()),
        "variance": float(variance.mean()),
        "correlation": float(np.sqrt(np.square(pairs).mean())) if dim > 1 else 0.0,
        "kurtosis": float((unit**4).mean() - 3.0),
        "normality_p": _normality(latents, seed),
    }


def _normality(latents: NDArray[np.float64], seed: int) -> float:
    import scipy.stats  # here: it takes a second to import

    dim = latents.shape[1]
    directions, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, min(dim, PROJECTIONS))))
    single = [scipy.stats.kstest(projection, "norm").pvalue for projection in (latents @ directions).T]
    # log 0 has no place in Fisher's sum
    projected = scipy.stats.combine_pvalues(np.maximum(single, np.finfo(np.float64).tiny), method="fisher").pvalue
    radial = scipy.stats.kstest(np.square(latents).sum(1), scipy.stats.chi2(dim).cdf).pvalue
    return float(min(1.0, 2.0 * min(projected, radial)))
