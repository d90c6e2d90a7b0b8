"""What every dataset must keep: `rlctl data verify`, one line per quantity, and that a learner can draw from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from rlctl.conformance.results import Skip, expect
from rlctl.data.arrays import DatasetError, View
from rlctl.data.dataset import Dataset, load_dataset
from rlctl.data.inspect import Finding, verify


@dataclass
class Subject:
    """A dataset by name, with what `verify` is told about it."""

    name: str
    episode_len: int | None = None
    reward_range: tuple[float, float] | None = None

    @cached_property
    def findings(self) -> list[Finding]:
        """What `rlctl data verify` says; looked for once."""
        return verify(self.name, episode_len=self.episode_len, reward_range=self.reward_range)

    def load(self, view: View = "exact", seed: int = 0) -> Dataset:
        """The dataset as a learner gets it; `Skip` if it cannot be read, which another check has said."""
        if any(f.level == "error" and f.about == "file" for f in self.findings):
            raise Skip("the file cannot be read")
        return load_dataset(self.name, device=torch.device("cpu"), seed=seed, view=view, episode_len=self.episode_len)


Check = Callable[[Subject], None]


def _about(*quantities: str, looks_for: str) -> Check:
    """The check that nothing is wrong with `quantities`; notes are no fault."""

    def check(s: Subject) -> None:
        found = [f"{f.about} {f.message}" for f in s.findings if f.level == "error" and f.about in quantities]
        expect(not found, "; ".join(found))

    check.__doc__ = looks_for
    return check


def other(s: Subject) -> None:
    """Nothing else is wrong that `rlctl data verify` looks for."""
    found = [f"{f.about} {f.message}" for f in s.findings if f.level == "error" and f.about not in NAMED]
    expect(not found, "; ".join(found))


def sampling(s: Subject) -> None:
    """A learner draws finite batches of one shape, the same ones from the same seed."""
    batches = [s.load(seed=seed).sample(64) for seed in (1, 1, 2)]
    for name, x in batches[0].tensors().items():
        expect(len(x) == 64, f"{name} of a batch of 64 has {len(x)} rows")
        expect(not x.is_floating_point() or bool(x.isfinite().all()), f"{name} is not finite")
    same, again, different = (b.obs for b in batches)
    expect(torch.equal(same, again), "one seed gives two batches")
    expect(len(s.load()) < 2 or not torch.equal(same, different), "two seeds give one batch")


def views(s: Subject) -> None:
    """It can be read as exact transitions and as the pairs published results were trained on."""
    exact = len(s.load("exact"))
    try:
        pairs = len(s.load("d4rl_compat"))
    except DatasetError as e:
        raise Skip(f"view d4rl_compat: {e}") from None
    expect(0 < pairs <= exact, f"the view d4rl_compat has {pairs} rows, the view exact {exact}")


NAMED = ("file", "data", "next_obs", "terminated", "length", "action", "reward", "metadata")
CHECKS: Mapping[str, Check] = {
    "file": _about("file", looks_for="The arrays are there, whole and of one length"),
    "finite": _about("data", looks_for="No NaN and no infinity, nothing the reader had to pass over"),
    "next-obs": _about("next_obs", looks_for="next_obs is the observation that follows"),
    "terminated": _about("terminated", "length", looks_for="Ends are ends, not time limits recorded as such"),
    "action": _about("action", looks_for="Actions lie in [-1, 1]"),
    "reward": _about("reward", looks_for="Rewards are in range"),
    "metadata": _about("metadata", looks_for="The metadata is true of the data"),
    "other": other,
    "sampling": sampling,
    "views": views,
}
"""Every check by name."""
