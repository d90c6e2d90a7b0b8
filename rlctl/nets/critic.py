"""State and action values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rlctl.nets.mlp import MLP, Activation, Norm, mlp


class ValueNet(nn.Module):
    """V(s): `[..., O] -> [...]`."""

    def __init__(
        self,
        obs_dim: int,
        hidden: Sequence[int],
        activation: Activation = "relu",
        *,
        layer_norm: Norm = False,
        orthogonal: float | None = None,
    ) -> None:
        super().__init__()
        self.net = mlp(obs_dim, 1, hidden, activation, layer_norm=layer_norm, orthogonal=orthogonal)

    def forward(self, obs: Tensor) -> Tensor:
        """Values [...] of `obs` [..., O]."""
        return self.net(obs).squeeze(-1)


class VEnsemble(nn.Module):
    """E independent values V_e(s): `[..., O] -> [E, ...]`."""

    def __init__(
        self,
        obs_dim: int,
        hidden: Sequence[int],
        num: int = 2,
        activation: Activation = "relu",
        *,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(mlp(obs_dim, 1, hidden, activation, layer_norm=layer_norm) for _ in range(num))

    def forward(self, obs: Tensor) -> Tensor:
        """Values [E, ...] of `obs` [..., O]."""
        return torch.stack([v(obs).squeeze(-1) for v in self.members])


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
        layer_norm: Norm = False,
        orthogonal: float | None = None,
        small_last: float | None = None,
        last_variance: float | None = None,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            mlp(
                obs_dim + act_dim,
                1,
                hidden,
                activation,
                layer_norm=layer_norm,
                orthogonal=orthogonal,
                small_last=small_last,
                last_variance=last_variance,
            )
            for _ in range(num)
        )

    def forward(self, obs: Tensor, action: Tensor, members: Tensor | None = None) -> Tensor:
        """Values [E, ...] of `obs` [..., O] and `action` [..., A]; with `members` [M] (int64) of those alone, [M, ...].

        Leading dimensions are equal, or `action` has more, as [B, O] and [B, K, A] for K candidates: then [E, B, K].
        """
        for _ in range(action.dim() - obs.dim()):
            obs = obs.unsqueeze(-2)
        obs = obs.expand(*action.shape[:-1], obs.shape[-1])
        x = torch.cat([obs, action], -1)
        if members is None:
            return torch.stack([q(x).squeeze(-1) for q in self.members])
        # which they are is known on the device alone: their weights are looked up there
        names = [name for name, _ in self.members[0].named_parameters()]
        stacked = [torch.stack(p) for p in zip(*(q.parameters() for q in self.members), strict=True)]
        chosen = [p.index_select(0, members).unbind(0) for p in stacked]
        return torch.stack(
            [
                functional_call(self.members[0], dict(zip(names, weights, strict=True)), (x,)).squeeze(-1)
                for weights in zip(*chosen, strict=True)
            ]
        )

    def with_action_gradient(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Values [E, B] and dQ_e/da [E, B, A] at `obs` [B, O], `action` [B, A], both differentiable in the weights."""
        actions = [action.detach().requires_grad_() for _ in self.members]
        with torch.enable_grad():
            values = [
                q.by_layers(torch.cat([obs, a], -1)).squeeze(-1)
                for q, a in zip(cast("list[MLP]", list(self.members)), actions, strict=True)
            ]
            slopes = torch.autograd.grad([v.sum() for v in values], actions, create_graph=True)
            return torch.stack(values), torch.stack(slopes)
