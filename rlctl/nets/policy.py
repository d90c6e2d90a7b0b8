"""Policies: modules that turn observations into actions or action distributions, and say what they can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from rlctl.nets.distributions import Normal, NormalMixture, TanhNormal, TanhNormalMixture
from rlctl.nets.mlp import Activation, Linear, mlp


class Policy(nn.Module):
    """Base of all policies. Called with observations it gives what there is of a distribution: `sample`, `mode`, and of
    a Gaussian or mixture `log_prob` and the like; the methods here answer for every kind. `can` names its capabilities:

    sample: stochastic draws; reparam: draws differentiable in the parameters; log_prob: exact density of a given
    action; entropy, kl: in closed form; mode: a deterministic action; components: the distribution is a mixture with
    `weights` and `components`; deterministic: the module returns actions, not a distribution; matching_loss: can be
    fitted to given actions; decode: a deterministic map from noise to action; field: a noise or velocity prediction;
    chain_log_prob: densities of the steps of its sampling; latent_log_prob: the density of the code it decodes.
    """

    can: frozenset[str] = frozenset()
    noise_shape: tuple[int, ...] | None = None
    """Shape of the noise one draw takes, [..., *noise_shape]; None where noise alone does not determine it."""

    def sample(
        self,
        obs: Tensor,
        num: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws [..., A] for `obs` [..., O]; with `num` several for each, [..., num, A], as with such a `noise`."""
        if num is None and noise is not None and noise.dim() > obs.dim():
            num = noise.shape[-2]
        if num is not None:
            obs = obs.unsqueeze(-2).expand(*obs.shape[:-1], num, obs.shape[-1])
        return self(obs).sample(noise, generator)

    def candidates(
        self, obs: Tensor, num: int, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Actions to choose from, [..., num, A] (or more): draws, unless a policy knows better ones."""
        return self.sample(obs, num, noise, generator)

    def mode(self, obs: Tensor) -> Tensor:
        """The deterministic action [..., A] for `obs` [..., O]."""
        return self(obs).mode

    def decode(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The action [..., A] that `noise` [..., A] is mapped to."""
        return self.sample(obs, noise=noise)

    def matching_loss(
        self,
        obs: Tensor,
        action: Tensor,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """How badly `action` [..., A] is imitated, [...]: here -log pi(a|s); `noise` and `time` are of other kinds."""
        return -self(obs).log_prob(action)


def require(policy: Policy, *capabilities: str, by: str) -> None:
    """Raise TypeError at construction, naming what `policy` lacks of what the agent `by` needs."""
    missing = [c for c in capabilities if c not in policy.can]
    if missing:
        raise TypeError(
            f"{by} needs a policy with {', '.join(missing)}; {type(policy).__name__} offers "
            f"{', '.join(sorted(policy.can)) or 'nothing'}"
        )


class GaussianPolicy(Policy):
    """Diagonal Gaussian with an MLP mean and one free log-std per action dimension (not squashed, not bounded).

    `tanh_mean` keeps the mean within (-1, 1) (the density is still that of a plain Gaussian), `log_std_bounds` clamps
    the log-std, `dropout` is the probability with which a hidden unit is silenced where a caller asks for it.
    """

    can = frozenset({"sample", "reparam", "log_prob", "entropy", "kl", "mode", "decode", "matching_loss"})

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden: Sequence[int],
        activation: Activation = "tanh",
        *,
        log_std: float = 0.0,
        orthogonal: float | None = 0.01,
        tanh_mean: bool = False,
        log_std_bounds: tuple[float, float] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.noise_shape = (act_dim,)
        self.mean = mlp(obs_dim, act_dim, hidden, activation, orthogonal=orthogonal)
        self.log_std = nn.Parameter(torch.full((act_dim,), log_std))
        self.tanh_mean, self.log_std_bounds, self.dropout = tanh_mean, log_std_bounds, dropout

    def forward(self, obs: Tensor, drop: torch.Generator | None = None) -> Normal:
        """The distribution at `obs` [..., O]; with dropout, its masks from `drop`, where that is given."""
        mean = self.mean(obs) if drop is None or not self.dropout else self.mean.dropped(obs, self.dropout, drop)
        return Normal(mean.tanh() if self.tanh_mean else mean, self.bounded_log_std())

    def bounded_log_std(self) -> Tensor:
        """The log-std [A] of every state."""
        return self.log_std if self.log_std_bounds is None else self.log_std.clamp(*self.log_std_bounds)

    @torch.no_grad()
    def summary(self) -> dict[str, Tensor]:
        """What to log of the spread, which is the same in every state: entropy (nats) and mean standard deviation."""
        log_std = self.bounded_log_std()
        entropy = Normal(log_std, log_std).entropy()  # of any mean
        return {"policy/entropy": entropy, "policy/std": log_std.exp().mean()}


class TanhGaussianPolicy(Policy):
    """Squashed Gaussian whose mean and log-std come from one MLP; log-std is clamped to `log_std_bounds`.

    `log_std_offset` is added to the network's log-std, so that a small last layer starts with that spread.
    """

    can = frozenset({"sample", "reparam", "log_prob", "kl", "mode", "decode", "matching_loss"})

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden: Sequence[int],
        activation: Activation = "relu",
        *,
        log_std_bounds: tuple[float, float] = (-20.0, 2.0),
        log_std_offset: float = 0.0,
        small_last: float | None = None,
        last_variance: float | None = None,
    ) -> None:
        super().__init__()
        self.noise_shape = (act_dim,)
        self.net = mlp(obs_dim, 2 * act_dim, hidden, activation, small_last=small_last, last_variance=last_variance)
        self.log_std_bounds, self.log_std_offset = log_std_bounds, log_std_offset

    def forward(self, obs: Tensor) -> TanhNormal:
        """The distribution at `obs` [..., O]."""
        mean, log_std = self.net(obs).chunk(2, -1)
        if self.log_std_offset:
            log_std = log_std + self.log_std_offset
        return TanhNormal(mean, log_std.clamp(*self.log_std_bounds))


GateInput = Literal["features", "obs"]


class Gate(nn.Module):
    """One linear layer that gives the logits of a mixture's weights.

    `sees="features"`: the last hidden layer of the components' network, detached, so that what trains the gate trains
    this layer alone; `sees="obs"`: the observation.
    """

    def __init__(self, obs_dim: int, width: int, num: int, sees: GateInput) -> None:
        super().__init__()
        self.sees = sees
        self.linear = Linear(width if sees == "features" else obs_dim, num)

    def forward(self, obs: Tensor, features: Tensor) -> Tensor:
        """Logits [..., K]."""
        return self.linear(features.detach() if self.sees == "features" else obs)


class MixturePolicy(Policy):
    """Gaussian mixture (not squashed): an MLP for the K means, K free log-std vectors, a learned gate.

    With one component it is `GaussianPolicy`.
    """

    can = frozenset({"sample", "log_prob", "mode", "components", "matching_loss"})

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden: Sequence[int],
        num: int = 4,
        activation: Activation = "tanh",
        *,
        log_std: float = 0.0,
        orthogonal: float | None = 0.01,
        gate: GateInput = "obs",
    ) -> None:
        super().__init__()
        self.num, self.act_dim = num, act_dim
        self.mean = mlp(obs_dim, num * act_dim, hidden, activation, orthogonal=orthogonal)
        self.log_std = nn.Parameter(torch.full((num, act_dim), log_std))
        self.gate = Gate(obs_dim, hidden[-1] if hidden else obs_dim, num, gate)

    def forward(self, obs: Tensor) -> NormalMixture:
        """The distribution at `obs` [..., O]."""
        features = self.mean.features(obs)
        mean = self.mean[-1](features).unflatten(-1, (self.num, self.act_dim))
        return NormalMixture(self.gate(obs, features), Normal(mean, self.log_std))


