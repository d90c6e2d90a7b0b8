"""The smallest of a random subset of critics: by hand, and on average over all subsets."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from rlctl.ops.ensemble import mean_subset_min, subset_min

Q = torch.tensor([[3.0, 0.0], [1.0, 5.0], [2.0, -4.0], [7.0, 1.0]])


def test_all_members_take_no_random_number() -> None:
    g = torch.Generator().manual_seed(0)
    before = g.get_state()
    assert subset_min(Q, 4, g).tolist() == [1.0, -4.0]
    assert torch.equal(g.get_state(), before)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_subset_serves_all_entries_and_all_come_up(size: int) -> None:
    g = torch.Generator().manual_seed(0)
    possible = {tuple(Q[list(s)].amin(0).tolist()) for s in combinations(range(4), size)}
    assert {tuple(subset_min(Q, size, g).tolist()) for _ in range(200)} == possible


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_mean_over_all_subsets_by_enumeration(double: None, size: int) -> None:
    q = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1))
    every = torch.stack([q[list(s)].amin(0) for s in combinations(range(4), size)])
    torch.testing.assert_close(mean_subset_min(q, size), every.mean(0))


@pytest.mark.parametrize("size", [0, 5])
def test_a_subset_that_cannot_be(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 4 critics"):
        subset_min(Q, size)
    with pytest.raises(ValueError, match="1 to 4 critics"):
        mean_subset_min(Q, size)
