"""Networks of generative policies: what a state, a noisy action and a time say about the noise or the velocity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from rlctl.nets.mlp import ACTIVATIONS, Activation, Linear, mlp

TimeKind = Literal["raw", "sinusoidal", "fourier"]
FieldKind = Literal["resnet", "mlp"]


class RawTime(nn.Module):
    """The time itself, one feature: enough for a flow of about ten steps."""

    dim = 1

    def forward(self, t: Tensor) -> Tensor:
        """`[...] -> [..., 1]`."""
        return t.unsqueeze(-1)


class SinusoidalTime(nn.Module):
    """sin and cos of t at `dim / 2` frequencies from 1 down to 1e-4, then Linear, Mish, Linear."""

    frequencies: Tensor

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.dim, half = dim, dim // 2
        self.register_buffer(
            "frequencies", torch.exp(torch.arange(half) * (-math.log(1e4) / (half - 1))), persistent=False
        )
        self.net = mlp(dim, dim, (2 * dim,), "mish")

    def forward(self, t: Tensor) -> Tensor:
        """`[...] -> [..., dim]`."""
        angle = t.unsqueeze(-1) * self.frequencies
        return self.net(torch.cat([angle.sin(), angle.cos()], -1))


class FourierTime(nn.Module):
    """cos and sin of 2 pi w t at `dim / 2` learned frequencies w, drawn from N(0, 0.2^2), then Linear, SiLU, Linear."""

    def __init__(self, dim: int = 128) -> None:
        super().__init__()
        self.dim = 2 * dim
        self.frequencies = nn.Parameter(0.2 * torch.randn(dim // 2))
        self.net = mlp(dim, 2 * dim, (2 * dim,), "silu")

    def forward(self, t: Tensor) -> Tensor:
        """`[...] -> [..., 2 dim]`."""
        angle = 2 * math.pi * t.unsqueeze(-1) * self.frequencies
        return self.net(torch.cat([angle.cos(), angle.sin()], -1))


TIMES: dict[TimeKind, type[RawTime | SinusoidalTime | FourierTime]] = {
    "raw": RawTime,
    "sinusoidal": SinusoidalTime,
    "fourier": FourierTime,
}


class Field(nn.Module):
    """Base: joins the inputs, so that one observation may meet many noisy actions.

    `obs` [..., O] and `x` [..., A] share leading dimensions, or `x` has more, as [B, O] and [B, N, A]. `t` is a single
    number (0-dim: embedded once for all rows) or broadcasts to the leading dimensions of `x`.
    """

    def __init__(self, time: TimeKind) -> None:
        super().__init__()
        self.time: RawTime | SinusoidalTime | FourierTime = TIMES[time]()

    def joined(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """[obs, x, time features], `[..., O + A + D]`."""
        for _ in range(x.dim() - obs.dim()):
            obs = obs.unsqueeze(-2)
        lead = x.shape[:-1]
        features = self.time(t.to(x.dtype))
        return torch.cat([obs.expand(*lead, -1), x, features.expand(*lead, -1)], -1)


class FieldMLP(Field):
    """A plain MLP on state, noisy action and time."""

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden: Sequence[int],
        activation: Activation = "mish",
        time: TimeKind = "sinusoidal",
        *,
        xavier: bool = False,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(time)
        self.net = mlp(obs_dim + act_dim + self.time.dim, act_dim, hidden, activation, layer_norm=layer_norm)
        if xavier:
            xavier_(self.net)

    def forward(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """`[..., O], [..., A], [...] -> [..., A]`."""
        return self.net(self.joined(obs, x, t))


class FieldResNet(Field):
    """Residual blocks with layer norm: Linear w; `blocks` times x + Linear(act(Linear(LN(x)))) through 4w; act; Linear.

    First and last layer start Xavier-uniform, the others LeCun-normal, biases at zero.
    Source: Hansen-Estruch et al. 2023, arXiv:2304.10573.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        width: int = 256,
        blocks: int = 3,
        activation: Activation = "silu",
        time: TimeKind = "fourier",
    ) -> None:
        super().__init__(time)
        self.first = Linear(obs_dim + act_dim + self.time.dim, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), Linear(width, 4 * width), ACTIVATIONS[activation](), Linear(4 * width, width)
            )
            for _ in range(blocks)
        )
        self.act = ACTIVATIONS[activation]()
        self.last = Linear(width, act_dim)
        for m in self.blocks.modules():
            if isinstance(m, Linear):
                nn.init.normal_(m.weight, std=m.in_features**-0.5)
                nn.init.zeros_(m.bias)
        for layer in (self.first, self.last):
            xavier_(layer)

    def forward(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """`[..., O], [..., A], [...] -> [..., A]`."""
        h = self.first(self.joined(obs, x, t))
        for block in self.blocks:
            h = h + block(h)
        return self.last(self.act(h))


def field_net(
    kind: FieldKind, of: Literal["diffusion", "flow"], obs_dim: int, act_dim: int, hidden: Sequence[int]
) -> Field:
    """The usual network of a diffusion or a flow: residual blocks, one per width and all alike, or a plain MLP.

    An MLP starts as the field's baselines do: Mish with sinusoidal time for a diffusion, GELU with the bare time and
    Xavier-uniform weights for a flow.
    """
    if kind == "resnet":
        if len(set(hidden)) != 1:
            raise ValueError(f"residual blocks are of one width: the widths {tuple(hidden)} are several")
        return FieldResNet(obs_dim, act_dim, hidden[0], len(hidden))
    if of == "diffusion":
        return FieldMLP(obs_dim, act_dim, hidden)
    return FieldMLP(obs_dim, act_dim, hidden, "gelu", "raw", xavier=True)


def xavier_(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer in `module`."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
