import pytest
import torch

from rlctl.data import Rollout
from rlctl.types import Batch


def step(t: int, n: int = 3) -> Batch:
    i = t + torch.arange(n) / 10
    flag = torch.full((n,), t % 2 == 0)
    return Batch(i[:, None], -i[:, None], i, i[:, None] + 1, flag, ~flag, extra={"logp": i * 2, "value": i * 3})


def test_whole_is_time_by_world() -> None:
    rollout = Rollout(4)
    for t in range(4):
        assert len(rollout) == t
        rollout.add(step(t))
    rows = rollout.whole()
    assert rows.obs.shape == (4, 3, 1)
    assert rows.reward.shape == rows.terminated.shape == (4, 3)
    expected = torch.arange(4.0)[:, None] + torch.arange(3) / 10
    assert torch.equal(rows.reward, expected)
    assert torch.equal(rows.next_obs[..., 0], expected + 1)
    assert torch.equal(rows.extra["value"], expected * 3)
    assert rows.terminated[:, 0].tolist() == [True, False, True, False]
    assert torch.equal(rows.truncated, ~rows.terminated)


def test_the_next_rollout_overwrites_in_place() -> None:
    rollout = Rollout(2)
    for t in range(2):
        rollout.add(step(t))
    before = rollout.whole().obs
    for t in (2, 3):
        rollout.add(step(t))
    after = rollout.whole()
    assert after.obs is before
    assert after.reward[:, 0].tolist() == [2.0, 3.0]


def test_extras_go_by_name() -> None:
    rollout = Rollout(2)
    rollout.add(step(0))
    second = step(1)
    rollout.add(second._replace(extra=dict(reversed(second.extra.items()))))
    assert torch.equal(rollout.whole().extra["logp"], rollout.whole().reward * 2)


def test_a_partial_rollout_is_not_read() -> None:
    rollout = Rollout(2)
    with pytest.raises(RuntimeError, match="0 of 2"):
        rollout.whole()
    for t in range(3):
        rollout.add(step(t))
    with pytest.raises(RuntimeError, match="1 of 2"):
        rollout.whole()
