"""What GoRL on PPO and GoRL on SAC share: the decoder between codes and actions, and how the next one is fitted. Not an
algorithm.

Source: arXiv:2512.02581, phase 2; code github.com/bennidict23/GoRL.
Differs: a decoder sees (s - mean) / (std + 1e-3), clipped to +-10 like what the encoder sees, with the mean and std of
all rows, the held-out ones too (the code: std + 1e-8, no clip, of the rows it trains on; there a number that stood
still in the rollouts and moves later comes out a hundred million times as large). Of time a flow sees the number
itself and a diffusion 16 learned features of its sines and cosines (the code: 8, those of four octaves); a flow begins
with Xavier-uniform weights, a diffusion with PyTorch's default (the code: LeCun-uniform). The decoder of stage 0 is the
exact identity for a diffusion too (the code's multiplies codes by 1.052).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from rlctl.data.ring import Ring
from rlctl.errors import UsageError
from rlctl.nets import DiffusionPolicy, FlowPolicy, GenerativePolicy, Policy
from rlctl.nets.normalizer import FixedNorm
from rlctl.ops import adam, frozen_copy, minimize
from rlctl.ops.optim import Adam
from rlctl.seeding import fresh_weights, generator
from rlctl.types import AgentConfig, Batch, Count, Metrics, Positive, Spec, Widths


@dataclass(frozen=True)
class DecoderSettings(AgentConfig):
    """The stages and their decoders."""

    stage_weights: Annotated[tuple[Positive, ...], Field(min_length=1)] = (2.0, 2.0, 1.0, 1.0)
    """Parts of `steps` by stage; as many stages as numbers."""
    decoder: Literal["flow", "diffusion"] = "flow"
    """Kind of the decoders (that of stage 0 is the identity)."""
    decoder_hidden: Widths = (64, 64, 64, 64)
    """Widths of the decoder's hidden layers."""
    decoder_steps: Annotated[int, Field(ge=2)] = 10
    """Euler steps of a flow; levels of a diffusion, which is decoded in one step less, without the noisiest level."""
    decoder_updates: Count = 5000
    """Gradient steps of each decoder."""
    decoder_batch_size: Count = 1024
    """Transitions per gradient step of a decoder."""
    decoder_pairs: Count = 8
    """Noises and times for each of them."""
    decoder_lr: Positive = 3e-4
    """Adam's learning rate of the decoder."""

    def shared_steps(self, unit: int) -> list[int]:
        """Environment steps of each stage: `steps` shared as `stage_weights` say, in whole multiples of `unit`."""
        ends = [round(self.steps * x / sum(self.stage_weights)) for x in accumulate(self.stage_weights)]
        return [max(math.ceil((b - a) / unit), 1) * unit for a, b in zip([0, *ends], ends, strict=False)]


