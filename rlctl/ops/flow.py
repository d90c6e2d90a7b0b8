"""Flow matching on straight paths: t = 0 is noise, t = 1 the data, x_t = (1 - t) noise + t data, velocity data - noise.

Papers that run the other way (t = 1 is noise) have t' = 1 - t and v' = -v.
Source: Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v(x [..., A], t []) -> [..., A]."""
Method = Literal["euler", "midpoint"]


def interpolated(noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """x_t [..., A] on the straight path; `t` broadcasts to it."""
    return (1 - t) * noise + t * data


def advanced(velocity: Velocity, x: Tensor, t: Tensor, dt: float, method: Method = "euler") -> Tensor:
    """x a time `dt` later: x + dt v(x, t), or with the midpoint rule x + dt v(x + dt/2 v(x, t), t + dt/2)."""
    v = velocity(x, t)
    if method == "midpoint":
        v = velocity(x + 0.5 * dt * v, t + 0.5 * dt)
    return x + dt * v
