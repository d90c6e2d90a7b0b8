"""PRDC: offline TD3 held near the dataset as a set, instead of near the data action of the same state.

Source: Ran et al. 2023, arXiv:2306.06569; official code github.com/LAMDA-RL/PRDC.
Differs: as the official code, not the paper, the regulariser is the SQUARED error to the action of the nearest row,
averaged over batch and action dimensions (the paper: the distance itself, whose part in the states has no gradient in
the policy anyway). Nearest neighbours are exact; the official code asks a float64 tree with all processors, ours
chooses by device. Online, the set that the policy is held near stays the dataset. The official parser's beta of 1 is
nowhere used: the default here is the 2 of its locomotion runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rlctl.agents.offline_learner import OfflineLearner, note
from rlctl.agents.td3 import TD3Settings
from rlctl.data.dataset import Dataset
from rlctl.data.neighbours import Method, Neighbours, neighbours
from rlctl.nets import DeterministicPolicy, QEnsemble
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.ops.td3 import clipped_double_backup, perturbed, scaled_value_loss, smoothed
from rlctl.train import OfflineRLConfig
from rlctl.types import Batch, Count, Metrics, NonNegative, Spec


@dataclass(frozen=True)
class PRDCConfig(OfflineRLConfig, TD3Settings):
    """Defaults: those for Hopper and Walker2d. HalfCheetah takes alpha 40, AntMaze alpha 7.5, beta 7.5 and
    reward 10000r-1."""

    alpha: NonNegative = 2.5
    """Weight of the value term against the regulariser, after normalising Q by its mean magnitude."""
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    """Weight of the z-scored state in the distance between (state, action) pairs: 0 compares actions alone, a large
    one states alone (which is TD3+BC)."""
    k: Count = 1
    """Which neighbour the policy is drawn to: the k-th nearest, alone (all published settings take the first)."""
    neighbours: Method = "auto"
    """Search, exact in any case: tree (KD-tree on the host), shortlist (first the rows of near states, then the tree),
    matrix (all distances, on the device), or auto: shortlist on a CPU if observation and action have 64 numbers or
    fewer, else the matrix."""
    normalize_obs: bool = True
    """z-score observations with the dataset's mean and std (+ 1e-3)."""


class PRDC(OfflineLearner):
    """Twin critics, deterministic actor with lambda Q + distance to the nearest (state, action) of the data."""

    host_reads = (
        "on a CPU its neighbours come from a KD-tree, outside of torch; with neighbours=matrix it reads nothing"
    )
    Config = PRDCConfig
    cfg: PRDCConfig

    def __init__(self, spec: Spec, cfg: PRDCConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        self.pi = DeterministicPolicy(spec.obs_dim, spec.act_dim, c.hidden)
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.hidden, num=2)
        self.pi_lagged, self.q_lagged = frozen_copy(self.pi), frozen_copy(self.q)
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)
        self.index: Neighbours | None = None
        self.data_action: Tensor | None = None

    def key(self, obs: Tensor, action: Tensor) -> Tensor:
        """[beta s, a], [B, O + A], of z-scored observations: what distances are taken between."""
        return torch.cat([self.cfg.beta * obs, action], -1)

    @torch.no_grad()
    def prepare(self, data: Dataset) -> None:
        """Take the statistics of the dataset, then index its pairs of z-scored state and action.

        ValueError for fewer rows than `k`.
        """
        super().prepare(data)
        rows = data.whole()
        table = self.key(self.obs_norm(rows.obs), rows.action)
        if self.cfg.k > len(table):
            raise ValueError(f"k={self.cfg.k}: '{data.id}' has {len(table)} rows, so k is in 1..{len(table)}")
        self.index = neighbours(table, self.cfg.neighbours, self.spec.obs_dim)
        data.require("row")
        self.data_action = rows.action
        self.host_reads = self.index.host_reads

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """pi(z-scored s), with Gaussian noise (clipped to the action range) if `explore`.

        Stored beside it: that the observation is of no row of the dataset.
        """
        action = self.pi(self.obs_norm(obs))
        elsewhere = torch.full(obs.shape[:-1], -1, dtype=torch.int64, device=obs.device)
        action = perturbed(action, self.cfg.exploration_noise, self.rng["action"]) if explore else action
        return action, {"row": elsewhere}

    def critic_loss(self, b: Batch, noise: Tensor | None = None, log: Metrics | None = None) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2],  y = r + gamma (1 - terminated) min_j Q_lagged_j(s', a~): TD3's."""
        c = self.cfg
        with torch.no_grad():
            action = smoothed(self.pi_lagged(b.next_obs), noise, c.policy_noise, c.noise_clip, self.rng["sample"])
            backup = clipped_double_backup(b.reward, b.terminated, self.q_lagged(b.next_obs, action), c.gamma)
        q = self.q(b.obs, b.action)
        note(log, "value/q", q)
        return (q - backup).square().mean(-1).sum()

    @torch.no_grad()
    def nearest_action(self, obs: Tensor, action: Tensor, row: Tensor | None = None) -> Tensor:
        """The action [B, A] of the dataset's row nearest to (s, a), s z-scored; `row` [B] is whose state s is, or -1.

        Who does not know the row gets the same answer, later.
        """
        if self.index is None or self.data_action is None:
            raise RuntimeError("PRDC has no data to look up neighbours in: call prepare(dataset) before update")
        return self.data_action.index_select(0, self.index.nearest(self.key(obs, action), self.cfg.k, row))

    def actor_loss(self, b: Batch, log: Metrics | None = None) -> Tensor:
        """-lambda E[Q_1(s, pi(s))] + E_{b,dim}[(pi(s) - a_nn)^2],  lambda = alpha / E|Q_1|; a_nn has no gradient."""
        action = self.pi(b.obs)
        regulariser = (action - self.nearest_action(b.obs, action, b.extra.get("row"))).square().mean()
        q = self.q(b.obs, action)[0]
        note(log, "value/q_pi", q)
        note(log, "losses/regulariser", regulariser)
        return scaled_value_loss(q, self.cfg.alpha) + regulariser

    def update(self, b: Batch) -> Metrics:
        """Critics; every `policy_every`-th time the actor and then all lagged networks."""
        self.counters["updates"] += 1
        b = self.seen(b)
        metrics: Metrics = {}
        metrics["losses/critic"] = minimize(self.critic_loss(b, log=metrics), self.opt_q)
        if self.counters["updates"] % self.cfg.policy_every == 0:
            metrics["losses/actor"] = minimize(self.actor_loss(b, log=metrics), self.opt_pi)
            polyak(self.q, self.q_lagged, self.cfg.tau)
            polyak(self.pi, self.pi_lagged, self.cfg.tau)
        return metrics
