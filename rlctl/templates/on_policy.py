"""my-algo: a policy gradient with generalised advantages, learning from each rollout once. Make it yours.

Source: Mnih et al. 2016, arXiv:1602.01783 (advantage actor-critic), with the advantages of arXiv:1506.02438.
Differs: the rollout is worked through in minibatches, Adam instead of RMSProp, no entropy bonus.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlctl.agents.actor_critic import ActorCriticConfig, Rows, explained_variance, rows_of, standardized
from rlctl.conformance import Traits
from rlctl.nets import GaussianPolicy, ObsNorm, RewardScale, ValueNet
from rlctl.ops import adam, mean_of, minibatches, minimize
from rlctl.types import Agent, Batch, Count, Metrics, NonNegative, Positive, Spec


@dataclass(frozen=True)
class MyAlgoConfig(ActorCriticConfig):
    """The string after each field is what `rlctl config my-algo` shows."""

    minibatch_size: Count = 256
    """Transitions per gradient step; must divide num_envs * horizon."""
    lr: Positive = 3e-4
    """Adam's learning rate."""
    vf_coef: NonNegative = 0.5
    """Weight of the squared value error."""
    max_grad_norm: Positive = 0.5
    """The gradient of one step is rescaled to at most this L2 norm."""


class MyAlgo(Agent):
    """Networks, normalisers and optimisers are attributes: they are found, saved and resumed by themselves."""

    regime = "on_policy"
    Config = MyAlgoConfig
    cfg: MyAlgoConfig
    # with which settings `rlctl check algo` sees it solve the probe environments
    conformance = Traits(solve={"steps": 8 * 16 * 250, "log_std": -1.0, "minibatch_size": 32})

    def __init__(self, spec: Spec, cfg: MyAlgoConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        size = spec.num_envs * c.horizon
        if size % c.minibatch_size:
            raise ValueError(f"minibatch_size={c.minibatch_size} does not divide a rollout of {size} transitions")
        self.obs_norm = ObsNorm(spec.obs_dim, enabled=c.normalize_obs)
        self.reward_scale = RewardScale(spec.num_envs, c.gamma, enabled=c.normalize_reward)
        self.pi = GaussianPolicy(spec.obs_dim, spec.act_dim, c.hidden, c.activation, log_std=c.log_std)
        self.v = ValueNet(spec.obs_dim, c.hidden, c.activation, orthogonal=1.0)
        self.opt = adam([*self.pi.parameters(), *self.v.parameters()], c.lr)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The Gaussian action for observations [N, O]; it is clipped later. Random numbers are of `self.rng`."""
        pi = self.pi(self.obs_norm(obs))
        return (pi.sample(generator=self.rng["action"]) if explore else pi.mode), {}

    def policy_loss(self, m: Rows) -> Tensor:
        """-E[A log pi(a|s)] over a minibatch [B], advantages standardised."""
        return -(standardized(m.adv) * self.pi(m.obs).log_prob(m.action)).mean()

    def value_loss(self, m: Rows) -> Tensor:
        """E[(V(s) - R)^2] over a minibatch [B]; R is the lambda-return."""
        return (self.v(m.obs) - m.ret).square().mean()

    def update(self, batch: Batch) -> Metrics:
        """One pass over a rollout [T, N], then the normalisers move. Nothing may read a tensor on the host."""
        c = self.cfg
        self.counters["updates"] += 1
        rows = rows_of(batch, self.pi, self.v, self.obs_norm, self.reward_scale, c.gamma, c.lam)
        log: list[Metrics] = []
        for m in minibatches(rows, c.minibatch_size, self.rng["sample"]):
            policy_loss, value_loss = self.policy_loss(m), self.value_loss(m)
            minimize(policy_loss + c.vf_coef * value_loss, self.opt, c.max_grad_norm)
            log.append({"losses/policy": policy_loss.detach(), "losses/value": value_loss.detach()})
        self.obs_norm.update(batch.obs)
        self.reward_scale.update(batch.reward, batch.terminated | batch.truncated)
        return mean_of(log) | self.pi.summary() | {"value/explained_variance": explained_variance(rows)}
