"""Policy-agnostic RL: whatever the policy, it learns by imitation, of actions that the critics have improved.

Source: Sobol Mark et al. 2024, arXiv:2412.06685 (action optimisation, global and local; distillation), with the critic
of its Cal-QL variant (arXiv:2303.05479); official code github.com/MaxSobolMark/PolicyAgnosticRL.
Differs: critics regress numbers (officially histograms over [-100, 0]). Critic and policy learn from the same batch, so
one `data_share` serves both (officially half of the critic's rows are the dataset's, and of the policy's as many as
there are). Both searches go by the critics as they are, as in the official code, not by the lagged ones, by which the
local search is sometimes written. Learning goes step by step, not by episodes. Candidates are of the average of the
base policy over updates. No dropout, no warm-up of learning rates. The deterministic action searches from fixed noise;
the last layer of a critic is uniform where it is orthogonal officially, at the same scale. Three defaults know the
scale of values, and the official ones are for values down to -100: `search_size` and `search_steps` (an action moves by
at most steps times size times slope), `temperature` (a choice by exp(Q / temperature)). With values within [0, 1] they
move next to nothing and prefer little; 0.05, 3 and 0.1 do there. With `distill_offline` off, as officially, the policy
imitates no improved action before it has met its environment: on data alone act by the search, or switch it on. The
official sampler (cosine, 5 steps, variance beta, clipped states) leaves 15% of the draws of even a perfect network
between four modes, and its first step multiplies the network's error by 32; vp with 10 steps, posterior and x0 leaves
4%.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from rlctl.agents.offline_learner import OfflineLearner
from rlctl.data.columns import column
from rlctl.data.dataset import Dataset
from rlctl.nets import (
    EMA,
    DiffusionPolicy,
    FlowPolicy,
    Policy,
    QEnsemble,
    TanhGaussianPolicy,
    field_net,
    require,
)
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.ops.diffusion import Schedule, Variance
from rlctl.ops.ensemble import check, random_subset
from rlctl.ops.offline import conservative_gap
from rlctl.ops.selection import best_of, climbed, drawn, top
from rlctl.train import OfflineRLConfig
from rlctl.types import Batch, Count, Exportable, Fraction, Metrics, NonNegative, Positive, Spec, Widths

BOUND = 1 - 1e-5
"""Actions to imitate lie within +-BOUND: at 1 a squashed Gaussian has no density."""


@dataclass(frozen=True)
class PARLConfig(OfflineRLConfig):
    """Defaults: those of the official runs on AntMaze and Kitchen. They ask for a GPU; base_net mlp, fewer candidates
    and critics fit a CPU."""

    base: Literal["diffusion", "flow", "gaussian"] = "diffusion"
    """Kind of the policy."""
    base_net: Literal["resnet", "mlp"] = "resnet"
    """Network of a diffusion or flow: residual blocks with layer norm, or a plain MLP (about 20 times cheaper)."""
    base_hidden: Widths = (256, 256, 256)
    """Its widths, or those of the Gaussian; residual blocks are all of one width, as many as there are numbers."""
    base_steps: Count = 5
    """Denoising or integration steps of a draw."""
    schedule: Schedule = "cosine"
    """How the noise of a diffusion grows over its steps: vp, cosine or linear."""
    variance: Variance = "beta"
    """Noise of its steps: of the posterior's variance, or of beta."""
    clip_at: Literal["x0", "step"] = "step"
    """Where it is clipped to [-1, 1]: in the denoised estimate of each step (x0), or in the state after it (step)."""
    base_lr: Positive = 3e-4
    """Adam's learning rate of the policy while it is cloned from the data."""
    distill_lr: Positive = 5e-5
    """The same while it imitates improved actions."""
    ema_decay: Fraction = 0.998
    """Share that the average of the policy, from which candidates are drawn, keeps at each of its updates."""
    ema_start: Annotated[int, Field(ge=0)] = 1000
    """Update from which it is an average; before, a copy."""
    bc_share: Fraction = 0.75
    """Share of the updates on the data in which the policy alone learns, by cloning the data."""
    distill_offline: bool = False
    """Imitate improved actions from then on; off, the policy stays a clone until the first environment step, and only
    the search improves its actions."""
    num_candidates: Count = 32
    """k: draws of the policy, the global search."""
    num_kept: Count = 10
    """m: how many of them, the best, go on."""
    search_steps: Annotated[int, Field(ge=0)] = 10
    """T: gradient steps of the local search from each of them; 0: none."""
    search_size: Positive = 3e-4
    """eta: an action moves by this times the gradient of the critics' mean, so it goes with the scale of values: 3e-4
    for values down to -100, 0.05 for values in [0, 1]."""
    data_candidate: bool = True
    """To imitate, the action of the data takes the place of the worst of the m."""
    temperature: Positive = 1.0
    """One of the m is imitated, drawn by exp(Q / temperature): in units of value, 0.1 for values in [0, 1]."""
    distill_argmax: bool = False
    """Imitate the best of the m instead."""
    hidden: Widths = (256, 256)
    """Widths of the hidden layers of the critics."""
    num_critics: Count = 10
    """Critics in the ensemble; their mean chooses and improves actions."""
    backup_critics: Count = 2
    """Critics drawn at random of which the smallest counts in the backup."""
    layer_norm: bool = True
    """LayerNorm in the critics."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    tau: Fraction = 0.005
    """q_lagged <- q_lagged + tau (q - q_lagged) after each update of the critics."""
    cql_weight: NonNegative = 0.005
    """Weight of the conservative term; 0: none."""
    num_actions: Count = 10
    """Actions it draws from the box; as often it counts the optimised action of s and that of s'."""
    calibrate: bool = True
    """Floor the values of the optimised actions in it by the data's return-to-go."""


