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


def integrated(velocity: Velocity, x: Tensor, steps: int, method: Method = "euler") -> Tensor:
    """x [..., A] carried from t = 0 to 1 in `steps` equal steps; v is asked at t = k / steps, never at t = 1."""
    for k in range(steps):
        x = advanced(velocity, x, x.new_tensor(k / steps), 1 / steps, method)
    return x


def flow_data(velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The data a velocity at x_t points to, x + (1 - t) v."""
    return x + (1 - t) * velocity


def flow_noise(velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The noise a velocity at x_t comes from, x - t v; the score of x_t is -noise / (1 - t)."""
    return x - t * velocity
