"""Reward transforms of offline learning: r -> scale * r + shift, by a name that is part of the config.

Data stays raw, in the dataset as in the replay ring. The transform is a module of the agent, fitted in `prepare`, saved
with it and applied to every batch in `update`: so a run that goes from offline to online sees one scale, whichever
source a row comes from. Evaluation reports raw returns.

- `none`: r. TD3+BC, PRDC, A2PR; CQL and ReBRAC on locomotion.
- `return-range`: 1000 r / (highest - lowest episode return). IQL, IDQL and ODICE on locomotion.
- `standardise`: (r - mean) / std over all rows. EDAC on Adroit.
- a formula such as `r-1` or `10r-5`. On AntMaze: IQL `r-1`, CQL `4r-2`, Cal-QL `10r-5`, PRDC `10000r-1`, ReBRAC `100r`,
  ODICE `3r-3`. On Adroit with a binary reward: Cal-QL `10r+5`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from rlctl.errors import UsageError

if TYPE_CHECKING:
    from rlctl.data.dataset import Dataset

FITTED = ("return-range", "standardise")
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_FORMULA = re.compile(rf"({_NUMBER})?r([+-]{_NUMBER})?")


def check_name(name: str) -> str:
    """`name` itself; ValueError when there is no such transform."""
    if name not in ("none", *FITTED) and not _FORMULA.fullmatch(name):
        raise ValueError(f"no reward transform '{name}': allowed are none, {', '.join(FITTED)} and formulas like 10r-5")
    return name


RewardName = Annotated[str, AfterValidator(check_name)]
"""Type of a config field that names a transform."""


class RewardTransform(nn.Module):
    """scale * r + shift. Those that depend on the data are the identity until `fit`."""

    scale: Tensor
    shift: Tensor

    def __init__(self, name: str = "none") -> None:
        super().__init__()
        self.name = check_name(name)
        formula = _FORMULA.fullmatch(name)
        scale, shift = (formula[1] or 1, formula[2] or 0) if formula else (1, 0)
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("shift", torch.tensor(float(shift)))

    @torch.no_grad()
    def fit(self, data: Dataset) -> None:
        """Take what the transform needs from the dataset; UsageError where it leaves nothing to divide by."""
        if self.name == "return-range":
            low, high = return_range(data)
            spread, size, scale, shift = high - low, max(abs(low), abs(high)), 1000.0, 0.0
        elif self.name == "standardise":
            std, mean = torch.std_mean(data.rows.reward.double(), correction=0)
            spread, size, scale, shift = float(std), abs(float(mean)), 1.0, -float(mean)
        else:
            return
        if not spread > size * torch.finfo(torch.float32).eps:  # rounded rewards alone make that much
            what = "episode returns" if self.name == "return-range" else "rewards"
            raise UsageError(f"reward={self.name}: the {what} of '{data.id}' do not vary; learn with --set reward=none")
        self.scale.fill_(scale / spread)
        self.shift.fill_(shift * scale / spread)

    def forward(self, reward: Tensor) -> Tensor:
        """`[...] -> [...]`."""
        return reward * self.scale + self.shift

    def inverse(self, reward: Tensor) -> Tensor:
        """Undo `forward`."""
        return (reward - self.shift) / self.scale

    def describe(self) -> str:
        """The transform with its numbers, for the record of a run."""
        return f"{self.name}: {float(self.scale):.9g} * r + {float(self.shift):.9g}"


def return_range(data: Dataset, window: int = 1000) -> tuple[float, float]:
    """Lowest and highest return.

    Of the episodes, in the exact view. In the view `d4rl_compat` of what published code takes for episodes: runs of
    rows up to a terminal or `window` rows, whichever comes first, a rest at the end left out. As the view lacks the row
    of each timeout, these windows slide by one row per episode that timed out.
    """
    if data.view == "exact":
        returns = data.episode_returns()
        return float(returns.min()), float(returns.max())
    stops = data.rows.terminated.nonzero().flatten().tolist()
    m = len(data)
    total = torch.cat([torch.zeros(1, dtype=torch.float64), data.rows.reward.double().cumsum(0).cpu()])
    cuts, begin = [0], 0
    for end in (s + 1 for s in stops):
        cuts += [*range(begin + window, end, window), end]
        begin = end
    cuts += range(begin + window, m + 1, window)
    found = total[cuts].diff()
    if len(found) == 0:
        raise ValueError(f"return-range: '{data.id}' has neither a terminal nor {window} rows")
    return float(found.min()), float(found.max())
