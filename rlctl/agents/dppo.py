"""Diffusion policy policy optimisation: PPO on the chain of denoising steps, each of which is a Gaussian policy of its
own. From scratch, or fine-tuning the last steps of a policy that was cloned from data.

Source: Ren et al. 2024, arXiv:2409.00588 (the two-layer decision process, the denoising discount, the clip that widens
along the chain); official code github.com/irom-princeton/dppo.
Differs: one action is executed at a time, so gamma and lambda are per environment step (the official fine-tuning
executes chunks of four). A truncation bootstraps from the value of the true successor (officially from that of the
reset observation). With a single trained step the clip is `clip` (officially 0 / 0). No early stop at a divergence
(officially 1), which would read a number on the host, no cloning term, no quantile bounds of advantages, constant
learning rates. The chain ends in the action before it is clipped to the box. The policy's network is the plain MLP of
`diffusion-bc`, so that its runs can be fine-tuned, and the value network a plain MLP too (officially both have residual
blocks). From scratch observations are standardised with running statistics,
which move after an update; a cloned policy keeps those of its data. The deterministic action is the mean of draws from
fixed noise (officially one draw without the floor under the noise, which is not deterministic). A chain of no noise at
all is none that PPO has seen: on Hopper the policy of one run returned 328 by it after 200k steps, 1391 by draws and
2600 by the mean of 8 or 32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from rlctl.agents.actor_critic import (
    Rows,
    check_minibatches,
    clipped_surrogate,
    explained_variance,
    rows_of,
    standardized,
    step_taken,
)
from rlctl.agents.diffusion_bc import DiffusionBC, DiffusionBCConfig
from rlctl.errors import UsageError
from rlctl.nets import DiffusionPolicy, GenerativePolicy, ObsNorm, RewardScale, ValueNet, require
from rlctl.nets.generative import Step
from rlctl.nets.normalizer import FixedNorm
from rlctl.ops import adam, frozen_copy, mean_of, minibatches, minimize
from rlctl.ops.diffusion import Prediction, Schedule
from rlctl.train import OnPolicyConfig
from rlctl.types import Agent, Batch, Count, Fraction, Metrics, Positive, RunFolder, Spec, Widths

LOG_PROB_RANGE = (-5.0, 2.0)
"""Log-densities of a step count within this range, per dimension, in nats."""
FROM_SCRATCH = DiffusionBCConfig(hidden=(512, 512, 512), schedule="cosine", diffusion_steps=10)
"""The policy where none is given, as in the paper's runs from scratch."""


@dataclass(frozen=True)
class DPPOConfig(OnPolicyConfig):
    """Defaults: those of the paper's Gym runs from scratch, which ask for a GPU. Its fine-tuning: finetune_steps 10 of
    20, clip 0.01, gamma_denoising 0.99, num_envs 40, minibatch_size 50000, 5 epochs, critic_warmup where V starts
    bad."""

    num_envs: Count = 10
    """Worlds stepped side by side."""
    horizon: Count = 1000
    """Steps of each world per rollout; one update learns from num_envs * horizon transitions."""
    pretrained: RunFolder = ""
    """Run directory of the `diffusion-bc` run to fine-tune; empty: from scratch. Also needed to load the run again:
    keep it."""
    checkpoint: str = "latest"
    """Which of its policies: latest, best (of the evaluations in training), or the STEP of one."""
    finetune_steps: Count | None = None
    """K': only the last K' denoising steps are trained, a frozen copy of the cloned policy makes the others; null: all
    are."""
    hidden: Widths | None = None
    """Widths of the hidden layers of the noise-prediction network (Mish); null: those of `pretrained`, else three times
    512."""
    diffusion_steps: Count | None = None
    """Levels of noise T; null: those of `pretrained`, else 10."""
    schedule: Schedule | None = None
    """How the noise grows over the levels: vp, cosine or linear; null: as in `pretrained`, else cosine."""
    prediction: Prediction | None = None
    """What the network predicts: eps, x0 or v; null: as in `pretrained`, else eps."""
    sampling_steps: Count | None = None
    """Denoising steps K, if fewer than levels (DDIM with eta 1); null: one for each level."""
    min_std: Positive = 0.1
    """Floor under the noise of every step, the last included: exploration, and the densities' smallest spread."""
    mode_draws: Count = 8
    """Draws from fixed noise (pairs of opposite sign, none in the last step), whose mean is the deterministic action,
    which suits a policy with one hump per state, as rewards make it; 1: that of zero noise in all steps."""
    noise_clip: Positive = 3.0
    """The noise of a step is cut to +- this many standard deviations."""
    clip: Positive = 0.1
    """epsilon of the last step; log-densities are means over dimensions, so it is smaller than that of PPO."""
    clip_base: Positive | None = None
    """epsilon of the first trained step, from which it grows exponentially to `clip`; null: the same in all steps."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    lam: Fraction = 0.95
    """lambda of the generalised advantage estimates."""
    gamma_denoising: Fraction = 1.0
    """Discount per denoising step: a step j before the last counts gamma_denoising^j."""
    epochs: Count = 10
    """Passes over each rollout."""
    minibatch_size: Count = 5000
    """Denoising steps per gradient step; must divide num_envs * horizon * K'."""
    actor_lr: Positive = 1e-4
    """Adam's learning rate of the policy."""
    critic_lr: Positive = 1e-3
    """Adam's learning rate of the value network."""
    critic_warmup: Annotated[int, Field(ge=0)] = 0
    """Updates in which the value network alone learns."""
    critic_hidden: Widths = (256, 256, 256)
    """Widths of the hidden layers of the value network (Mish)."""
    max_grad_norm: Positive | None = None
    """Gradients of policy and value network are rescaled to at most this L2 norm each; null for no bound."""
    normalize_advantage: bool = True
    """Standardise the advantages of each minibatch."""
    normalize_obs: bool = True
    """From scratch: standardise observations with running statistics (clipped to +-10)."""
    normalize_reward: bool = True
    """Divide rewards by the running spread of the discounted return (clipped to +-10)."""


