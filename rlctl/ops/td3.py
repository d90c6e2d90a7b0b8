"""What TD3 and the learners built on its backbone share: smoothing noise, the clipped double backup, the scaled value.

Source: Fujimoto et al. 2018, arXiv:1802.09477, algorithm 1; the scaled value is Fujimoto & Gu 2021, arXiv:2106.06860.
"""

from __future__ import annotations

import torch
from torch import Tensor


def perturbed(action: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """clip(action + std noise, +-1), `action` [..., A] in [-1, 1]: how a deterministic policy explores."""
    noise = torch.randn(action.shape, generator=generator, dtype=action.dtype, device=action.device)
    return (action + std * noise).clamp(-1, 1)


def smoothed(
    action: Tensor, noise: Tensor | None, std: float, bound: float, generator: torch.Generator | None = None
) -> Tensor:
    """clip(action + clip(std noise, +-bound), +-1): `action` [..., A] in [-1, 1].

    `noise` is standard normal, of that shape; None draws it from `generator`.
    """
    if noise is None:
        noise = torch.randn(action.shape, generator=generator, dtype=action.dtype, device=action.device)
    return (action + (std * noise).clamp(-bound, bound)).clamp(-1, 1)


def clipped_double_backup(reward: Tensor, terminated: Tensor, q_next: Tensor, gamma: float) -> Tensor:
    """r + gamma (1 - terminated) min_e Q_e(s', a'), [B], of the values `q_next` [E, B]."""
    return reward + gamma * q_next.amin(0) * ~terminated


def scaled_value_loss(q: Tensor, alpha: float) -> Tensor:
    """-lambda mean(Q) with lambda = alpha / mean|Q| (no gradient), of `q` [B]: -alpha where all Q are positive.

    lambda makes alpha a weight against a term of the scale of actions, whatever the scale of the rewards.
    """
    lam = alpha / q.detach().abs().mean().clamp(min=1e-8)
    return -lam * q.mean()
