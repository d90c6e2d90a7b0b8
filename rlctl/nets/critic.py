"""State and action values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlctl.nets.mlp import ACTIVATIONS, Activation, mlp
from rlctl.ops.linalg import linear


class ValueNet(nn.Module):
    """V(s): `[..., O] -> [...]`."""

    def __init__(
        self,
        obs_dim: int,
        hidden: Sequence[int],
        activation: Activation = "relu",
        *,
        orthogonal: float | None = None,
    ) -> None:
        super().__init__()
        self.net = mlp(obs_dim, 1, hidden, activation, orthogonal=orthogonal)

    def forward(self, obs: Tensor) -> Tensor:
        """Values [...] of `obs` [..., O]."""
        return self.net(obs).squeeze(-1)


class EnsembleLinear(nn.Module):
    """E linear layers side by side: `[E, B, in] -> [E, B, out]`; each is initialised as an `nn.Linear`."""

    def __init__(self, num: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num, out_dim, in_dim))
        self.bias = nn.Parameter(torch.empty(num, out_dim))
        bound = in_dim**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """`[E, B, in] -> [E, B, out]`."""
        if x.device.type == "cpu":  # a batched product gains nothing there, and its backward leaves awkward strides
            return torch.stack([linear(*xwb) for xwb in zip(x, self.weight, self.bias, strict=True)])
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))


class QEnsemble(nn.Module):
    """E independent critics Q_e(s, a): `[..., O], [..., A] -> [E, ...]`."""

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden: Sequence[int],
        num: int = 2,
        activation: Activation = "relu",
        *,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.num = num
        layers: list[nn.Module] = []
        width = obs_dim + act_dim
        for h in hidden:
            layers.append(EnsembleLinear(num, width, h))
            if layer_norm:
                layers.append(nn.LayerNorm(h))
            layers.append(ACTIVATIONS[activation]())
            width = h
        self.net = nn.Sequential(*layers, EnsembleLinear(num, width, 1))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Values [E, ...] of `obs` [..., O] and `action` [..., A] (any equal leading dimensions)."""
        x = torch.cat([obs, action], -1)
        lead = x.shape[:-1]
        flat = x.reshape(-1, x.shape[-1]).expand(self.num, -1, -1)
        return self.net(flat).reshape(self.num, *lead)