class TanhMixturePolicy(Policy):
    """Squashed Gaussian mixture: K means and log-stds (clamped to [-20, 2]) from one MLP, a learned gate.

    With one component it is `TanhGaussianPolicy`.
    """

    can = frozenset({"sample", "log_prob", "mode", "components", "matching_loss"})

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden: Sequence[int],
        num: int = 4,
        activation: Activation = "relu",
        *,
        gate: GateInput = "features",
    ) -> None:
        super().__init__()
        self.num, self.act_dim = num, act_dim
        self.net = mlp(obs_dim, 2 * num * act_dim, hidden, activation)
        self.gate = Gate(obs_dim, hidden[-1] if hidden else obs_dim, num, gate)

    def forward(self, obs: Tensor) -> TanhNormalMixture:
        """The distribution at `obs` [..., O]."""
        features = self.net.features(obs)
        heads = self.net[-1](features).unflatten(-1, (2, self.num, self.act_dim))
        mean, log_std = heads.unbind(-3)
        return TanhNormalMixture(self.gate(obs, features), TanhNormal(mean, log_std.clamp(-20.0, 2.0)))


class DeterministicPolicy(Policy):
    """a = tanh(MLP(s)): the module returns the action itself, not a distribution."""

    can = frozenset({"deterministic", "matching_loss"})

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden: Sequence[int],
        activation: Activation = "relu",
        *,
        orthogonal: float | None = None,
        small_last: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.net = mlp(obs_dim, act_dim, hidden, activation, orthogonal=orthogonal, small_last=small_last)
        self.dropout = dropout

    def forward(self, obs: Tensor, drop: torch.Generator | None = None) -> Tensor:
        """Actions [..., A] in (-1, 1); with dropout, its masks from `drop`, where that is given."""
        out = self.net(obs) if drop is None or not self.dropout else self.net.dropped(obs, self.dropout, drop)
        return out.tanh()

    def mode(self, obs: Tensor) -> Tensor:
        """The action [..., A]."""
        return self(obs)

    def matching_loss(
        self,
        obs: Tensor,
        action: Tensor,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Squared distance of its action to `action` [..., A], a mean over dimensions, [...]."""
        return (self(obs) - action).square().mean(-1)