class Pairs(NamedTuple):
    """Denoising steps of a rollout, int64 `[M]`: the transition they belong to, and which of its trained steps."""

    row: Tensor
    step: Tensor


class Links(NamedTuple):
    """Denoising steps as the losses see them, `[M, ...]`."""

    obs: Tensor
    """Normalised."""
    before: Tensor
    after: Tensor
    step: Tensor
    """0 is the first trained one, the noisiest."""
    logp_old: Tensor
    adv: Tensor
    ret: Tensor
    """Value target: lambda-return."""


@dataclass(frozen=True)
class Denoising:
    """The steps of a policy at `obs` [..., O]: what stands where PPO has a distribution, a chain being the action."""

    policy: GenerativePolicy
    obs: Tensor

    def step_log_prob(self, before: Tensor, after: Tensor, k: Step) -> Tensor:
        """Log-density of step `k` from `before` to `after` [..., A], [...]: a mean over (bounded) dimensions."""
        each = self.policy.transition(self.obs, before, k).log_prob(after, reduce=False)
        return each.clamp(*LOG_PROB_RANGE).mean(-1)

    def log_prob(self, chain: Tensor) -> Tensor:
        """That of each step of `chain` [..., K' + 1, A], which ends in the action, [..., K']."""
        last, num = self.policy.num_steps, chain.shape[-2] - 1
        k = torch.arange(last - num, last, device=chain.device)
        return self.step_log_prob(chain[..., :-1, :], chain[..., 1:, :], k)


def clip_schedule(first: float, last: float, num: int, rate: float = 3.0) -> list[float]:
    """epsilon of `num` steps: first + (last - first) (e^(rate u) - 1) / (e^rate - 1), u from 0 to 1; `last` if one."""
    grown = [math.expm1(rate * i / (num - 1)) / math.expm1(rate) for i in range(num)] if num > 1 else [1.0]
    return [first + (last - first) * x for x in grown]


