"""Nearest neighbours: the numbers of a small table, both searches against a slow reference, what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlctl.data.neighbours import Matrix, Neighbours, Shortlist, Tree, _ByTree, _Groups, neighbours

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


# ---------------------------------------------------------------------------------------------------------- short lists
def own_states(rows: Tensor, state_dim: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Queries that have the state of a row and its action moved by noise of the given std; and those rows."""
    g = torch.Generator().manual_seed(seed)
    row = torch.randint(len(rows), (60,), generator=g)
    query = rows[row].clone()
    query[:, state_dim:] += spread * torch.randn(60, rows.shape[1] - state_dim, generator=g)
    return query, row


@pytest.mark.parametrize("search", [_ByTree, _Groups])
@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0, 7.5])
@pytest.mark.parametrize(("size", "spread"), [(1, 0.3), (8, 0.3), (8, 2.0), (64, 1.0), (1000, 1.0)])
def test_short_lists_against_all_distances(
    size: int, spread: float, beta: float, search: type[_ByTree | _Groups]
) -> None:
    """Whether the list settles all, some or none of the queries: the answer is that of the whole table."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 5, generator=g) * torch.tensor([beta] * 3 + [1.0] * 2)
    index = Shortlist(rows, 3, size, search(rows[:, :3].double()))
    for seed in (1, 2):  # the second time some lists are there already
        query, row = own_states(rows, 3, spread, seed)
        ranked = by_hand(rows, query).argsort(-1)
        for k in (1, 3):
            assert torch.equal(index.nearest(query, k, row), ranked[:, k - 1])
            assert torch.equal(index.nearest(query, k), ranked[:, k - 1])
    elsewhere = query + 0.1
    row = torch.where(torch.arange(60) % 2 == 0, row, -1)
    elsewhere[::2] = query[::2]
    assert torch.equal(index.nearest(elsewhere, 1, row), by_hand(rows, elsewhere).argmin(-1))


def test_a_list_that_settles_a_query_does_not_ask_the_tree() -> None:
    rows = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    index = Shortlist(rows, 3, 32)
    asked: list[int] = []
    inner = index.whole.nearest
    index.whole.nearest = lambda q, k=1, row=None: (asked.append(len(q)), inner(q, k))[1]  # type: ignore[method-assign]
    query, row = own_states(rows, 3, 1e-3, 1)
    assert torch.equal(index.nearest(query, 1, row), row)
    assert asked == []
    assert int((index.reach >= 0).sum()) == len(row.unique())
    far, row = own_states(rows, 3, 1.0, 1)
    index.nearest(far, 1, row)
    assert 0 < sum(asked) < 60


def test_how_near_states_are_found_goes_by_their_dimension() -> None:
    rows = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
    assert isinstance(Shortlist(rows, 12).search, _ByTree)
    assert isinstance(Shortlist(rows, 13).search, _Groups)


@pytest.mark.parametrize("size", [1, 5, 32, 70])
def test_groups_find_the_states_that_a_tree_finds(size: int) -> None:
    """Also with a last group that is not full, far from the origin, and where float32 cannot tell rows apart."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(70, 6, generator=g).double().repeat(45, 1)[:3001] + 1e-3 * torch.randn(3001, 6, generator=g)
    for states in (torch.randn(3001, 17, generator=g).double(), rows, rows + 300, rows[:70]):
        near, square, reach = _Groups(states).lists(states[:50], size)
        distances = (states[:50, None] - states).square().sum(-1).sort(-1)
        torch.testing.assert_close(square, distances.values[:, :size], rtol=1e-9, atol=1e-12)
        assert torch.equal((states[near] - states[:50, None]).square().sum(-1), square)
        beyond = torch.ones(50, len(states), dtype=torch.bool).scatter_(1, near, False)
        others = (states[:50, None] - states).square().sum(-1).where(beyond, torch.inf).amin(-1)
        assert (reach <= others + 1e-9).all()
        assert (reach >= 0).all()
    assert (_Groups(states).lists(states[:50], 5)[2] > 0).any()


def test_what_float32_confuses_changes_no_answer() -> None:
    """Clouds a thousandth wide along 600: |x|^2 is up to 9e4, known to float32 to 0.008. Each cloud has a row in each
    of ten groups, of which a list of one looks into nine: at times not into that of the nearest state."""
    own = torch.arange(320)
    states = 1e-3 * torch.randn(320, 13, generator=torch.Generator().manual_seed(0)).double()
    states[:, 0] += 20 * (own % _Groups.GROUP)
    near, _, reach = _Groups(states).lists(states, 1)
    assert not torch.equal(near[:, 0], own)
    others = (states[:, None] - states).square().sum(-1).scatter(1, near, torch.inf).amin(-1)
    assert (reach <= others).all()
    rows = torch.cat([states, torch.zeros(320, 1)], -1)
    assert torch.equal(Shortlist(rows, 13, 1, _Groups(states)).nearest(rows, 1, own), own)


def test_short_lists_with_equal_states() -> None:
    """Copies of one state fill a list of radius 0: only an action at distance 0 is settled by it."""
    g = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.zeros(50, 3), torch.randn(50, 2, generator=g)], -1)
    rows = torch.cat([rows, torch.randn(50, 5, generator=g)])
    query, row = own_states(rows, 3, 0.5, 3)
    got = Shortlist(rows, 3, 8).nearest(query, 1, row)
    true = by_hand(rows, query)
    torch.testing.assert_close(true.gather(1, got[:, None])[:, 0], true.min(-1).values)


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
    assert isinstance(neighbours(rows, state_dim=1), Shortlist)
    assert isinstance(neighbours(torch.zeros(3, 65), state_dim=1), Matrix)
    assert Shortlist.host_reads
    with pytest.raises(ValueError, match="state_dim"):
        neighbours(rows, "shortlist")
    assert isinstance(neighbours(rows, "matrix"), Matrix)
    assert isinstance(neighbours(torch.zeros(3, 64)), Tree)
    assert isinstance(neighbours(torch.zeros(3, 65)), Matrix)
    assert isinstance(neighbours(torch.zeros(3, 65), "tree"), Tree)
    assert Tree.host_reads
    assert not Matrix.host_reads
    assert isinstance(neighbours(torch.zeros(3, 2, device="meta")), Matrix)  # any other device