class Choices(NamedTuple):
    """Improved actions [B, m, A] of each state, those of the best draws first, and their values [B, m]."""

    actions: Tensor
    values: Tensor


class PARL(OfflineLearner):
    """Any policy that can be sampled and fitted to actions, an ensemble of critics, a search between them."""

    Config = PARLConfig
    cfg: PARLConfig
    bank: Tensor
    log_copies: Tensor

    def __init__(self, spec: Spec, cfg: PARLConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        # kept in checkpoints: a longer resumed run does not clone once more
        self.counters["cloning"] = round(c.bc_share * c.updates_on_data)
        check(c.num_critics, c.backup_critics)
        if c.num_kept > c.num_candidates:
            raise ValueError(f"num_kept={c.num_kept} of {c.num_candidates} candidates: keep at most num_candidates")
        base = self.make_base()
        require(base, "sample", "matching_loss", "mode", by="PA-RL")
        self.base = EMA(base, c.ema_decay, 1, c.ema_start)
        dims = spec.obs_dim, spec.act_dim
        # the scale of the official last layer, of which each row is a vector of length 0.01
        self.q = QEnsemble(*dims, c.hidden, num=c.num_critics, layer_norm=c.layer_norm, last_variance=1e-4)
        self.q_lagged = frozen_copy(self.q)
        self.opt_base = adam(base.parameters(), c.base_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)
        if base.noise_shape is None:
            raise TypeError(f"PA-RL acts from fixed noise, and {type(base).__name__} draws by more than noise")
        self.register_buffer("bank", torch.randn(c.num_candidates, *base.noise_shape))
        self.bank[0] = 0.0
        # minus log of how often each action counts: those of the box, of s', of s, of the data
        often = [1] * c.num_actions + [c.num_actions] * 2 + [1]
        self.register_buffer("log_copies", torch.tensor([-math.log(n) for n in often]), persistent=False)

    def make_base(self) -> Policy:
        """The policy as configured; a subclass may give any that has `sample`, `mode` and `matching_loss`."""
        c, obs_dim, act_dim = self.cfg, self.spec.obs_dim, self.spec.act_dim
        if c.base == "gaussian":
            return TanhGaussianPolicy(obs_dim, act_dim, c.base_hidden, log_std_bounds=(-5.0, 2.0))
        net = field_net(c.base_net, c.base, obs_dim, act_dim, c.base_hidden)
        if c.base == "flow":
            return FlowPolicy(obs_dim, act_dim, steps=c.base_steps, net=net)
        return DiffusionPolicy(
            obs_dim,
            act_dim,
            schedule=c.schedule,
            steps=c.base_steps,
            variance=c.variance,
            clip_at=c.clip_at,
            net=net,
        )

    def prepare(self, data: Dataset) -> None:
        """Take the dataset's observation statistics, what the reward transform needs, and the returns-to-go."""
        c = self.cfg
        super().prepare(data)
        if c.cql_weight and c.calibrate:
            data.require("mc_return", gamma=c.gamma, reward=self.reward)

    # --------------------------------------------------------------------------------------------- optimised actions
    def value(self, obs: Tensor, action: Tensor) -> Tensor:
        """mean_j Q_j(s, a), [..., N], of `action` [..., N, A]: what both searches maximise."""
        return self.q(obs, action).mean(0)

    @torch.no_grad()
    def optimized(
        self,
        obs: Tensor,
        data: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Choices:
        """The m best of k draws at `obs` [B, O], each after local search; `data` [B, A] goes along as one more, last.

        `noise` is that of the draws, [B, k, *noise_shape].
        """
        c = self.cfg
        actions = self.base.candidates(obs, c.num_candidates, noise, generator)
        kept = top(actions, self.value(obs, actions), c.num_kept)
        if data is not None:
            kept = torch.cat([kept, data.unsqueeze(-2)], -2)
        start = kept.clamp(-BOUND, BOUND)
        return Choices(*climbed(partial(self.value, obs), start, c.search_steps, c.search_size, BOUND))

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The best of the optimised actions, the draws being fresh or those of fixed noise."""
        seen = self.obs_norm(obs)
        noise = None if explore else self.bank.expand(*obs.shape[:-1], *self.bank.shape)
        return best_of(*self.optimized(seen, noise=noise, generator=self.rng["action"])), {}

    def exportable(self, sampled: bool = False) -> Exportable:
        """As of all agents, the gradients of the search written out: `torch.export` does not follow autograd."""
        found = super().exportable(sampled)
        if not self.cfg.search_steps:
            return found
        from rlctl.export import Unrolled  # it knows experiments, which know all agents

        return found._replace(module=Unrolled(found.module, found.inputs))

    def to_imitate(self, found: Choices, uniform: Tensor | None = None) -> Tensor:
        """One action [B, A] of `found` [B, m + 1, A], the data's last: of m, by exp(Q / temperature) or the best.

        The m are those of the draws, or with `data_candidate` all but the worst of these and that of the data.
        """
        c, m = self.cfg, self.cfg.num_kept
        actions, values = found.actions[..., :m, :], found.values[..., :m]
        if c.data_candidate:
            actions = torch.cat([actions[..., :-1, :], found.actions[..., m:, :]], -2)
            values = torch.cat([values[..., :-1], found.values[..., m:]], -1)
        if c.distill_argmax:
            return best_of(actions, values)
        return drawn(actions, (values / c.temperature).softmax(-1), uniform, self.rng["sample"])

    # -------------------------------------------------------------------------------------------------------- losses
    def base_loss(self, obs: Tensor, action: Tensor, noise: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """E of the policy's own matching loss at `action` [B, A]: of the data, or improved."""
        return self.base.matching_loss(obs, action, noise, time, self.rng["sample"]).mean()

    def critic_loss(self, b: Batch, q: Tensor, next_action: Tensor) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2],  y = r + gamma (1 - terminated) min_{i in S} Q_lagged_i(s', a').

        `q` [E, B] are the critics at the data's actions, a' `next_action` [B, A] is optimised, S a random few critics.
        """
        with torch.no_grad():
            few = random_subset(self.cfg.num_critics, self.cfg.backup_critics, b.obs.device, self.rng["sample"])
            v_next = self.q_lagged(b.next_obs, next_action, few).amin(0)
            backup = b.reward + self.cfg.gamma * v_next * ~b.terminated
        return (q - backup).square().mean(-1).sum()

    def gap(self, b: Batch, q: Tensor, next_action: Tensor, action: Tensor, uniform: Tensor | None = None) -> Tensor:
        """sum_j E[log sum_k exp Q_j(s, a_k) - Q_j(s, a)]: how much higher other actions are held than the data's.

        a_k: n of the box, n times each the optimised actions of s' and of s [B, A], the data's. `uniform` in [0, 1) is
        [B, n, A].
        """
        c = self.cfg
        if uniform is None:
            shape = (len(b.action), c.num_actions, self.spec.act_dim)
            like = {"dtype": b.action.dtype, "device": b.action.device}
            uniform = torch.rand(shape, generator=self.rng["sample"], **like)  # type: ignore[call-overload]
        others = torch.cat([2 * uniform - 1, next_action.unsqueeze(-2), action.unsqueeze(-2)], -2)
        values = self.q(b.obs, others)
        if c.calibrate:
            floor = column(b, "mc_return").unsqueeze(-1)
            values = torch.cat([values[..., :-2], torch.maximum(values[..., -2:], floor)], -1)
        return conservative_gap(torch.cat([values, q.unsqueeze(-1)], -1), q, self.log_copies).mean(-1).sum()

    # -------------------------------------------------------------------------------------------------------- update
    def base_step(self, obs: Tensor, action: Tensor, lr: float) -> Tensor:
        """One step of imitation of `action` [B, A], then the policy's average moves; the loss."""
        self.opt_base.param_groups[0]["lr"] = lr
        loss = minimize(self.base_loss(obs, action.clamp(-BOUND, BOUND)), self.opt_base)
        self.base.update(self.counters["updates"])
        return loss

    def update(self, b: Batch) -> Metrics:
        """At first cloning alone. Then critics by the optimised actions, the policy by those too, lagged critics."""
        c, b = self.cfg, self.seen(b)
        self.counters["updates"] += 1
        if self.counters["updates"] <= self.counters["cloning"]:
            return {"losses/base": self.base_step(b.obs, b.action, c.base_lr)}
        rng, distill = self.rng["sample"], c.distill_offline or self.counters["env_steps"] > 0
        following = best_of(*self.optimized(b.next_obs, generator=rng))
        here = self.optimized(b.obs, b.action, generator=rng) if distill or c.cql_weight else None
        q = self.q(b.obs, b.action)
        loss = self.critic_loss(b, q, following)
        metrics = {"losses/critic": loss.detach()}
        if c.cql_weight:
            assert here is not None
            best = best_of(here.actions[..., : c.num_kept, :], here.values[..., : c.num_kept])
            gap = self.gap(b, q, following, best)
            loss = loss + c.cql_weight * gap
            metrics["losses/conservative_gap"] = gap.detach() / c.num_critics
        minimize(loss, self.opt_q)
        if distill:
            assert here is not None
            metrics["losses/base"] = self.base_step(b.obs, self.to_imitate(here), c.distill_lr)
        polyak(self.q, self.q_lagged, c.tau)
        return metrics
