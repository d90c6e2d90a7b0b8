"""Conservative Q-learning: soft actor-critic whose critics are pushed down on every action but the data's.

Source: Kumar et al. 2020, arXiv:2006.04779, eq. 4 and appendix F; official code github.com/aviralkumar2907/CQL.
Differs: the official code clones for the first 40,000 updates, however long the run is; ours for the share of it that
these are of its 3,000,000 (`bc_share`). `lagrange_form=scaled`, `simultaneous`, `gap_floor` and `backup=min-max` are
those of the re-implementations JaxCQL and CORL, which start the multiplier at e; it starts at 1 here, as officially.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rlctl.agents.offline_learner import OfflineLearner, note
from rlctl.agents.sac import SACSettings
from rlctl.nets import QEnsemble, TanhGaussianPolicy, TanhNormal
from rlctl.ops import adam, apply_gradients, frozen_copy, gradients, minimize, polyak
from rlctl.ops.offline import SampledBackup, conservative_gap, sampled_backup
from rlctl.train import OfflineRLConfig
from rlctl.types import Batch, Count, Fraction, Metrics, NonNegative, Positive, Spec, Widths


@dataclass(frozen=True)
class CQLConfig(OfflineRLConfig, SACSettings):
    """Defaults: those of the authors' code for MuJoCo tasks (AntMaze: lagrange_gap 5, backup max-min,
    reward 4r-2)."""

    steps: Count = 3_000_000
    """Gradient steps."""
    cql_weight: NonNegative = 5.0
    """Weight of the conservative term (5 or 10; Adroit 1); 0 is soft actor-critic."""
    penalty: Literal["importance", "plain"] = "importance"
    """The log-sum of Q less log-densities at drawn actions, or of Q alone at drawn actions and the data's."""
    num_actions: Count = 10
    """Actions drawn from each of: the box, the policy at s, the policy at s'."""
    temperature: Positive = 1.0
    """Of the log-sum-exp, in units of value."""
    gap_floor: float | None = None
    """Lower bound of a sample's conservative gap, before the mean over the batch (-200 for AntMaze in CORL)."""
    lagrange_gap: float | None = None
    """Learn a multiplier that holds the conservative gap at this value; None keeps cql_weight alone."""
    lagrange_form: Literal["official", "scaled"] = "official"
    """Multiplier times (cql_weight * C - gap), or times cql_weight * (C - gap)."""
    backup: Literal["one"] | SampledBackup = "one"
    """Successor action: one draw, or the best of num_actions by each critic (max-min) or by the smallest (min-max)."""
    entropy_backup: bool = False
    """Count the successor's entropy in the backup."""
    bc_share: Fraction = 1 / 75
    """Share of the updates on the data in which the policy is first cloned (officially 40,000 of 3,000,000)."""
    simultaneous: bool = False
    """Step all parameters at the end, so that every loss sees those of before the update."""
    hidden: Widths = (256, 256, 256)
    """Widths of the hidden layers of the policy."""
    critic_hidden: Widths | None = None
    """Widths of the hidden layers of the critics; null takes those of the policy."""
    layer_norm: bool = False
    """LayerNorm before each activation of the critics."""
    actor_lr: Positive = 1e-4
    """Adam's learning rate of the policy."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics and of the multiplier."""
    alpha_lr: Positive = 1e-4
    """Adam's learning rate of log alpha."""


