"""CDSA: the actions of a trained policy, moved by score steps towards where the data is dense.

Source: arXiv:2406.07541 (Conservative Denoising Score-based Algorithm), of which we had the abstract alone: dataset
density gradients are learned by denoising score matching and correct an already trained policy while it acts; an
inverse dynamics model turns the gradient in the state into a correction of the action. What follows is our
reconstruction around that, not the authors' algorithm.
Differs: it must; these are the choices, x = (s, a) z-scored by the dataset in every dimension:

- Objective (Vincent 2011). For x~ = x + sigma z, z ~ N(0, I), the regression of S on grad log p(x~|x) = -z / sigma with
  weight sigma^2 is E||sigma S(x~, sigma) + z||^2. Its minimiser is the score of the smoothed density, and by Tweedie's
  formula x~ + sigma^2 S(x~, sigma) = E[x | x~]: the denoised pair. One network serves all sigma in [sigma_min,
  sigma_max], drawn log-uniformly. The part of S in a is grad_a log p_sigma(a | s), since p_sigma(s) does not know a.
- Step in the action: `action_step` times sigma^2 S_a, the way to the denoised action. 1 goes all of it.
- Step through the state: s^ = s + state_share sigma^2 S_s is a state nearer the data; I(s, s') is the action that leads
  from s to s' (deterministic dynamics), so I(s, s^) - I(s, s) is what to add to the action to get there, rather than to
  stay; it enters with `state_step`. I learns from true successors, so rows that terminate teach it nothing.
- `score_steps` repeats the correction from where it has come, with sigma falling geometrically from `sigma` to
  `sigma_min` if `anneal`. No step, or both sizes 0, is the base policy bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rlctl.agents.offline_learner import check_fit
from rlctl.data.dataset import Dataset
from rlctl.errors import UsageError
from rlctl.nets.mlp import mlp
from rlctl.nets.normalizer import FixedNorm
from rlctl.ops import adam, minimize
from rlctl.train import OfflineConfig
from rlctl.types import Agent, Batch, Metrics, NonNegative, Positive, RunFolder, Spec, Widths


@dataclass(frozen=True)
class CDSAConfig(OfflineConfig):
    """Defaults: one cautious step; all but the two learning rates belong to acting or to the noise levels."""

    base: RunFolder = ""
    """Run directory of the trained agent whose actions to correct, of any algorithm. Needed, also to load the run
    again: keep it where it is."""
    checkpoint: str | int = "latest"
    """Which of its agents: latest, best (of the evaluations in training), or the STEP of one."""
    steps: Annotated[int, Field(ge=1)] = 100_000
    """Gradient steps of the score and the inverse model."""
    action_step: NonNegative = 0.2
    """Part of the way to the denoised action that a score step goes (k_a). The default hardly moves a good
    agent; 0.5 to 1 raised some weak ones far on one dataset and ruined one (benchmarks/README.md)."""
    state_step: NonNegative = 0.0
    """Weight of the correction by way of the state (k_s)."""
    state_share: NonNegative = 1.0
    """Part of the way to the denoised state that this correction aims at."""
    sigma: Positive = 0.3
    """Noise level at which the score is asked while acting, in standard deviations of the data."""
    score_steps: Annotated[int, Field(ge=0)] = 1
    """Corrections of one action, each from where the one before has led; 0 leaves the base policy."""
    anneal: bool = False
    """Lower the noise level geometrically from `sigma` to `sigma_min` over those steps."""
    sigma_min: Positive = 0.01
    """Smallest noise level the score learns."""
    sigma_max: Positive = 1.0
    """Largest one."""
    separate_state_score: bool = False
    """Take the score in the state from a network of the states alone instead of the pairs'."""
    hidden: Widths = (256, 256, 256)
    """Widths of the hidden layers of the score."""
    inverse_hidden: Widths = (256, 256)
    """Widths of the hidden layers of the inverse dynamics model."""
    score_lr: Positive = 3e-4
    """Adam's learning rate of the score."""
    inverse_lr: Positive = 3e-4
    """Adam's learning rate of the inverse dynamics model."""


