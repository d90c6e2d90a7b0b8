"""GoRL: PPO learns a Gaussian over codes, a frozen generative decoder maps codes to actions. In stages: PPO against the
decoder; then a new decoder is fitted, from noise of the fixed prior N(0, I), to the actions of the policy so far, and
PPO begins anew with a fresh encoder, which under the new decoder starts near where the old one ended.

Source: arXiv:2512.02581 (policy by composition, phase 1: PPO on codes with a KL to the prior, phase 2: refit of the
decoder); code github.com/bennidict23/GoRL.
Differs: the penalty is the paper's KL(N(mu, sigma) || N(0, I)); the code's mean(mu^2) + mean(sigma^2), whose minimum is
not the prior, is `prior_penalty=moments`. No entropy bonus by default: the KL holds one, and 0.01 beside a weight of
0.001 would have its minimum at sigma^2 = 11. PPO, encoder and critic are those of `ppo` (one log-std per dimension; the
normaliser moves after the update, so the first ratio is 1; a truncation bootstraps): stage 0 is PPO, bit for bit, but
for the penalty. The data of phase 2 come from the encoder at the end of its stage, not from the best of its
evaluations, and from episodes with their time limits; the decoder is fitted for a fixed number of steps on rows drawn
with replacement, and the weights of the smallest held-out loss count. Velocity and time run from noise (0) to action
(1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlctl.agents.actor_critic import Rows, clipped_surrogate
from rlctl.agents.decoder_stages import Decoders, DecoderSettings, Recent, keep_length, refit
from rlctl.agents.ppo import PPO, PPOConfig
from rlctl.data.ring import Ring, refuse_if_too_large
from rlctl.nets import LatentDecoderPolicy, Normal
from rlctl.seeding import derive, fresh_weights
from rlctl.train import Job, off_policy, offline, on_policy
from rlctl.types import Batch, NonNegative, Positive, Spec


@dataclass(frozen=True)
class GoRLConfig(DecoderSettings, PPOConfig):
    """Defaults: stages, weights and decoder of the paper, the rest of our PPO's. `steps` counts those of the encoders
    alone, as the paper does: rollout_steps come on top before each later stage."""

    squash: bool = True
    """The environment gets tanh of what the decoder gives; off, it clips it to [-1, 1]."""
    rollout_steps: Annotated[int, Field(ge=100)] = 100_000
    """Environment steps by which the trained encoder gathers what the next decoder is fitted to."""
    clip: Positive = 0.15
    """epsilon of stage 0: the ratio counts only within [1 - clip, 1 + clip]."""
    later_clip: Positive = 0.3
    """epsilon of the stages after."""
    later_max_grad_norm: Positive = 1.0
    """`max_grad_norm` of the stages after."""
    kl_coef: NonNegative = 5e-4
    """Weight of the penalty in stage 0."""
    later_kl_coef: NonNegative = 1e-3
    """Weight of the penalty in the stages after."""
    prior_penalty: Literal["kl", "moments"] = "kl"
    """What keeps codes near the prior: KL(pi(.|s) || N(0, I)) in nats, or mean(mu^2) + mean(sigma^2)."""
    anneal_lr: bool = False
    """Lower the learning rate linearly to 0 over each stage."""

    def stage_steps(self) -> list[int]:
        """Environment steps of each encoder: whole rollouts that share `steps` as `stage_weights` say."""
        return self.shared_steps(self.num_envs * self.horizon)


STAGE = "gorl"
"""Of all loops: environment and rollouts then have one name in every checkpoint, wherever it falls."""


def train_gorl(job: Job) -> None:
    """PPO; then, stage by stage: rollouts, a decoder fitted to them, PPO with a fresh encoder under that decoder."""
    agent, env, run, c = job.agent, job.env, job.run, job.cfg
    assert env is not None
    assert isinstance(agent, GoRL)
    stages = c.stage_steps()
    rollout = math.ceil(c.rollout_steps / env.num_envs) * env.num_envs
    ring = Ring(rollout, agent.spec.device, derive(job.seed, "rollouts", 31))
    rows = Recent(ring, rollout)
    refuse_if_too_large(agent.spec, rollout)
    run.plan(sum(stages) + (len(stages) - 1) * (rollout + c.decoder_updates))
    run.stage(agent, STAGE)  # restores a resumed run
    keep_length(agent)
    env_steps = updates = 0
    for j, steps in enumerate(stages):
        if j > 0:
            env_steps, updates = env_steps + rollout, updates + c.decoder_updates
            off_policy(
                agent, env, ring, run, steps=env_steps, batch_size=1, learning_starts=0, updates_per_step=0, stage=STAGE
            )
            learn = partial(refit, agent, rows)
            offline(agent, rows, run, updates=updates, batch_size=c.decoder_batch_size, learn=learn, stage=STAGE)
        now = run.stage(agent, STAGE)
        if (now.env_steps, now.updates) == (env_steps, updates):
            agent.begin(j)
        env_steps, updates = env_steps + steps, updates + steps // (c.num_envs * c.horizon)
        on_policy(agent, env, run, steps=env_steps, stage=STAGE)


class GoRL(PPO):
    """PPO on codes, a decoder between them and the environment."""

    Config = GoRLConfig
    one_length = "its stages share the steps"
    schedule: ClassVar[Callable[[Job], None] | None] = staticmethod(train_gorl)
    cfg: GoRLConfig

    def __init__(self, spec: Spec, cfg: GoRLConfig | None = None) -> None:
        super().__init__(spec, cfg)  # encoder, critic and their normalisers, drawn as PPO draws them
        self.decoders = Decoders(spec, self.cfg)
        self.opt_decoder = self.decoders.optimizer()
        self.counters |= {"steps": self.cfg.steps, "stage": 0, "stage_began": 0, "decoder_updates": 0}

    @property
    def policy(self) -> LatentDecoderPolicy:
        """Encoder and decoder as one."""
        return LatentDecoderPolicy(
            self.pi,
            self.decoders.acting,
            squash=self.cfg.squash,
            encoder_norm=self.obs_norm,
            decoder_norm=self.decoders.norm,
        )

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The decoded action; stored besides: the code, of which PPO learns, and the raw action, for the decoder."""
        policy = self.policy
        latent = policy.latent(obs)
        code = latent.sample(generator=self.rng["action"]) if explore else latent.mode
        raw = policy.raw_action(obs, code)
        return (raw.tanh() if policy.squash else raw), {"code": code, "raw_action": raw}

    def act_by(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The decoded action of the code that `noise` draws."""
        return self.policy.sample(obs, noise=noise)

    def begin(self, stage: int) -> None:
        """Begin a stage: the new decoder acts; encoder, critic, normalisers and optimiser start from scratch."""
        if stage == 0:
            return
        self.decoders.switch()
        with fresh_weights(self.spec.seed, f"init/encoder{stage}", self.spec.device):
            new = PPO(self.spec, self.cfg)
        self.pi, self.v, self.opt = new.pi, new.v, new.opt
        self.obs_norm, self.reward_scale = new.obs_norm, new.reward_scale
        self.counters |= {"stage": stage, "stage_began": self.counters["updates"], "decoder_updates": 0}

    def prepare_rollout(self, batch: Batch) -> Rows:
        """PPO's rows of a rollout [T, N], with codes in place of actions."""
        return super().prepare_rollout(batch._replace(action=batch.extra["code"]))

    def policy_loss(self, ratio: Tensor, adv: Tensor) -> Tensor:
        """-E[min(r A, clip(r) A)] over a minibatch `[B]`, r the ratio of densities of the code."""
        c = self.cfg
        return clipped_surrogate(ratio, adv, c.later_clip if self.counters["stage"] else c.clip)

    def penalty(self, pi: Normal) -> Tensor | None:
        """PPO's, and kl_coef E[KL(pi(.|s) || N(0, I))], for a minibatch of distributions of the code."""
        c, others = self.cfg, super().penalty(pi)
        weight = c.later_kl_coef if self.counters["stage"] else c.kl_coef
        if not weight:
            return others
        if c.prior_penalty == "kl":
            kl = weight * pi.kl(Normal(torch.zeros_like(pi.mean), torch.zeros_like(pi.log_std))).mean()
        else:
            kl = weight * (pi.mean.square().mean() + (2 * pi.log_std).exp().mean())
        return kl if others is None else others + kl

    def grad_bound(self) -> float:
        """Largest L2 norm of the gradient of a step."""
        return self.cfg.later_max_grad_norm if self.counters["stage"] else self.cfg.max_grad_norm

    def part_done(self) -> float:
        """Part of the stage that lies behind, for the learning rate."""
        updates = self.cfg.stage_steps()[self.counters["stage"]] // (self.cfg.num_envs * self.cfg.horizon)
        return min((self.counters["updates"] - self.counters["stage_began"]) / updates, 1.0)
