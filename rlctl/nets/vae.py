"""Variational auto-encoders of actions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlctl.nets.distributions import Normal
from rlctl.nets.mlp import Activation, mlp


class ActionVAE(nn.Module):
    """A conditional auto-encoder of actions: code ~ N(encoder(s, a)), action = tanh(decoder(s, code)).

    The encoder's log-std is clamped to `log_std_bounds`. `latent_dim` defaults to twice the action dimension.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden: Sequence[int],
        latent_dim: int | None = None,
        activation: Activation = "relu",
        *,
        log_std_bounds: tuple[float, float] = (-4.0, 15.0),
    ) -> None:
        super().__init__()
        self.latent_dim = 2 * act_dim if latent_dim is None else latent_dim
        self.log_std_bounds = log_std_bounds
        self.encoder = mlp(obs_dim + act_dim, 2 * self.latent_dim, hidden, activation)
        self.decoder = mlp(obs_dim + self.latent_dim, act_dim, hidden, activation)

    def encode(self, obs: Tensor, action: Tensor) -> Normal:
        """The distribution of the code [..., Z] of `action` [..., A] in `obs` [..., O]."""
        mean, log_std = self.encoder(torch.cat([obs, action], -1)).chunk(2, -1)
        return Normal(mean, log_std.clamp(*self.log_std_bounds))

    def decode(self, obs: Tensor, code: Tensor) -> Tensor:
        """The action [..., A] in (-1, 1) of `code` [..., Z]."""
        return self.decoder(torch.cat([obs, code], -1)).tanh()

    def forward(
        self, obs: Tensor, action: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Normal]:
        """A reconstruction [..., A] by a reparameterised code (`noise` [..., Z]), and the code's distribution."""
        code = self.encode(obs, action)
        return self.decode(obs, code.sample(noise, generator)), code


def prior_kl(code: Normal) -> Tensor:
    """KL(code || N(0, I)) [...], nats, as a MEAN over latent dimensions: -1/2 mean(1 + log std^2 - mean^2 - std^2)."""
    zero = torch.zeros_like(code.mean)
    return code.kl(Normal(zero, zero)) / code.mean.shape[-1]
