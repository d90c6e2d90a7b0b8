"""Training the gate of a mixture."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Deterministic = Literal["gate", "value"]
"""What names the component whose mean is the deterministic action of a mixture: its gate, or the critics."""


def frequency_loss(weights: Tensor, best: Tensor) -> Tensor:
    """mean over rows and components of (onehot(best) - w)^2: gate weights [..., K], index of the best component [...].

    For one state its minimiser is w_k = P(k is the best one). The sum over components, which some implementations
    take, is K times this.
    Source: Ren et al. 2021, arXiv:2104.09122 (frequency loss).
    """
    onehot = best.unsqueeze(-1) == torch.arange(weights.shape[-1], device=weights.device)
    return (onehot.to(weights.dtype) - weights).square().mean()


def gate_use(weights: Tensor) -> dict[str, Tensor]:
    """What to log of gate weights [..., K]: how many components are used over all and per state, the mean weights."""
    return {
        "mixture/effective_components": effective_components(weights),
        "mixture/components_per_state": components_used(weights),
        **{f"mixture/weight_{k}": w for k, w in enumerate(weights.flatten(0, -2).mean(0).unbind())},
    }


def effective_components(weights: Tensor) -> Tensor:
    """exp(entropy of the mean weight over all rows), 0-dim: 1 if one component does everything, K if all do the same.

    `weights` [..., K].
    """
    share = weights.flatten(0, -2).mean(0)
    return torch.special.entr(share).sum().exp()


def components_used(weights: Tensor) -> Tensor:
    """Mean over rows of exp(entropy of the weight), 0-dim: 1 where the gate is sure in every state, K where it guesses.

    `weights` [..., K]. Beside `effective_components` it tells a gate that shares states out from one that knows none.
    """
    return torch.special.entr(weights).sum(-1).exp().mean()