class DPPO(Agent):
    """A diffusion policy whose denoising steps PPO learns, beside a value network of states."""

    regime = "on_policy"
    Config = DPPOConfig
    cfg: DPPOConfig
    discount: Tensor
    clip: Tensor
    bank: Tensor

    def __init__(self, spec: Spec, cfg: DPPOConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c, cloned = self.cfg, self.pretrained_agent()
        self.pi = self.make_policy(self.policy_settings(cloned))
        require(self.pi, "chain_log_prob", by="DPPO")
        self.obs_norm: ObsNorm | FixedNorm = ObsNorm(spec.obs_dim, enabled=c.normalize_obs)
        if cloned is not None:
            self.pi.load_state_dict(cloned.pi.slow.state_dict())
            self.obs_norm = cloned.obs_norm
        tuned = self.pi.num_steps if c.finetune_steps is None else c.finetune_steps
        self.first = self.pi.num_steps - tuned
        """Steps before the first that is trained."""
        if self.first < 0:
            raise ValueError(f"finetune_steps={tuned}, but the policy has {self.pi.num_steps} denoising steps")
        if self.first and cloned is None:
            raise ValueError(
                f"finetune_steps={tuned} of {self.pi.num_steps} leaves the first steps to an untrained network: name "
                "the run of a cloned policy with pretrained=RUN_DIR, or leave finetune_steps out"
            )
        size = spec.num_envs * c.horizon * tuned
        check_minibatches(size, c.minibatch_size, standardize=c.normalize_advantage, unit="denoising steps")
        self.base = frozen_copy(self.pi) if self.first else None
        self.v = ValueNet(spec.obs_dim, c.critic_hidden, "mish")
        self.reward_scale = RewardScale(spec.num_envs, c.gamma, enabled=c.normalize_reward)
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_v = adam(self.v.parameters(), c.critic_lr)
        clip = clip_schedule(c.clip if c.clip_base is None else c.clip_base, c.clip, tuned)
        self.register_buffer("clip", torch.tensor(clip), persistent=False)
        discount = [c.gamma_denoising ** (tuned - 1 - i) for i in range(tuned)]
        self.register_buffer("discount", torch.tensor(discount), persistent=False)
        half = self.cut(torch.randn(c.mode_draws // 2, *self.pi.noise_shape))
        half[:, -1] = 0
        zero = torch.zeros(c.mode_draws % 2, *self.pi.noise_shape)
        self.register_buffer("bank", torch.cat([zero, half, -half]))

    # -------------------------------------------------------------------------------------------------- construction
    def pretrained_agent(self) -> DiffusionBC | None:
        """The agent of the run to fine-tune; UsageError for one that cannot be."""
        c, spec = self.cfg, self.spec
        if not c.pretrained:
            return None
        from rlctl.experiment import load_named  # it knows all agents, this one too

        agent, settings = load_named(c.pretrained, c.checkpoint, "pretrained", "the policy that dppo fine-tunes")
        if not isinstance(agent, DiffusionBC) or not isinstance(agent.cfg, DiffusionBCConfig):
            raise UsageError(
                f"{c.pretrained} is a run of {settings.algo}: dppo fine-tunes runs of diffusion-bc, "
                "whose denoising steps have densities"
            )
        if agent.spec[:2] != spec[:2]:
            raise UsageError(
                f"the policy of {c.pretrained} sees {agent.spec.obs_dim} numbers and acts by {agent.spec.act_dim}, "
                f"this task has {spec.obs_dim} and {spec.act_dim}: clone one from data of this task"
            )
        return agent.to(spec.device)

    def policy_settings(self, cloned: DiffusionBC | None) -> DiffusionBCConfig:
        """What the policy is built by: that of the cloned one; from scratch, what the config says or the defaults."""
        names = ("hidden", "diffusion_steps", "schedule", "prediction")
        given = {name: value for name in names if (value := getattr(self.cfg, name)) is not None}
        if cloned is None:
            return replace(FROM_SCRATCH, **given)
        assert isinstance(cloned.cfg, DiffusionBCConfig)
        for name, ours in given.items():
            if ours != (theirs := getattr(cloned.cfg, name)):
                raise UsageError(f"{name}={ours}, but the policy of {self.cfg.pretrained} has {theirs}: leave it out")
        return cloned.cfg

    def make_policy(self, s: DiffusionBCConfig) -> GenerativePolicy:
        """The policy; a subclass may give any whose steps all have densities, a flow with noise for one."""
        c, spec = self.cfg, self.spec
        return DiffusionPolicy(
            spec.obs_dim,
            spec.act_dim,
            s.hidden,
            schedule=s.schedule,
            steps=s.diffusion_steps,
            prediction=s.prediction,
            sampling_steps=c.sampling_steps,
            min_std=c.min_std,
        )

    # -------------------------------------------------------------------------------------------------------- acting
    def denoised(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The trained part of a chain, [..., K' + 1, A], at normalised `obs`; `noise` is [..., K + 1, A]."""
        x, z = noise[..., 0, :], noise[..., 1:, :]
        if self.base is not None:
            x = self.base.path(obs, x, z[..., : self.first, :], last=self.first)[-1]
        return torch.stack(self.pi.path(obs, x, z[..., self.first :, :], first=self.first), -2)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The unclipped end of a chain, and the chain; the environment clips its own copy to [-1, 1]. Without
        `explore` the mean action of the fixed noise."""
        seen = self.obs_norm(obs)
        if not explore:
            return self.mean_action(seen), {}
        chain = self.denoised(seen, self.cut(self.pi.draw_noise(seen, generator=self.rng["action"])))
        return chain[..., -1, :], {"chain": chain}

    def cut(self, noise: Tensor) -> Tensor:
        """`noise` [..., K + 1, A] with that of the steps, not of the start, within +-noise_clip."""
        steps = noise[..., 1:, :].clamp(-self.cfg.noise_clip, self.cfg.noise_clip)
        return torch.cat([noise[..., :1, :], steps], -2)

    def act_by(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The unclipped end of the chain of `noise`, of which a frozen policy may make the first steps."""
        return self.denoised(self.obs_norm(obs), self.cut(noise))[..., -1, :]

    def mean_action(self, obs: Tensor) -> Tensor:
        """What `bank` ends in at normalised `obs` [..., O], clipped to the box and averaged, [..., A]."""
        each = obs.unsqueeze(-2).expand(*obs.shape[:-1], len(self.bank), obs.shape[-1])
        chains = self.denoised(each, self.bank.expand(*obs.shape[:-1], *self.bank.shape))
        return chains[..., -1, :].clamp(-1, 1).mean(-2)

    # -------------------------------------------------------------------------------------------------------- losses
    def steps_at(self, obs: Tensor) -> Denoising:
        """The policy's steps at normalised `obs`."""
        return Denoising(self.pi, obs)

    def prepare_rollout(self, batch: Batch) -> Rows:
        """The rollout `[T, N]` as rows `[T * N]`: `action` is the chain [B, K' + 1, A], `logp_old` [B, K']."""
        c, chains = self.cfg, batch._replace(action=batch.extra["chain"])
        return rows_of(chains, self.steps_at, self.v, self.obs_norm, self.reward_scale, c.gamma, c.lam)

    def policy_loss(self, m: Links) -> Tensor:
        """-E[min(r A_i, clip_i(r) A_i)] over denoising steps [M], A_i = gamma_denoising^(K' - 1 - i) A."""
        adv = standardized(m.adv) if self.cfg.normalize_advantage else m.adv
        logp = self.steps_at(m.obs).step_log_prob(m.before, m.after, self.first + m.step)
        return clipped_surrogate((logp - m.logp_old).exp(), self.discount[m.step] * adv, self.clip[m.step])

    def value_loss(self, m: Links) -> Tensor:
        """E[(V(s) - R)^2]: the value is that of the state, the same for all its denoising steps."""
        return (self.v(m.obs) - m.ret).square().mean()

    def update(self, batch: Batch) -> Metrics:
        """`epochs` passes over all denoising steps of a rollout `[T, N]`, shuffled, then the normalisers move."""
        c = self.cfg
        self.counters["updates"] += 1
        rows = self.prepare_rollout(batch)
        pairs = all_pairs(rows)
        log: list[Metrics] = []
        for _ in range(c.epochs):
            for part in minibatches(pairs, c.minibatch_size, self.rng["sample"]):
                m = links(rows, part)
                log.append({"losses/value": minimize(self.value_loss(m), self.opt_v, c.max_grad_norm)})
                if self.counters["updates"] > c.critic_warmup:
                    log[-1]["losses/policy"] = minimize(self.policy_loss(m), self.opt_pi, c.max_grad_norm)
        metrics = mean_of(log) | step_taken(self.steps_at, rows, c.clip)
        if isinstance(self.obs_norm, ObsNorm):
            self.obs_norm.update(batch.obs)
        self.reward_scale.update(batch.reward, batch.terminated | batch.truncated)
        return metrics | {"value/explained_variance": explained_variance(rows)}


def all_pairs(rows: Rows) -> Pairs:
    """Every trained denoising step of every row."""
    size: Iterable[int] = rows.logp_old.shape
    row, step = torch.meshgrid(*[torch.arange(n, device=rows.adv.device) for n in size], indexing="ij")
    return Pairs(row.flatten(), step.flatten())


def links(rows: Rows, pairs: Pairs) -> Links:
    """The denoising steps `pairs` of `rows`."""
    row, step = pairs
    chain = rows.action
    return Links(
        rows.obs[row],
        chain[row, step],
        chain[row, step + 1],
        step,
        rows.logp_old[row, step],
        rows.adv[row],
        rows.ret[row],
    )
