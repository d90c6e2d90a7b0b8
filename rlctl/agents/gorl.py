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
from itertools import accumulate
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlctl.agents.actor_critic import Rows, clipped_surrogate
from rlctl.agents.ppo import PPO, PPOConfig
from rlctl.data.ring import Ring, refuse_if_too_large
from rlctl.errors import UsageError
from rlctl.nets import DiffusionPolicy, FlowPolicy, GenerativePolicy, LatentDecoderPolicy, Normal, Policy
from rlctl.nets.normalizer import FixedNorm
from rlctl.ops import adam, frozen_copy, minimize
from rlctl.seeding import derive, fresh_weights, generator
from rlctl.train import Job, off_policy, offline, on_policy
from rlctl.types import Batch, Count, Metrics, NonNegative, Positive, Spec, Widths


@dataclass(frozen=True)
class GoRLConfig(PPOConfig):
    """Defaults: stages, weights and decoder of the paper, the rest of our PPO's. `steps` counts those of the encoders
    alone, as the paper does: rollout_steps come on top before each later stage."""

    stage_weights: Annotated[tuple[Positive, ...], Field(min_length=1)] = (2.0, 2.0, 1.0, 1.0)
    """Parts of `steps` by stage; as many stages as numbers."""
    decoder: Literal["flow", "diffusion"] = "flow"
    """Kind of the decoders (that of stage 0 is the identity)."""
    squash: bool = True
    """The environment gets tanh of what the decoder gives; off, it clips it to [-1, 1]."""
    decoder_hidden: Widths = (64, 64, 64, 64)
    """Widths of the decoder's hidden layers."""
    decoder_steps: Annotated[int, Field(ge=2)] = 10
    """Euler steps of a flow; levels of a diffusion, which is decoded in one step less, without the noisiest level."""
    rollout_steps: Annotated[int, Field(ge=100)] = 100_000
    """Environment steps by which the trained encoder gathers what the next decoder is fitted to."""
    decoder_updates: Count = 5000
    """Gradient steps of each decoder."""
    decoder_batch_size: Count = 1024
    """Transitions per gradient step of a decoder."""
    decoder_pairs: Count = 8
    """Noises and times for each of them."""
    decoder_lr: Positive = 3e-4
    """Adam's learning rate of the decoder."""
    clip: Positive = 0.15
    """epsilon of stage 0: the ratio counts only within [1 - clip, 1 + clip]."""
    later_clip: Positive = 0.3
    """epsilon of the stages after."""
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
        size = self.num_envs * self.horizon
        ends = [round(self.steps * x / sum(self.stage_weights)) for x in accumulate(self.stage_weights)]
        return [max(math.ceil((b - a) / size), 1) * size for a, b in zip([0, *ends], ends, strict=False)]


