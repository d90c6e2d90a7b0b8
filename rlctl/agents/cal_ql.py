"""Cal-QL: conservative Q-learning that pushes no policy action below the return the data itself got from there.

Source: Nakamoto et al. 2023, arXiv:2303.05479 (its calibrated regulariser); official code github.com/nakamotoo/Cal-QL.
Differs: the defaults are CQL as JaxCQL writes it, on which the official code stands, for MuJoCo tasks: the paper's runs
are on AntMaze and Adroit (settings named at the config). Data actions are not clipped to +-0.99999. Networks are
initialised as our CQL's, and so is the Lagrange multiplier: at 1, where the official code starts it at e. The value of
the data's own policy is the return-to-go of each row; online, where that is known when an episode is over, rows enter
the replay then (CORL stops calibrating online instead: `calibrate_online`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlctl.agents.cql import CQL, CQLConfig
from rlctl.data.columns import column
from rlctl.data.dataset import Dataset
from rlctl.types import Batch, Fraction, Positive, Widths


@dataclass(frozen=True)
class CalQLConfig(CQLConfig):
    """Defaults: for MuJoCo tasks. AntMaze: reward 10r-5, sparse, lagrange_gap 0.8, backup min-max, critic_hidden of
    four times 256 (CORL: gap_floor -200); Adroit with a binary reward: reward 10r+5, sparse, cql_weight 1."""

    steps: Annotated[int, Field(ge=1)] = 1_000_000
    """Length of the run: gradient steps, or environment steps after `offline_updates`."""
    calibrate: bool = True
    """Floor the values of the policy's actions by the data's return-to-go; without it this is CQL."""
    calibrate_online: bool = True
    """Go on with that in the environment."""
    sparse: bool = False
    """A trajectory that was cut (a failure of a sparse task) counts as going on for ever with its last reward."""
    lagrange_form: Literal["official", "scaled"] = "scaled"
    """Multiplier times (cql_weight * C - gap), or times cql_weight * (C - gap)."""
    bc_share: Fraction = 0.0
    """Share of the updates on the data in which the policy is first cloned."""
    simultaneous: bool = True
    """Step all parameters at the end, so that every loss sees those of before the update."""
    hidden: Widths = (256, 256)
    """Widths of the hidden layers of the policy."""
    alpha_lr: Positive = 1e-4
    """Adam's learning rate of log alpha."""


class CalQL(CQL):
    """CQL whose values of policy actions are floored by a reference value."""

    Config = CalQLConfig
    cfg: CalQLConfig

    def prepare(self, data: Dataset) -> None:
        """CQL's, and the returns-to-go of the rewards its critics see."""
        super().prepare(data)
        data.require("mc_return", gamma=self.cfg.gamma, reward=self.reward, extend_truncated=self.cfg.sparse)

    def drawn_values(self, b: Batch, actions: Tensor) -> Tensor:
        """max(Q(s, a_k), G(s)) where a_k is of pi(s') or pi(s), Q(s, a_k) where it is of the box; [E, B, 3n]."""
        q, n = super().drawn_values(b, actions), self.cfg.num_actions
        if not self.cfg.calibrate or (self.counters["env_steps"] > 0 and not self.cfg.calibrate_online):
            return q
        floor = column(b, "mc_return").unsqueeze(-1)
        return torch.cat([q[..., :n], torch.maximum(q[..., n:], floor)], -1)
