"""Nearest neighbours: the numbers of a small table, both searches against a slow reference, what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlctl.data.neighbours import Matrix, Neighbours, Tree, neighbours

SEARCHES: dict[str, Callable[[Tensor], Neighbours]] = {
    "tree": Tree,
    "matrix": Matrix,
    "matrix, many chunks": lambda rows: Matrix(rows, chunk=7),
    "matrix, one row per chunk": lambda rows: Matrix(rows, chunk=1),
}
every_search = pytest.mark.parametrize("search", SEARCHES)
BETAS = [0.0, 0.1, 1.0, 2.0, 7.5, 1e3]


def by_hand(rows: Tensor, query: Tensor) -> Tensor:
    """Squared distances [B, M] one by one, in float64."""
    return torch.stack([(rows.double() - q.double()).square().sum(-1) for q in query])


# s, a, and the query of the fixture: neighbours of [beta s, a] for growing beta
STATE, ACTION = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.5], [-0.5], [0.9]])
QUERY_STATE, QUERY_ACTION = torch.tensor([[0.6, 0.2]]), torch.tensor([[0.45]])
FIXTURE = [
    (0.1, [0.080623, 0.951052, 0.488365], 0),
    (1.0, [0.634429, 1.05, 1.95], 0),
    (2.0, [1.265899, 1.304799, 3.821322], 0),
    (7.5, [4.743680, 3.486044, 14.237363], 1),
]


@every_search
@pytest.mark.parametrize(("beta", "distances", "nearest"), FIXTURE)
def test_three_rows_by_number(search: str, beta: float, distances: list[float], nearest: int) -> None:
    rows = torch.cat([beta * STATE.double(), ACTION.double()], -1)
    query = torch.cat([beta * QUERY_STATE.double(), QUERY_ACTION.double()], -1)
    assert by_hand(rows, query).sqrt()[0].tolist() == pytest.approx(distances, abs=1e-6)
    index = SEARCHES[search](rows)
    assert index.nearest(query).tolist() == [nearest]
    order = sorted(range(3), key=lambda i: distances[i])
    assert [int(index.nearest(query, k)) for k in (1, 2, 3)] == order  # the k-th, not the set of the first k


@every_search
@pytest.mark.parametrize("beta", BETAS)
def test_against_all_distances(search: str, beta: float) -> None:
    g = torch.Generator().manual_seed(0)
    scale = torch.tensor([beta] * 3 + [1.0] * 2)
    rows, query = torch.randn(500, 5, generator=g) * scale, torch.randn(40, 5, generator=g) * scale
    query[:10] = rows[100:110] + 0.01 * torch.randn(10, 5, generator=g)
    index, ranked = SEARCHES[search](rows), by_hand(rows, query).argsort(-1)
    for k in (1, 2, 5):
        found = index.nearest(query, k)
        assert found.shape == (40,)
        assert found.dtype == torch.int64
        assert torch.equal(found, ranked[:, k - 1])


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 6), st.integers(0, 10_000), st.floats(0.01, 100.0))
def test_tree_and_matrix_find_rows_equally_near(rows: int, dim: int, queries: int, seed: int, scale: float) -> None:
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, dim, generator=g).mul(2).round().mul(scale)  # a lattice: ties and copies abound
    query = torch.randn(queries, dim, generator=g) * scale
    true = by_hand(table, query)
    for k in {1, rows}:
        for index in (Tree(table), Matrix(table, chunk=5)):
            got = true.gather(1, index.nearest(query, k)[:, None])[:, 0]
            torch.testing.assert_close(got, true.sort(-1).values[:, k - 1])


def test_far_from_the_origin_float32_would_fail() -> None:
    """Rows a thousandth apart, 300 away from the origin: |x|^2 is 9e4, float32 knows it to 0.008."""
    steps = torch.arange(50.0).double() * 1e-3
    rows = torch.stack([300 + steps, torch.full_like(steps, 0.5)], -1)
    wanted = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    for search in SEARCHES.values():
        assert torch.equal(search(rows).nearest(rows[wanted] + 1e-4), wanted)
    single = (rows.float().square().sum(-1) - 2 * rows.float()[wanted] @ rows.float().T).argmin(-1)
    assert not torch.equal(single, wanted)  # what the float64 product is for


@every_search
def test_a_query_leaves_gradients_and_rows_alone(search: str) -> None:
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    before = rows.clone()
    query = rows[:4].clone().requires_grad_()
    found = SEARCHES[search](rows).nearest(query)
    assert found.tolist() == [0, 1, 2, 3]
    assert not found.requires_grad
    assert torch.equal(rows, before)


@every_search
def test_wrong_questions(search: str) -> None:
    index = SEARCHES[search](torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"\[B, 2\]"):
        index.nearest(torch.zeros(4, 3))
    for k in (0, 4):
        with pytest.raises(ValueError, match=r"k is in 1\.\.3"):
            index.nearest(torch.zeros(4, 2), k)


def test_who_is_chosen_and_what_it_reads() -> None:
    rows = torch.zeros(3, 2)
    assert isinstance(neighbours(rows), Tree)
    assert isinstance(neighbours(rows, "tree"), Tree)
    assert isinstance(neighbours(rows, "matrix"), Matrix)
    assert isinstance(neighbours(torch.zeros(3, 64)), Tree)
    assert isinstance(neighbours(torch.zeros(3, 65)), Matrix)
    assert isinstance(neighbours(torch.zeros(3, 65), "tree"), Tree)
    assert Tree.host_reads
    assert not Matrix.host_reads
    assert isinstance(neighbours(torch.zeros(3, 2, device="meta")), Matrix)  # any other device