class Rollouts(Ring):
    """What a decoder is fitted to. Every tenth row is held out: it is never sampled."""

    def sample(self, n: int) -> Batch:
        """`n` of the other rows, drawn uniformly with replacement, [n, ...]."""
        index = torch.randint(self.size - self.size // 10, (n,), generator=self.rng, device=self.device)
        return self.rows.map(lambda x: x.index_select(0, index + index // 9))

    def held_out(self) -> Batch:
        """The held-out rows, [size // 10, ...] (a view)."""
        return self.whole().map(lambda x: x[9::10])


class Decoder(Policy):
    """The identity until it is given weights: then the generative policy they belong to."""

    fitted: Tensor

    def __init__(self, net: GenerativePolicy) -> None:
        super().__init__()
        self.net, self.can = net.requires_grad_(False), frozenset({"decode"})
        self.register_buffer("fitted", torch.tensor(False))

    def decode(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The raw action [..., A] of the code `noise` [..., A]."""
        return torch.where(self.fitted, self.net.decode(obs, noise), noise)

    def take(self, net: GenerativePolicy) -> None:
        """Use the weights of `net` from now on."""
        self.net.load_state_dict(net.state_dict())
        self.fitted.fill_(True)


STAGE = "gorl"
"""Of all loops: environment and rollouts then have one name in every checkpoint, wherever it falls."""


def train_gorl(job: Job) -> None:
    """PPO; then, stage by stage: rollouts, a decoder fitted to them, PPO with a fresh encoder under that decoder."""
    agent, env, run, c = job.agent, job.env, job.run, job.cfg
    assert env is not None
    assert isinstance(agent, GoRL)
    stages = c.stage_steps()
    rollout = math.ceil(c.rollout_steps / env.num_envs) * env.num_envs
    rows = Rollouts(rollout, agent.spec.device, derive(job.seed, "rollouts", 31))
    refuse_if_too_large(agent.spec, rollout)
    run.plan(sum(stages) + (len(stages) - 1) * (rollout + c.decoder_updates))
    run.stage(agent, STAGE)  # restores a resumed run
    if agent.counters["steps"] != c.steps:
        raise UsageError(
            f"this run was begun with {agent.counters['steps']:,} steps, shared by its stages: it cannot be made "
            f"{c.steps:,} long; start a new one, or go on without --steps"
        )
    env_steps = updates = 0
    for j, steps in enumerate(stages):
        if j > 0:
            env_steps, updates = env_steps + rollout, updates + c.decoder_updates
            off_policy(
                agent, env, rows, run, steps=env_steps, batch_size=1, learning_starts=0, updates_per_step=0, stage=STAGE
            )
            learn = partial(agent.refit, rows)
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
    best_loss: Tensor

    def __init__(self, spec: Spec, cfg: GoRLConfig | None = None) -> None:
        super().__init__(spec, cfg)  # encoder, critic and their normalisers, drawn as PPO draws them
        self.decoder = Decoder(self.make_decoder())
        self.decoder_norm = FixedNorm(spec.obs_dim)
        self.next_decoder = self.make_decoder()
        """In training in phase 2; `decoder` acts meanwhile."""
        self.next_norm = FixedNorm(spec.obs_dim)
        self.best_decoder = frozen_copy(self.next_decoder)
        """The weights of next_decoder that had the smallest held-out loss."""
        self.register_buffer("best_loss", torch.tensor(torch.finfo(torch.float32).max))
        self.opt_decoder = adam(self.next_decoder.parameters(), self.cfg.decoder_lr)
        self.counters |= {"steps": self.cfg.steps, "stage": 0, "stage_began": 0, "decoder_updates": 0}

    def make_decoder(self) -> GenerativePolicy:
        """A decoder of raw actions, with fresh weights."""
        c, (obs_dim, act_dim) = self.cfg, self.spec[:2]
        k, hidden = c.decoder_steps, c.decoder_hidden
        if c.decoder == "flow":
            return FlowPolicy(obs_dim, act_dim, hidden, "silu", steps=k, clip=None)
        return DiffusionPolicy(
            obs_dim,
            act_dim,
            hidden,
            "silu",
            schedule="cosine",
            steps=k,
            sampler="ddim",
            sampling_steps=k - 1,
            clip=None,
        )

    @property
    def policy(self) -> LatentDecoderPolicy:
        """Encoder and decoder as one."""
        return LatentDecoderPolicy(
            self.pi,
            self.decoder,
            squash=self.cfg.squash,
            encoder_norm=self.obs_norm,
            decoder_norm=self.decoder_norm,
        )

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The decoded action; stored besides: the code, of which PPO learns, and the raw action, for the decoder."""
        policy = self.policy
        latent = policy.latent(obs)
        code = latent.sample(generator=self.rng["action"]) if explore else latent.mode
        raw = policy.raw_action(obs, code)
        return (raw.tanh() if policy.squash else raw), {"code": code, "raw_action": raw}

    # ------------------------------------------------------------------------------------------- phase 1: the encoder
    def begin(self, stage: int) -> None:
        """Begin a stage: the new decoder acts; encoder, critic, normalisers and optimiser start from scratch."""
        if stage == 0:
            return
        self.decoder.take(self.best_decoder)
        self.decoder_norm.load_state_dict(self.next_norm.state_dict())
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

    def part_done(self) -> float:
        """Part of the stage that lies behind, for the learning rate."""
        updates = self.cfg.stage_steps()[self.counters["stage"]] // (self.cfg.num_envs * self.cfg.horizon)
        return min((self.counters["updates"] - self.counters["stage_began"]) / updates, 1.0)

    # ------------------------------------------------------------------------------------------- phase 2: the decoder
    def refit(self, rows: Rollouts, b: Batch) -> Metrics:
        """One step of the next decoder on a batch `b` of `rows`; 50 times in all, compare it on the held-out ones."""
        c = self.cfg
        if self.counters["decoder_updates"] == 0:
            self.new_decoder(rows)
        self.counters["decoder_updates"] += 1
        done = self.counters["decoder_updates"]
        metrics = {"losses/decoder": minimize(self.decoder_loss(b), self.opt_decoder)}
        if done % max(c.decoder_updates // 50, 1) == 0 or done == c.decoder_updates:
            metrics["losses/decoder_held_out"] = self.compare(rows.held_out())
        return metrics

    @torch.no_grad()
    def new_decoder(self, rows: Rollouts) -> None:
        """Fresh weights and optimiser; observation statistics of `rows`."""
        with fresh_weights(self.spec.seed, f"init/decoder{self.counters['stage']}", self.spec.device):
            self.next_decoder = self.make_decoder()
        self.opt_decoder = adam(self.next_decoder.parameters(), self.cfg.decoder_lr)
        self.next_norm.fit(rows.whole().obs)
        self.best_loss.fill_(torch.finfo(torch.float32).max)

    def decoder_loss(self, b: Batch) -> Tensor:
        """E of the matching loss on raw actions, `decoder_pairs` noises and times each; the noise is the prior's."""
        g = self.rng["sample"]
        noise, time = self.next_decoder.draw_pairs(b.extra["raw_action"], self.cfg.decoder_pairs, g)
        return self.next_decoder.matching_loss(self.next_norm(b.obs), b.extra["raw_action"], noise, time).mean()

    @torch.no_grad()
    def compare(self, held_out: Batch) -> Tensor:
        """The loss on held-out rows, at noises and times that are the same each time; the best weights are kept."""
        raw = held_out.extra["raw_action"]
        noise, time = self.next_decoder.draw_pairs(raw, generator=generator(self.spec.seed, "held out", raw.device))
        loss = self.next_decoder.matching_loss(self.next_norm(held_out.obs), raw, noise, time).mean()
        better = loss < self.best_loss
        for best, now in zip(self.best_decoder.parameters(), self.next_decoder.parameters(), strict=True):
            best.copy_(torch.where(better, now, best))
        self.best_loss.copy_(torch.minimum(loss, self.best_loss))
        return loss