class Recent:
    """The newest `num` transitions of a replay, oldest first: what a decoder is fitted to.

    Every tenth is held out: it is never sampled. The replay is written to checkpoints by who fills it, not here.
    """

    def __init__(self, ring: Ring, num: int) -> None:
        self.ring, self.num = ring, num

    def __len__(self) -> int:
        return min(self.num, len(self.ring))

    def sample(self, n: int) -> Batch:
        """`n` of the rows that are not held out, drawn uniformly with replacement, [n, ...]."""
        ring, size = self.ring, len(self)
        index = torch.randint(size - size // 10, (n,), generator=ring.rng, device=ring.device)
        return self._at(index + index // 9)

    def held_out(self) -> Batch:
        """The held-out rows, [len(self) // 10, ...]."""
        return self._at(torch.arange(9, len(self), 10, device=self.ring.device))

    def whole(self) -> Batch:
        """All rows, [len(self), ...]."""
        return self._at(torch.arange(len(self), device=self.ring.device))

    def _at(self, age: Tensor) -> Batch:
        """Rows by their place in time, 0 the oldest."""
        index = (age + self.ring.cursor - len(self)) % self.ring.capacity
        return self.ring.rows.map(lambda x: x.index_select(0, index))


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


class Decoders(nn.Module):
    """The decoder that acts, and the one that is being fitted to take its place."""

    best_loss: Tensor

    def __init__(self, spec: Spec, cfg: DecoderSettings) -> None:
        super().__init__()
        self.spec, self.cfg = spec, cfg
        self.acting = Decoder(self.make())
        self.norm = FixedNorm(spec.obs_dim, clip=10.0)
        self.next = self.make()
        """In training in phase 2; `acting` acts meanwhile."""
        self.next_norm = FixedNorm(spec.obs_dim, clip=10.0)
        self.best = frozen_copy(self.next)
        """The weights of `next` that had the smallest held-out loss."""
        self.register_buffer("best_loss", torch.tensor(torch.finfo(torch.float32).max))

    def make(self) -> GenerativePolicy:
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

    def optimizer(self) -> Adam:
        """A fresh one for the next decoder."""
        return adam(self.next.parameters(), self.cfg.decoder_lr)

    @torch.no_grad()
    def restart(self, rows: Recent, stage: int) -> None:
        """Fresh weights for the next decoder, in the name of `stage`; observation statistics of `rows`."""
        with fresh_weights(self.spec.seed, f"init/decoder{stage}", self.spec.device):
            self.next = self.make()
        self.next_norm.fit(rows.whole().obs)
        self.best_loss.fill_(torch.finfo(torch.float32).max)

    def loss(self, b: Batch, g: torch.Generator) -> Tensor:
        """E of the matching loss on raw actions, `decoder_pairs` noises and times each; the noise is the prior's."""
        noise, time = self.next.draw_pairs(b.extra["raw_action"], self.cfg.decoder_pairs, g)
        return self.next.matching_loss(self.next_norm(b.obs), b.extra["raw_action"], noise, time).mean()

    @torch.no_grad()
    def compare(self, held_out: Batch) -> Tensor:
        """The loss on held-out rows, at noises and times that are the same each time; the best weights are kept."""
        raw = held_out.extra["raw_action"]
        noise, time = self.next.draw_pairs(raw, generator=generator(self.spec.seed, "held out", raw.device))
        loss = self.next.matching_loss(self.next_norm(held_out.obs), raw, noise, time).mean()
        better = loss < self.best_loss
        for best, now in zip(self.best.parameters(), self.next.parameters(), strict=True):
            best.copy_(torch.where(better, now, best))
        self.best_loss.copy_(torch.minimum(loss, self.best_loss))
        return loss

    def switch(self) -> None:
        """From now on the one with the best weights acts."""
        self.acting.take(self.best)
        self.norm.load_state_dict(self.next_norm.state_dict())


class Staged(Protocol):
    """An agent that learns in stages under `decoders`."""

    cfg: Any
    decoders: Decoders
    opt_decoder: Adam
    counters: dict[str, int]
    """`steps` the run was begun with, `stage`, and `decoder_updates` in it."""
    rng: dict[str, torch.Generator]


def keep_length(agent: Staged) -> None:
    """UsageError if a restored agent was begun with other `steps` than its config has: the stages share them."""
    if (begun := agent.counters["steps"]) != agent.cfg.steps:
        raise UsageError(
            f"this run was begun with {begun:,} steps, shared by its stages: it cannot be made {agent.cfg.steps:,} "
            "long; start a new one, or go on without --steps"
        )


def refit(agent: Staged, rows: Recent, b: Batch) -> Metrics:
    """Phase 2: one step of the next decoder on a batch `b` of `rows`; 50 times in all, a look at the held-out ones."""
    c, decoders = agent.cfg, agent.decoders
    if agent.counters["decoder_updates"] == 0:
        decoders.restart(rows, agent.counters["stage"])
        agent.opt_decoder = decoders.optimizer()
    agent.counters["decoder_updates"] += 1
    done = agent.counters["decoder_updates"]
    metrics = {"losses/decoder": minimize(decoders.loss(b, agent.rng["sample"]), agent.opt_decoder)}
    if done % max(c.decoder_updates // 50, 1) == 0 or done == c.decoder_updates:
        metrics["losses/decoder_held_out"] = decoders.compare(rows.held_out())
    return metrics
