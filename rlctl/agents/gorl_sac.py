"""GoRL on soft actor-critic: a Gaussian over codes climbs Q through a frozen generative decoder, held near the prior of
the codes instead of at an entropy; in stages, between which the decoder is refitted to what was done lately.

Source: arXiv:2512.02581 (policy by composition of encoder and frozen decoder, KL to the prior N(0, I), refit of the
decoder from that prior, fresh encoder); the actor-critic: arXiv:1812.05905. The paper says that any method may learn
the encoder and has only PPO; nothing is released of another.
Differs: all of the following is our choice. Q is a function of the executed action, not of the code, so critics and
replay stay true when the decoder changes and are kept through all stages; encoder and its optimiser start afresh, the
temperature goes on. KL(pi(.|s) || N(0, I)) of the codes, in closed form, stands where SAC has E[log pi], in actor and
backup; the temperature holds its mean at target_kl. With the identity for a decoder (stage 0) that is SAC on Q + alpha
log p(a), p the density of tanh(N(0, I)), for tanh is one-to-one. The encoder is SAC's actor before its tanh, its
observations raw like the critics'. The next decoder is fitted to the newest actions of the replay, at no further steps
in the environment; the first of them may be random ones. The rest is as in `gorl`: raw actions, tanh at the
environment, the deterministic action is that of the mean code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rlctl.agents.decoder_stages import Decoders, DecoderSettings, Recent, keep_length, refit
from rlctl.data.ring import Ring
from rlctl.errors import UsageError
from rlctl.nets import Normal, QEnsemble, TanhGaussianPolicy
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.seeding import fresh_weights
from rlctl.train import Job, OffPolicyConfig, off_policy, offline, replay
from rlctl.types import Agent, Batch, Fraction, Metrics, Positive, Spec, Widths


@dataclass(frozen=True)
class GoRLSACConfig(OffPolicyConfig, DecoderSettings):
    """Defaults: those of our SAC, stages and decoders of `gorl`, a nat of KL per action dimension."""

    recent_steps: Annotated[int, Field(ge=100)] = 100_000
    """The newest transitions of the replay, to which the next decoder is fitted."""
    hidden: Widths = (256, 256)
    """Widths of the hidden layers of encoder and critics."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    tau: Fraction = 0.005
    """q_lagged <- q_lagged + tau (q - q_lagged) after each update."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate of the encoder."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics."""
    alpha_lr: Positive = 3e-4
    """Adam's learning rate of log alpha."""
    alpha: Positive = 1.0
    """Weight of the KL: the initial one, or the fixed one when learn_alpha is off."""
    learn_alpha: bool = True
    """Adjust the weight to hold the mean KL at target_kl."""
    target_kl: Positive | None = None
    """Nats from the prior to the codes' distribution, in each stage anew; null takes act_dim."""

    def stage_steps(self) -> list[int]:
        """Environment steps of each stage, which share `steps` as `stage_weights` say."""
        return self.shared_steps(self.num_envs)


STAGE, REFIT = "gorl-sac", "gorl-sac decoder"
"""Of the loops in the environment, and of those that fit decoders, which bring nothing that needs a checkpoint."""


def train_gorl_sac(job: Job) -> None:
    """SAC on codes; then, stage by stage: a decoder fitted to recent actions, SAC with a fresh encoder under it."""
    agent, env, run, c = job.agent, job.env, job.run, job.cfg
    assert env is not None
    assert isinstance(agent, GoRLSAC)
    stages = c.stage_steps()
    if len(stages) > 1 and stages[0] <= c.learning_starts:
        raise UsageError(
            f"the first of {len(stages)} stages takes {stages[0]:,} steps and learning starts after "
            f"{c.learning_starts:,}: the second decoder would be fitted to random actions. Give more --steps, fewer "
            "stage_weights, or a smaller learning_starts"
        )
    ring = replay(job)
    assert isinstance(ring, Ring)
    rows = Recent(ring, c.recent_steps)
    run.plan(sum(stages) + (len(stages) - 1) * c.decoder_updates)
    run.stage(agent, STAGE)  # restores a resumed run
    keep_length(agent)
    env_steps = 0
    for j, steps in enumerate(stages):
        if j > 0:
            updates, learn = j * c.decoder_updates, partial(refit, agent, rows)
            offline(agent, rows, run, updates=updates, batch_size=c.decoder_batch_size, learn=learn, stage=REFIT)
        if run.stage(agent, STAGE).env_steps == env_steps:
            agent.begin(j)
        env_steps += steps
        off_policy(agent, env, ring, run, steps=env_steps, stage=STAGE)