class CQL(OfflineLearner):
    """Conservative critics, squashed-Gaussian actor, automatic temperature, optional Lagrange multiplier."""

    Config = CQLConfig
    cfg: CQLConfig

    def __init__(self, spec: Spec, cfg: CQLConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        # kept in checkpoints: a longer resumed run does not clone once more
        self.counters["cloning"] = round(c.bc_share * c.updates_on_data)
        if c.backup != "one" and c.entropy_backup:
            raise ValueError(f"backup={c.backup} has no entropy term: set entropy_backup=false with it")
        if c.lagrange_gap is not None and c.cql_weight == 0:
            raise ValueError("a Lagrange multiplier of a conservative term of weight 0: set cql_weight above 0")
        self.pi = self.make_policy()
        self.q = self.make_critics()
        self.q_lagged = frozen_copy(self.q)
        self.log_alpha = nn.Parameter(torch.tensor(c.alpha).log(), requires_grad=c.learn_alpha)
        self.target_entropy = -float(spec.act_dim) if c.target_entropy is None else c.target_entropy
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)
        if c.learn_alpha:
            self.opt_alpha = adam([self.log_alpha], c.alpha_lr)
        if c.lagrange_gap is not None:
            self.log_multiplier = nn.Parameter(torch.zeros(()))
            self.opt_multiplier = adam([self.log_multiplier], c.critic_lr)

    def make_policy(self) -> TanhGaussianPolicy:
        """The policy, for a variant that conditions it on more than the observation."""
        return TanhGaussianPolicy(self.spec.obs_dim, self.spec.act_dim, self.cfg.hidden)

    def make_critics(self) -> QEnsemble:
        """The twin critics, for a variant that builds others."""
        c = self.cfg
        hidden = c.hidden if c.critic_hidden is None else c.critic_hidden
        return QEnsemble(self.spec.obs_dim, self.spec.act_dim, hidden, num=2, layer_norm=c.layer_norm)

    def here(self, b: Batch) -> TanhNormal:
        """The policy's distribution at s."""
        return self.pi(b.obs)

    def following(self, b: Batch) -> TanhNormal:
        """The policy's distribution at s'."""
        return self.pi(b.next_obs)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """A draw of the squashed Gaussian, or tanh of its mean."""
        pi = self.pi(self.obs_norm(obs))
        return (pi.sample(generator=self.rng["action"]) if explore else pi.mode), {}

    @torch.no_grad()
    def backup_of(self, b: Batch, noise: Tensor | None = None) -> Tensor:
        """y = r + gamma (1 - terminated) V(s'), [B], V = min_j Q_lagged_j(s', a'), with entropy_backup - alpha log pi.

        `noise` is [B, A], or [K, B, A] for the best of K actions.
        """
        c, pi = self.cfg, self.following(b)
        if c.backup == "one":
            action, logp = pi.sample_log_prob(noise, self.rng["sample"])
            v = self.q_lagged(b.next_obs, action).amin(0)
            v = v - self.log_alpha.exp() * logp if c.entropy_backup else v
        else:
            action = pi.spread(c.num_actions).sample(noise, self.rng["sample"]).movedim(0, 1)
            v = sampled_backup(self.q_lagged(b.next_obs, action), c.backup)
        return b.reward + c.gamma * v * ~b.terminated

    def critic_loss(self, b: Batch, q: Tensor, noise: Tensor | None = None) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2], with `q` [E, B] the critics at the data's actions."""
        return (q - self.backup_of(b, noise)).square().mean(-1).sum()

    @torch.no_grad()
    def candidates(self, b: Batch, noise: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Actions [B, 3n, A] to push down at s: n of the box, of pi(s'), of pi(s); and their log-densities [B, 3n].

        `noise`: uniform on [0, 1), normal, normal, each [n, B, A]. Proposals: s' serves also where the episode ended.
        """
        n, rng, like = self.cfg.num_actions, self.rng["sample"], b.action.expand(self.cfg.num_actions, *b.action.shape)
        uniform, at_next, at_obs = noise or (None, None, None)
        if uniform is None:
            uniform = torch.rand(like.shape, generator=rng, dtype=like.dtype, device=like.device)
        box = like.new_full(like.shape[:-1], -self.spec.act_dim * math.log(2))
        following, logp_following = self.following(b).spread(n).sample_log_prob(at_next, rng)
        here, logp_here = self.here(b).spread(n).sample_log_prob(at_obs, rng)
        actions = torch.cat([2 * uniform - 1, following, here]).movedim(0, 1)
        return actions, torch.cat([box, logp_following, logp_here]).movedim(0, 1)

    def drawn_values(self, b: Batch, actions: Tensor) -> Tensor:
        """Values [E, B, 3n] of the drawn `actions` [B, 3n, A], in the order of `candidates`."""
        return self.q(b.obs, actions)

    def gap(self, b: Batch, q: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
        """C_j = E[T log sum_k exp((Q_j(s, a_k) - log mu(a_k)) / T) - Q_j(s, a)] of each critic, [E].

        Gradients flow through the critics alone, never through the drawn actions or their densities.
        """
        c = self.cfg
        actions, density = self.candidates(b, noise)
        drawn = self.drawn_values(b, actions)
        if c.penalty == "plain":
            drawn, density = torch.cat([drawn, q.unsqueeze(-1)], -1), density.new_zeros(())
        return conservative_gap(drawn, q, density, c.temperature, c.gap_floor).mean(-1)

    def conservative_loss(self, gap: Tensor) -> Tensor:
        """sum_j w C_j; with a multiplier m: sum_j m (w C_j - gap), or m w (C_j - gap) in the scaled form."""
        c = self.cfg
        if c.lagrange_gap is None:
            return c.cql_weight * gap.sum()
        target = c.lagrange_gap if c.lagrange_form == "official" else c.cql_weight * c.lagrange_gap
        return (self.log_multiplier.exp().clamp(max=1e6) * (c.cql_weight * gap - target)).sum()

    def multiplier_loss(self, gap: Tensor) -> Tensor:
        """Minus the mean over critics of their conservative losses: the multiplier rises while they are positive."""
        return -self.conservative_loss(gap.detach()) / len(gap)

    def actor_loss(self, b: Batch, action: Tensor, logp: Tensor, log: Metrics | None = None) -> Tensor:
        """E[alpha log pi(a|s) - min_j Q_j(s, a)] at a reparameterised draw `action` [B, A] with `logp` [B]."""
        q = self.q(b.obs, action).amin(0)
        note(log, "value/q_pi", q)
        return (self.log_alpha.detach().exp() * logp - q).mean()

    def cloning_loss(self, b: Batch, logp: Tensor) -> Tensor:
        """E[alpha log pi(a|s) - log pi(a_data|s)], data actions clipped to +-(1 - 1e-5): the policy's warm start."""
        return (self.log_alpha.detach().exp() * logp - self.here(b).log_prob(b.action, eps=1e-5)).mean()

    def alpha_loss(self, logp: Tensor) -> Tensor:
        """-E[log alpha (log pi + target entropy)]: alpha rises while the entropy is below its target."""
        return -(self.log_alpha * (logp.detach() + self.target_entropy)).mean()

    def update(self, b: Batch) -> Metrics:
        """Temperature, multiplier, critics, actor, lagged critics.

        The critics' loss takes the multiplier as it was before its step, the actor's the critics before theirs.
        """
        c, b = self.cfg, self.seen(b)
        self.counters["updates"] += 1
        later: list[tuple[torch.optim.Optimizer, Sequence[Tensor | None]]] = []

        def step(loss: Tensor, opt: torch.optim.Optimizer) -> None:
            if c.simultaneous:
                later.append((opt, gradients(loss, opt)))
            else:
                minimize(loss, opt)

        action, logp = self.here(b).sample_log_prob(generator=self.rng["sample"])
        if c.learn_alpha:
            step(self.alpha_loss(logp), self.opt_alpha)
        clone = self.counters["updates"] <= self.counters["cloning"]
        metrics: Metrics = {}
        actor_loss = self.cloning_loss(b, logp) if clone else self.actor_loss(b, action, logp, metrics)
        later.append((self.opt_pi, gradients(actor_loss, self.opt_pi)))
        q = self.q(b.obs, b.action)
        critic_loss = self.critic_loss(b, q)
        metrics |= {"losses/critic": critic_loss.detach(), "losses/actor": actor_loss.detach()}
        note(metrics, "value/q", q)
        if c.cql_weight > 0:
            gap = self.gap(b, q)
            critic_loss = critic_loss + self.conservative_loss(gap)  # by the multiplier of before its step
            if c.lagrange_gap is not None:
                metrics["value/multiplier"] = self.log_multiplier.detach().exp().clamp(max=1e6)
                step(self.multiplier_loss(gap), self.opt_multiplier)
            metrics["losses/conservative_gap"] = gap.detach().mean()
        step(critic_loss, self.opt_q)
        for opt, grads in later:
            apply_gradients(opt, grads)
        polyak(self.q, self.q_lagged, c.tau)
        return metrics | {"policy/entropy": -logp.detach().mean(), "policy/alpha": self.log_alpha.detach().exp()}