class CDSA(Agent):
    """A frozen base agent, a score network, an inverse dynamics model."""

    regime = "offline"
    offline_only = "it corrects a trained policy and learns none"
    Config = CDSAConfig
    cfg: CDSAConfig

    def __init__(self, spec: Spec, cfg: CDSAConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c, width = self.cfg, spec.obs_dim + spec.act_dim
        if not c.sigma_min <= c.sigma <= c.sigma_max:
            raise ValueError(
                f"sigma={c.sigma} lies outside of what the score learns, [{c.sigma_min}, {c.sigma_max}]: "
                "change it, sigma_min or sigma_max"
            )
        self.base: Agent | None = None
        self.pair_norm = FixedNorm(width)
        self.pair_score = mlp(width + 1, width, c.hidden, "silu")
        self.inverse = mlp(2 * spec.obs_dim, spec.act_dim, c.inverse_hidden)
        scores = list(self.pair_score.parameters())
        if c.separate_state_score:
            self.state_score = mlp(spec.obs_dim + 1, spec.obs_dim, c.hidden, "silu")
            scores += self.state_score.parameters()
        self.opt_score = adam(scores, c.score_lr)
        self.opt_inverse = adam(self.inverse.parameters(), c.inverse_lr)
        if c.base:
            from rlctl.experiment import load_named  # it knows all agents, this one too

            role = "the agent whose actions this one corrects"
            self.wrap(load_named(c.base, str(c.checkpoint), "base", role)[0])

    def wrap(self, base: Agent) -> CDSA:
        """Correct the actions of `base` from now on; it is frozen. ValueError for an agent of another task."""
        theirs, ours = base.spec[:2], self.spec[:2]
        if theirs != ours:
            raise ValueError(
                f"the base agent sees {theirs[0]} numbers and acts by {theirs[1]}, this task has {ours[0]} and "
                f"{ours[1]}: the two are not the same"
            )
        self.base = base.requires_grad_(False)
        return self

    def prepare(self, data: Dataset) -> None:
        """Take mean and std of the dataset's pairs; ValueError if its dimensions are others."""
        if self.base is None:
            raise UsageError("cdsa corrects a trained agent: name its run directory with --set base=RUN_DIR")
        check_fit(data, self.spec)
        rows = data.whole()
        self.pair_norm.fit(torch.cat([rows.obs, rows.action], -1))

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The base agent's action, corrected and clipped to the action range."""
        if self.base is None:
            raise UsageError("cdsa corrects a trained agent: name its run directory with --set base=RUN_DIR")
        self.base.rng = self.rng  # its draws are ours: an evaluation that borrows generators borrows them for both
        action, _ = self.base.act(obs, explore)
        return self.corrected(obs, action), {}

    @torch.no_grad()
    def corrected(self, obs: Tensor, action: Tensor) -> Tensor:
        """`action` [B, A] after all score steps at `obs` [B, O], both raw; clipped to [-1, 1] if there is any step."""
        c = self.cfg
        if c.action_step == 0 and c.state_step == 0:
            return action
        for sigma in self.levels():
            action = (action + self.correction(obs, action, sigma)).clamp(-1, 1)
        return action

    def levels(self) -> list[float]:
        """The noise level of each score step."""
        c, n = self.cfg, self.cfg.score_steps
        if not c.anneal or n < 2:
            return [c.sigma] * n
        return [c.sigma * (c.sigma_min / c.sigma) ** (k / (n - 1)) for k in range(n)]

    def correction(self, obs: Tensor, action: Tensor, sigma: float) -> Tensor:
        """action_step std_a sigma^2 S_a + state_step (I(s, s^) - I(s, s)), [B, A] in units of the action.

        s^ = s + state_share sigma^2 S_s, in z-scored units, in which the inverse model sees states.
        """
        c, o = self.cfg, self.spec.obs_dim
        x = self.pair_norm(torch.cat([obs, action], -1))
        level = x.new_full(x.shape[:1], sigma)  # not len(x), which a trace for export would take for a constant
        score = self.score(x, level)
        out = c.action_step * sigma**2 * score[:, o:] * (self.pair_norm.std + self.pair_norm.eps)[o:]
        if c.state_step > 0:
            s = x[:, :o]
            upwards = self.score(s, level) if c.separate_state_score else score[:, :o]
            goal = s + c.state_share * sigma**2 * upwards
            out = out + c.state_step * (self.inverse(torch.cat([s, goal], -1)) - self.inverse(torch.cat([s, s], -1)))
        return out

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """S(x, sigma) of z-scored pairs [B, O + A], or of states [B, O] by their own network; `sigma` [B]."""
        net = self.pair_score if x.shape[-1] == self.spec.obs_dim + self.spec.act_dim else self.state_score
        return net(torch.cat([x, sigma.log().unsqueeze(-1)], -1))

    def score_loss(self, x: Tensor, sigma: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """E[||sigma S(x + sigma z, sigma) + z||^2], a sum over dimensions, of rows x [B, D].

        `noise` z [B, D] is standard normal; sigma [B] log-uniform between its bounds.
        """
        c, rng = self.cfg, self.rng["sample"]
        if sigma is None:
            u = torch.rand(len(x), generator=rng, dtype=x.dtype, device=x.device)
            sigma = (math.log(c.sigma_min) + u * math.log(c.sigma_max / c.sigma_min)).exp()
        if noise is None:
            noise = torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
        wide = sigma.unsqueeze(-1)
        return (wide * self.score(x + wide * noise, sigma) + noise).square().sum(-1).mean()

    def inverse_loss(self, b: Batch) -> Tensor:
        """E[1(not terminated) mean_d (I(s, s') - a)_d^2] on z-scored states."""
        misfit = (self.inverse(torch.cat([b.obs, b.next_obs], -1)) - b.action).square().mean(-1)
        return (misfit * ~b.terminated).mean()

    def update(self, b: Batch) -> Metrics:
        """One step of the score (of both, if they are separate), one of the inverse model."""
        self.counters["updates"] += 1
        o = self.spec.obs_dim
        x = self.pair_norm(torch.cat([b.obs, b.action], -1))
        loss = self.score_loss(x)
        if self.cfg.separate_state_score:
            loss = loss + self.score_loss(x[:, :o])
        following = (b.next_obs - self.pair_norm.mean[:o]) / (self.pair_norm.std + self.pair_norm.eps)[:o]
        inverse = self.inverse_loss(b._replace(obs=x[:, :o], next_obs=following))
        return {
            "losses/score": minimize(loss, self.opt_score),
            "losses/inverse": minimize(inverse, self.opt_inverse),
        }