class GoRLSAC(Agent):
    """Twin critics of actions, a Gaussian over codes, a decoder between the two."""

    regime = "off_policy"
    Config = GoRLSACConfig
    one_length = "its stages share the steps"
    schedule: ClassVar[Callable[[Job], None] | None] = staticmethod(train_gorl_sac)
    cfg: GoRLSACConfig

    def __init__(self, spec: Spec, cfg: GoRLSACConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        self.pi = self.make_encoder()
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.hidden, num=2)
        self.q_lagged = frozen_copy(self.q)
        self.log_alpha = nn.Parameter(torch.tensor(c.alpha).log())
        self.target_kl = float(spec.act_dim) if c.target_kl is None else c.target_kl
        self.decoders = Decoders(spec, c)
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)
        self.opt_alpha = adam([self.log_alpha], c.alpha_lr)
        self.opt_decoder = self.decoders.optimizer()
        self.counters |= {"steps": c.steps, "stage": 0, "decoder_updates": 0}

    def make_encoder(self) -> TanhGaussianPolicy:
        """SAC's actor; the codes are what it squashes."""
        return TanhGaussianPolicy(self.spec.obs_dim, self.spec.act_dim, self.cfg.hidden)

    def codes(self, obs: Tensor) -> Normal:
        """The distribution of the codes [..., A] at `obs` [..., O]."""
        return self.pi(obs).unsquashed

    def raw_action(self, obs: Tensor, code: Tensor) -> Tensor:
        """What the decoder makes of `code` [..., A]; the environment gets tanh of it."""
        return self.decoders.acting.decode(self.decoders.norm(obs), code)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The decoded action of a drawn or of the mean code; stored besides: the raw action, for the next decoder."""
        codes = self.codes(obs)
        raw = self.raw_action(obs, codes.sample(generator=self.rng["action"]) if explore else codes.mode)
        return raw.tanh(), {"raw_action": raw}

    def random_act(self, obs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Uniform actions, and the raw ones they are the tanh of."""
        action, _ = super().random_act(obs)
        action = action.clamp(-1 + 1e-6, 1 - 1e-6)
        return action, {"raw_action": action.atanh()}

    def begin(self, stage: int) -> None:
        """Begin a stage: the new decoder acts, the encoder and its optimiser start from scratch."""
        if stage == 0:
            return
        self.decoders.switch()
        with fresh_weights(self.spec.seed, f"init/encoder{stage}", self.spec.device):
            self.pi = self.make_encoder()
        self.opt_pi = adam(self.pi.parameters(), self.cfg.actor_lr)
        self.counters |= {"stage": stage, "decoder_updates": 0}

    def drawn(self, obs: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A decoded draw [B, A], differentiable in the encoder, and KL(codes || N(0, I)) [B] in nats."""
        codes = self.codes(obs)
        raw = self.raw_action(obs, codes.sample(noise, self.rng["sample"]))
        return raw.tanh(), codes.kl(Normal(torch.zeros_like(codes.mean), torch.zeros_like(codes.log_std)))

    def critic_loss(self, b: Batch, noise: Tensor | None = None) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2],  y = r + gamma (1 - terminated) (min_j Q_lagged_j(s', a') - alpha KL(s')).

        a' is a fresh draw, decoded; `noise` [B, A] is that of its code.
        """
        with torch.no_grad():
            next_action, kl = self.drawn(b.next_obs, noise)
            soft_v = self.q_lagged(b.next_obs, next_action).amin(0) - self.log_alpha.exp() * kl
            backup = b.reward + self.cfg.gamma * soft_v * ~b.terminated
        return (self.q(b.obs, b.action) - backup).square().mean(-1).sum()

    def actor_loss(self, b: Batch, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """E[alpha KL(s) - min_j Q_j(s, a)], a decoded of a draw of `noise` [B, A], and KL [B] (detached)."""
        action, kl = self.drawn(b.obs, noise)
        q = self.q(b.obs, action).amin(0)
        return (self.log_alpha.detach().exp() * kl - q).mean(), kl.detach()

    def alpha_loss(self, kl: Tensor) -> Tensor:
        """-E[log alpha (KL - target_kl)]: alpha rises while codes are further than that from the prior."""
        return -(self.log_alpha * (kl - self.target_kl)).mean()

    def update(self, b: Batch) -> Metrics:
        """Critics, encoder, weight of the KL, lagged critics; all three losses see the weight of before this update."""
        self.counters["updates"] += 1
        critic_loss = minimize(self.critic_loss(b), self.opt_q)
        actor_loss, kl = self.actor_loss(b)
        minimize(actor_loss, self.opt_pi)
        alpha = self.log_alpha.detach().exp()
        if self.cfg.learn_alpha:
            minimize(self.alpha_loss(kl), self.opt_alpha)
        polyak(self.q, self.q_lagged, self.cfg.tau)
        return {
            "losses/critic": critic_loss,
            "losses/actor": actor_loss.detach(),
            "policy/kl": kl.mean(),
            "policy/alpha": alpha,
        }
