"""FamO2O on IQL: a policy for every inverse temperature, and a second policy that picks one in each state.

Source: Wang et al. 2023, arXiv:2310.17966; official code github.com/LeapLabTHU/FamO2O (FamO2O-IQL).
Differs: data actions are not clipped to +-(1 - 1e-5), as a plain Gaussian has a finite density everywhere. Defaults for
MuJoCo tasks, of which the official repository documents no run with this base: its class default [1, 5] for beta,
IQL's expectile and rewards; its documented AntMaze settings stand at the config. Online the update takes beta from the
very draw of the balance policy that its own loss has used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from rlctl.agents.offline_learner import OfflineLearner, note
from rlctl.data.reward import RewardName
from rlctl.nets import GaussianPolicy, Normal, QEnsemble, TanhNormal, ValueNet
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.ops.balance import ENCODING_DIM, conditioned, spanned, uniform
from rlctl.ops.offline import MAX_WEIGHT, awr_weight, expectile_loss
from rlctl.train import OfflineRLConfig
from rlctl.types import Batch, Fraction, Metrics, NonNegative, Positive, Spec, Widths


@dataclass(frozen=True)
class FamO2OIQLConfig(OfflineRLConfig):
    """Defaults: for MuJoCo tasks. AntMaze: expectile 0.9, beta from 8 to 14, reward r-1."""

    hidden: Widths = (256, 256)
    """Widths of the hidden layers of all networks."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    tau: Fraction = 0.005
    """q_lagged <- q_lagged + tau (q - q_lagged) after each update."""
    expectile: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Which expectile of Q over the data's actions is V."""
    beta_min: NonNegative = 1.0
    """Smallest inverse temperature of the weights exp(beta A)."""
    beta_max: NonNegative = 5.0
    """Largest one; equal to beta_min it leaves IQL at that beta."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate of the universal policy."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics."""
    v_lr: Positive = 3e-4
    """Adam's learning rate of V."""
    balance_lr: Positive = 3e-4
    """Adam's learning rate of the balance policy and of its temperature."""
    target_entropy: float = -0.5
    """Of the balance policy, in nats of its draw in (-1, 1)."""
    temperature: Positive = 1.0
    """Initial weight of the balance policy's entropy, which then holds it at target_entropy."""
    reward: RewardName = "return-range"
    """Reward transform: none, return-range, standardise, or a formula like r-1 (see docs/data.md)."""
    data_share: Fraction | None = None
    """Online: part of each batch that comes from the dataset; null draws from dataset and replay as from one table."""


