"""Episodes of an environment in a replay: complete, with the columns a dataset would have computed for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlctl.data.columns import Request, compute
from rlctl.data.dataset import Dataset
from rlctl.data.episodes import EpisodeRing
from rlctl.data.reward import RewardTransform
from rlctl.data.ring import Mix, Ring
from rlctl.types import Batch

ASKED = [Request(("mc_return",), gamma=0.9, reward=RewardTransform("2r-1")), Request(("next_action", "timestep"))]


def step(*worlds: tuple[float, bool, bool]) -> Batch:
    """One step of several worlds, each (reward, terminated, truncated); everything else follows from the reward."""
    r, term, trunc = (torch.tensor(x) for x in zip(*worlds, strict=True))
    r = r.float()
    return Batch(r[:, None], -r[:, None], r, r[:, None] + 1, term.bool(), trunc.bool())


def going(*rewards: float) -> Batch:
    return step(*[(r, False, False) for r in rewards])


def by_dataset(rewards: list[float], truncated: bool) -> dict[str, Tensor]:
    """The columns that a dataset of this one episode would have."""
    n = len(rewards)
    last = torch.arange(n) == n - 1
    r = torch.tensor(rewards)
    rows = Batch(r[:, None], -r[:, None], r, r[:, None] + 1, last & (not truncated), last & truncated)
    out: dict[str, Tensor] = {}
    for asked in ASKED:
        out |= compute(asked.names, rows, torch.tensor([n]), gamma=asked.gamma, reward=asked.reward)
    return out


def assert_holds(ring: EpisodeRing, *episodes: tuple[list[float], bool]) -> None:
    rows = ring.whole()
    assert rows.reward.tolist() == [r for rewards, _ in episodes for r in rewards]
    for name, x in rows.extra.items():
        assert torch.equal(x, torch.cat([by_dataset(*e)[name] for e in episodes])), name


def test_an_episode_enters_when_it_is_over_with_all_its_columns() -> None:
    """Worlds end at different times, twice the same one, by termination and by the time limit."""
    ring = EpisodeRing(100, ASKED)
    ring.add(going(1, 10))
    ring.add(going(2, 20))
    assert len(ring) == 0
    ring.add(step((3, True, False), (30, False, False)))
    assert_holds(ring, ([1, 2, 3], False))
    ring.add(step((4, False, True), (40, False, False)))
    ring.add(step((5, False, False), (50, False, True)))
    assert_holds(ring, ([1, 2, 3], False), ([4], True), ([10, 20, 30, 40, 50], True))
    assert [len(b.reward) for b in ring.waiting] == [2]  # world 0 has begun, nothing older is kept
    ring.add(step((6, True, False), (60, True, False)))
    assert_holds(ring, ([1, 2, 3], False), ([4], True), ([10, 20, 30, 40, 50], True), ([5, 6], False), ([60], False))
    assert ring.waiting == []


def test_columns_end_with_the_episode() -> None:
    ring = EpisodeRing(100, ASKED)
    ring.add(step((1, False, True)))
    ring.add(going(7))
    ring.add(step((9, True, False)))
    extra = ring.whole().extra
    assert extra["has_next_action"].tolist() == [False, True, False]
    assert extra["next_action"][:, 0].tolist() == [-1.0, -9.0, -9.0]
    assert extra["mc_return"].tolist() == pytest.approx([1.0, 13 + 0.9 * 17, 17.0])  # of 2 r - 1
    assert extra["timestep"].tolist() == [0, 0, 1]


def test_a_long_episode_leaves_its_last_rows() -> None:
    ring = EpisodeRing(3, ASKED)
    for r in range(1, 6):
        ring.add(step((r, r == 5, False)))
    assert ring.whole().reward.tolist() == [3, 4, 5]
    assert torch.equal(ring.whole().extra["mc_return"], by_dataset([1, 2, 3, 4, 5], False)["mc_return"][2:])


@pytest.mark.parametrize("at", range(6))
def test_saved_in_the_middle_of_episodes_it_goes_on(at: int, tmp_path: Path) -> None:
    steps = [
        going(1, 10),
        step((2, True, False), (20, False, False)),
        going(3, 30),
        step((4, False, True), (40, True, False)),
        step((5, True, False), (50, True, False)),
    ]
    whole, first = EpisodeRing(50, ASKED, seed=1), EpisodeRing(50, ASKED, seed=1)
    for b in steps:
        whole.add(b)
    for b in steps[:at]:
        first.add(b)
    first.save(tmp_path)
    again = EpisodeRing(50, ASKED, seed=7)
    again.load(tmp_path)
    for b in steps[at:]:
        again.add(b)
    for k, x in whole.sample(64).tensors().items():
        if k == "reward":
            assert torch.equal(x, again.sample(64).reward)
    assert all(torch.equal(x, again.whole().tensors()[k]) for k, x in whole.whole().tensors().items())


def test_it_mixes_with_the_dataset_that_was_asked() -> None:
    r = torch.arange(6.0)
    last = torch.arange(6) % 3 == 2
    data = Dataset(Batch(r[:, None], -r[:, None], r, r[:, None] + 1, last, ~last & False), torch.tensor([3, 6]), id="d")
    data.require("next_action").require("mc_return", gamma=0.9)
    ring = EpisodeRing(10, list(data.requests.values()))
    for share in (0.5, None):
        mix = Mix(data, ring, share)
        mix.add(going(100))
        assert set(mix.sample(8).extra) == {"next_action", "has_next_action", "mc_return"}
        mix.add(step((101, True, False)))
        batch = mix.sample(4000)
        assert set(batch.reward.unique().tolist()) == {0, 1, 2, 3, 4, 5, *ring.whole().reward.tolist()}


def test_worlds_do_not_change_in_number() -> None:
    ring = EpisodeRing(10, ASKED)
    ring.add(going(1, 2))
    with pytest.raises(ValueError, match="steps of 3 worlds, where there were 2"):
        ring.add(going(1, 2, 3))


def test_a_mix_of_no_share_is_one_table() -> None:
    """300 rows and 100: three quarters from the data, every row as likely as any other."""
    fixed, ring = Ring(300, seed=1), Ring(200, seed=2)
    for i in range(300):
        fixed.add(going(i))
    for i in range(300, 400):
        ring.add(going(i))
    reward = Mix(fixed, ring, None).sample(200_000).reward
    count = torch.bincount(reward.long(), minlength=400)
    assert count.sum() == 200_000
    assert int(count.min()) > 380  # 500 expected, std 22
    assert int(count.max()) < 620
    empty = Mix(fixed, Ring(5), None)
    assert float(empty.sample(50).reward.max()) < 300
