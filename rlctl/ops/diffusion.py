"""Gaussian diffusion: noise schedules, what a network may predict, one reverse step.

x_i = sqrt(ab_i) x_0 + sqrt(1 - ab_i) eps, i = 1..T: index 0 is the data (ab_0 = 1), T is nearly all noise. Tables are
float64 and indexed by i itself, so that there is no off-by-one between a step and its place in an array.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Schedule = Literal["vp", "cosine", "linear"]
Prediction = Literal["eps", "x0", "v"]
Variance = Literal["posterior", "beta"]


def alpha_bars(schedule: Schedule, steps: int) -> Tensor:
    """ab_i, [T + 1] float64, ab_0 = 1, falling.

    vp: log alpha_i = -bmin / T - (bmax - bmin)(2i - 1) / (2 T^2) with bmin = 0.1, bmax = 10, so ab_T = exp(-5.05) for
    every T (Xiao et al. 2022, arXiv:2112.07804); the choice for T of 5 to 20.
    cosine: ab_i = f(i / T) / f(0), f(u) = cos^2(pi/2 (u + s) / (1 + s)), s = 0.008, each beta at most 0.999 (Nichol &
    Dhariwal 2021, arXiv:2102.09672).
    linear: beta from 1e-4 to 2e-2 (Ho et al. 2020, arXiv:2006.11239); at T far below 1000 almost no noise is added.
    """
    if steps < 1:
        raise ValueError(f"a diffusion has at least one step, got {steps}")
    i = torch.arange(1, steps + 1, dtype=torch.float64)
    if schedule == "vp":
        low, high = 0.1, 10.0
        alpha = (-low / steps - 0.5 * (high - low) * (2 * i - 1) / steps**2).exp()
    elif schedule == "cosine":
        f = torch.cos(((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008) * math.pi / 2).square()
        alpha = 1 - (1 - f[1:] / f[:-1]).clamp(max=0.999)
    elif schedule == "linear":
        alpha = 1 - torch.linspace(1e-4, 2e-2, steps, dtype=torch.float64)
    else:
        raise ValueError(f"unknown noise schedule '{schedule}': vp, cosine or linear")
    return torch.cat([torch.ones(1, dtype=torch.float64), alpha.cumprod(0)])


def noised(data: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_i of x_0 = `data` and eps = `noise`, all [..., A]; `alpha_bar` broadcasts."""
    return alpha_bar.sqrt() * data + (1 - alpha_bar).sqrt() * noise


def regression_target(kind: Prediction, data: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What a network of this kind should give, [..., A]: eps, x_0, or v = sqrt(ab) eps - sqrt(1 - ab) x_0."""
    if kind == "eps":
        return noise
    return data if kind == "x0" else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * data


def predicted_noise(kind: Prediction, out: Tensor, x: Tensor, alpha_bar: Tensor) -> Tensor:
    """eps from the output `out` of a network of this kind at x_i = `x`, [..., A]."""
    if kind == "eps":
        return out
    if kind == "x0":
        return (x - alpha_bar.sqrt() * out) / (1 - alpha_bar).sqrt()
    return (1 - alpha_bar).sqrt() * x + alpha_bar.sqrt() * out


def predicted_data(noise: Tensor, x: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_0 = (x_i - sqrt(1 - ab) eps) / sqrt(ab), [..., A]."""
    return (x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()


class ReverseSteps(NamedTuple):
    """K steps from noise to data: x <- of_data x0_hat + of_x x + std z, in the order of execution. Tensors [K]."""

    level: Tensor
    """i of the state a step begins in, int64, falling."""
    alpha_bar: Tensor
    """ab of that state."""
    of_data: Tensor
    of_x: Tensor
    std: Tensor
    """0 in the last step."""


def reverse_steps(
    alpha_bar: Tensor, steps: int | None = None, *, eta: float = 1.0, variance: Variance = "posterior"
) -> ReverseSteps:
    """The steps of a DDPM (`eta=1`) or DDIM (`eta=0`) over `alpha_bar` [T + 1], or over `steps` of its T levels.

    With p the level after i: std = eta sqrt((1 - ab_p) / (1 - ab_i) (1 - ab_i / ab_p)), the mean is
    sqrt(ab_p) x0 + sqrt(1 - ab_p - std^2) e, e = (x - sqrt(ab_i) x0) / sqrt(1 - ab_i). At eta = 1 that is the posterior
    q(x_p | x_i, x0) of DDPM. `variance="beta"` keeps the mean at eta = 1 and takes std = sqrt(1 - ab_i / ab_p).
    The levels are 1, 1 + T // K, ... (leading spacing), the last step goes to level 0.
    Source: Ho et al. 2020, arXiv:2006.11239, eqs. 6-7; Song et al. 2021, arXiv:2010.02502, eqs. 12 and 16.
    """
    total = len(alpha_bar) - 1
    steps = total if steps is None else steps
    if not 1 <= steps <= total:
        raise ValueError(f"a diffusion of {total} levels is sampled in 1 to {total} steps, not {steps}")
    if variance == "beta" and eta != 1.0:
        raise ValueError(f"variance='beta' is a choice of DDPM, that is of eta=1, not eta={eta}")
    levels = 1 + torch.arange(steps) * (total // steps)
    level, after = levels.flip(0), torch.cat([torch.zeros(1, dtype=torch.int64), levels[:-1]]).flip(0)
    ab, ab_p = alpha_bar[level], alpha_bar[after]
    beta = 1 - ab / ab_p
    std = eta * ((1 - ab_p) / (1 - ab) * beta).sqrt()
    of_x = ((1 - ab_p - std.square()).clamp(min=0) / (1 - ab)).sqrt()
    of_data = ab_p.sqrt() - ab.sqrt() * of_x
    if variance == "beta":
        std = beta.sqrt() * (after > 0)
    return ReverseSteps(level, ab, of_data, of_x, std)