class FamO2OIQL(OfflineLearner):
    """Expectile value network, twin critics, universal policy pi(a | s, beta), balance policy over beta."""

    Config = FamO2OIQLConfig
    cfg: FamO2OIQLConfig

    def __init__(self, spec: Spec, cfg: FamO2OIQLConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c, gain = self.cfg, 2**0.5
        if c.beta_min > c.beta_max:
            raise ValueError(f"beta goes from beta_min={c.beta_min} to beta_max={c.beta_max}: the second is smaller")
        self.pi = GaussianPolicy(
            spec.obs_dim + ENCODING_DIM,
            spec.act_dim,
            c.hidden,
            "relu",
            orthogonal=gain,
            tanh_mean=True,
            log_std_bounds=(-5.0, 2.0),
        )
        self.balance = GaussianPolicy(spec.obs_dim, 1, c.hidden, "relu", orthogonal=gain, log_std_bounds=(-10.0, 2.0))
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.hidden, num=2, orthogonal=gain)
        self.v = ValueNet(spec.obs_dim, c.hidden, orthogonal=gain)
        self.q_lagged = frozen_copy(self.q)
        self.log_temperature = nn.Parameter(torch.tensor(c.temperature).log())
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_balance = adam(self.balance.parameters(), c.balance_lr)
        self.opt_temperature = adam([self.log_temperature], c.balance_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)
        self.opt_v = adam(self.v.parameters(), c.v_lr)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """At the balance policy's deterministic beta: the universal policy's mean, or a draw clipped to the range."""
        obs = self.obs_norm(obs)
        pi = self.universal(obs, self.span(self.balanced(obs).mode))
        return (pi.sample(generator=self.rng["action"]).clamp(-1, 1) if explore else pi.mode), {}

    def act_by(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The draw of `act` that `noise` decides."""
        obs = self.obs_norm(obs)
        return self.universal(obs, self.span(self.balanced(obs).mode)).sample(noise).clamp(-1, 1)

    def universal(self, obs: Tensor, beta: Tensor) -> Normal:
        """pi(a | s, beta) of `obs` [B, O], z-scored, and `beta` [B]."""
        return self.pi(conditioned(obs, beta))

    def balanced(self, obs: Tensor) -> TanhNormal:
        """The balance policy at `obs` [B, O]: a distribution over x [B, 1] in (-1, 1)."""
        raw = self.balance(obs)
        return TanhNormal(raw.mean, raw.log_std)

    def span(self, x: Tensor) -> Tensor:
        """beta [B] in [beta_min, beta_max] of a draw x [B, 1] of the balance policy."""
        return spanned(x.squeeze(-1), self.cfg.beta_min, self.cfg.beta_max)

    @torch.no_grad()
    def q_data(self, b: Batch) -> Tensor:
        """min_j Q_lagged_j(s, a) of the data's actions, [B]: what V regresses to and the policy is weighted by."""
        return self.q_lagged(b.obs, b.action).amin(0)

    def value_loss(self, b: Batch, q: Tensor, log: Metrics | None = None) -> Tensor:
        """E[|expectile - 1[u < 0]| u^2],  u = q - V(s), with `q` [B] from `q_data`."""
        v = self.v(b.obs)
        note(log, "value/v", v)
        return expectile_loss(q - v, self.cfg.expectile)

    def balance_loss(
        self, b: Batch, x: Tensor, logp: Tensor, noise: Tensor | None = None, log: Metrics | None = None
    ) -> Tensor:
        """E[temperature log pi_b(x|s) - min_j Q_lagged_j(s, a)],  a ~ pi(. | s, beta(x)) with a pathwise gradient.

        `x` [B, 1] with `logp` [B] is a reparameterised draw of the balance policy; its parameters alone are to move.
        """
        action = self.universal(b.obs, self.span(x)).sample(noise, self.rng["sample"])
        q = self.q_lagged(b.obs, action).amin(0)
        note(log, "value/q_pi", q)
        return (self.log_temperature.detach().exp() * logp - q).mean()

    def temperature_loss(self, logp: Tensor) -> Tensor:
        """temperature E[-log pi_b - target entropy]: it rises while the entropy is below its target."""
        return self.log_temperature.exp() * (-logp.detach() - self.cfg.target_entropy).mean()

    def actor_loss(self, b: Batch, q: Tensor, beta: Tensor, log: Metrics | None = None) -> Tensor:
        """-E[min(exp(beta (q - V(s))), 100) log pi(a | s, beta)]: one `beta` [B] in the weight and in the policy."""
        with torch.no_grad():
            weight = awr_weight(q - self.v(b.obs), beta)
        note(log, "value/capped_share", weight >= MAX_WEIGHT)
        return -(weight * self.universal(b.obs, beta.detach()).log_prob(b.action)).mean()

    def critic_loss(self, b: Batch, log: Metrics | None = None) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2],  y = r + gamma (1 - terminated) V(s')."""
        with torch.no_grad():
            backup = b.reward + self.cfg.gamma * self.v(b.next_obs) * ~b.terminated
        q = self.q(b.obs, b.action)
        note(log, "value/q", q)
        return (q - backup).square().mean(-1).sum()

    def update(self, b: Batch) -> Metrics:
        """V, balance policy, its temperature, universal policy, critics, lagged critics.

        Its beta is drawn uniformly while there is data alone, and by the balance policy (as it was before its step)
        once there are environment steps.
        """
        c, b, rng = self.cfg, self.seen(b), self.rng["sample"]
        self.counters["updates"] += 1
        q = self.q_data(b)
        metrics: Metrics = {}
        metrics["losses/value"] = minimize(self.value_loss(b, q, metrics), self.opt_v)
        x, logp = self.balanced(b.obs).sample_log_prob(generator=rng)
        chosen = self.span(x.detach())
        metrics["losses/balance"] = minimize(self.balance_loss(b, x, logp, log=metrics), self.opt_balance)
        minimize(self.temperature_loss(logp), self.opt_temperature)
        online = self.counters["env_steps"] > 0
        beta = chosen if online else uniform(b.reward, c.beta_min, c.beta_max, rng)
        metrics["losses/actor"] = minimize(self.actor_loss(b, q, beta, metrics), self.opt_pi)
        metrics["losses/critic"] = minimize(self.critic_loss(b, metrics), self.opt_q)
        polyak(self.q, self.q_lagged, c.tau)
        return metrics | {
            "policy/beta": chosen.mean(),
            "policy/balance_entropy": -logp.detach().mean(),
            "policy/temperature": self.log_temperature.detach().exp(),
        }
