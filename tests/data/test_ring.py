import copy
from collections import deque
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlctl.data import Mix, Ring
from rlctl.data.ring import planned_bytes, refuse_if_too_large
from rlctl.types import Batch, Spec


def batch(*ids: int, **extra: float) -> Batch:
    """Transitions whose every number is their id."""
    i = torch.tensor(ids, dtype=torch.float32)
    return Batch(
        i[:, None].expand(-1, 3),
        i[:, None].expand(-1, 2),
        i,
        i[:, None].expand(-1, 3) + 0.5,
        i.long() % 2 == 0,
        i.long() % 3 == 0,
        extra={k: i + x for k, x in extra.items()},
    )


def ids(ring: Ring) -> list[int]:
    """Ids held, oldest first; checks that the columns agree with one another."""
    rows = ring.whole()
    i = rows.reward
    assert torch.equal(rows.obs, i[:, None].expand(-1, 3))
    assert torch.equal(rows.action, i[:, None].expand(-1, 2))
    assert torch.equal(rows.next_obs, rows.obs + 0.5)
    assert torch.equal(rows.terminated, i.long() % 2 == 0)
    assert torch.equal(rows.truncated, i.long() % 3 == 0)
    start = ring.cursor if len(ring) == ring.capacity else 0
    return [int(x) for x in i.roll(-start)]


@given(capacity=st.integers(1, 12), sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12))
def test_ring_holds_the_last_rows(capacity: int, sizes: list[int]) -> None:
    ring, reference = Ring(capacity), deque[int](maxlen=capacity)
    for size in sizes:
        n = min(size, capacity)
        new = range(ring.added, ring.added + n)
        ring.add(batch(*new))
        reference.extend(new)
        assert ids(ring) == list(reference)
        assert len(ring) == len(reference)


def test_ring_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="capacity=0"):
        Ring(0)
    with pytest.raises(ValueError, match="cannot add 3 transitions at once to a ring of 2"):
        Ring(2).add(batch(1, 2, 3))
    with pytest.raises(RuntimeError, match="empty"):
        Ring(2).sample(1)


def test_rows_are_copies_and_extras_come_along() -> None:
    ring, first = Ring(3), batch(1, 2, logp=0.25)
    first = first.map(torch.clone)
    ring.add(first)
    first.obs.fill_(99)
    assert ids(ring) == [1, 2]
    assert ring.sample(4).extra["logp"].shape == (4,)
    assert ring.whole().extra["logp"].tolist() == [1.25, 2.25]


def test_sampling_covers_what_is_held_and_nothing_else() -> None:
    ring = Ring(50)
    ring.add(batch(*range(10)))
    seen = ring.sample(5000).reward.long()
    counts = torch.bincount(seen, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 400


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_mix_takes_its_share(share: float) -> None:
    fixed, ring = Ring(8, seed=1), Ring(8, seed=2)
    fixed.add(batch(*range(100, 108), logp=0.5))
    mix = Mix(fixed, ring, share)
    mix.add(batch(*range(8), logp=0.5))
    assert len(mix) == 8
    assert len(fixed) == 8
    for n in (1, 5, 10, 256):
        got = mix.sample(n)
        old = got.reward >= 100
        assert len(old) == n
        assert int(old.sum()) == round(share * n)
        assert torch.equal(got.extra["logp"], got.reward + 0.5)
        assert torch.equal(got.next_obs, got.obs + 0.5)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_mix_refuses_a_share_outside_the_unit_interval(share: float) -> None:
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        Mix(Ring(1), Ring(1), share)


# ---------------------------------------------------------------------------------------------------- checkpoint
@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlctl.data.ring.SEGMENT", 4)


def restored(folder: Path, capacity: int) -> Ring:
    ring = Ring(capacity, seed=77)
    ring.load(folder)
    return ring


def save(ring: Ring, folder: Path, previous: Path | None = None) -> Path:
    folder.mkdir()
    ring.save(folder, previous)
    return folder


@pytest.mark.usefixtures("small_segments")
def test_a_checkpoint_links_what_did_not_change(tmp_path: Path) -> None:
    ring = Ring(14)  # segments of 4, 4, 4 and 2 rows
    ring.add(batch(*range(6)))
    a = save(ring, tmp_path / "a")
    ring.add(batch(6))  # within the half-filled segment 1
    b = save(ring, tmp_path / "b", a)
    ring.add(batch(7, 8, 9, 10, 11, 12))  # fills 1, then 2, then a part of 3
    c = save(ring, tmp_path / "c", b)
    ring.add(batch(13, 14))  # the last row, then wraps into segment 0
    d = save(ring, tmp_path / "d", c)
    e = save(ring, tmp_path / "e", d)  # nothing new

    def same(x: Path, y: Path) -> list[bool]:
        return [(y / f.name).exists() and f.samefile(y / f.name) for f in sorted(x.glob("segment-*"))]

    assert same(b, a) == [True, False]
    assert same(c, b) == [True, False, False, False]
    assert same(d, c) == [False, True, True, False]
    assert all(same(e, d))
    for folder, held in [(a, range(6)), (b, range(7)), (c, range(13)), (d, range(1, 15)), (e, range(1, 15))]:
        assert ids(restored(folder, 14)) == list(held)


@pytest.mark.usefixtures("small_segments")
def test_a_checkpoint_survives_without_the_one_before(tmp_path: Path) -> None:
    ring = Ring(8)
    ring.add(batch(*range(8)))
    a = save(ring, tmp_path / "a")
    ring.add(batch(8))
    b = save(ring, tmp_path / "b", a)
    for file in a.iterdir():
        file.unlink()
    assert ids(restored(b, 8)) == list(range(1, 9))


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 19),
    adds=st.lists(st.lists(st.integers(0, 19), max_size=3), min_size=1, max_size=6),
    resume=st.booleans(),
)
def test_chains_of_checkpoints_restore_exactly(
    tmp_path_factory: pytest.TempPathFactory, capacity: int, adds: list[list[int]], resume: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlctl.data.ring.SEGMENT", 4)
        root, ring, previous = tmp_path_factory.mktemp("chain"), Ring(capacity), None
        for k, sizes in enumerate(adds):
            for n in sizes:
                n = min(n, capacity)
                ring.add(batch(*range(ring.added, ring.added + n), logp=0.25))
            previous = save(ring, root / str(k), previous)
            again = restored(previous, capacity)
            assert (again.size, again.cursor, again.added) == (ring.size, ring.cursor, ring.added)
            if ring.size:
                assert ids(again) == ids(ring)
                assert torch.equal(again.whole().extra["logp"], ring.whole().extra["logp"])
            if resume:
                ring = again


def test_resumed_sampling_is_bit_equal(tmp_path: Path) -> None:
    ring = Ring(16, seed=5)
    ring.add(batch(*range(10)))
    ring.sample(3)
    again = restored(save(ring, tmp_path / "a"), 16)
    for r in (ring, again):
        r.add(batch(10, 11))
    assert torch.equal(ring.sample(64).reward, again.sample(64).reward)


def test_another_capacity_is_refused(tmp_path: Path) -> None:
    ring = Ring(4)
    ring.add(batch(1))
    folder = save(ring, tmp_path / "a")
    with pytest.raises(ValueError, match="capacity 4, this one 5: resume with the buffer_size"):
        Ring(5).load(folder)


def test_extras_are_told_apart_by_name_after_a_resume(tmp_path: Path) -> None:
    ring = Ring(4)
    ring.add(batch(1, z=0.1, a=0.2))
    again = restored(save(ring, tmp_path / "a"), 4)
    again.add(batch(2, z=0.1, a=0.2))
    torch.testing.assert_close(again.whole().extra["z"], torch.tensor([1.1, 2.1]))
    torch.testing.assert_close(again.whole().extra["a"], torch.tensor([1.2, 2.2]))


def test_extras_are_told_apart_by_name_in_any_order() -> None:
    ring = Ring(4)
    ring.add(batch(1, z=0.1, a=0.2))
    ring.add(batch(2, a=0.2, z=0.1))
    torch.testing.assert_close(ring.whole().extra["z"], torch.tensor([1.1, 2.1]))


def test_mix_restores_both_generators(tmp_path: Path) -> None:
    mixes = []
    for seed in (1, 11):
        fixed, ring = Ring(8, seed=seed), Ring(8, seed=seed + 1)
        fixed.add(batch(*range(100, 108)))
        ring.add(batch(*range(8)))
        mixes.append(Mix(fixed, ring, 0.5))
    mixes[0].sample(6)
    mixes[0].save(tmp_path)
    mixes[1].load(tmp_path)
    assert torch.equal(mixes[0].sample(64).reward, mixes[1].sample(64).reward)


# -------------------------------------------------------------------------------------------------------- memory
def test_planned_bytes_are_what_a_ring_takes() -> None:
    ring = Ring(10)
    ring.add(batch(1))
    assert planned_bytes(Spec(obs_dim=3, act_dim=2), 10) == sum(x.nbytes for x in ring.rows[:6])


def test_a_ring_beyond_the_memory_is_refused_before_it_starts() -> None:
    spec = Spec(obs_dim=3, act_dim=2)
    assert refuse_if_too_large(spec, 1000) == planned_bytes(spec, 1000)
    with pytest.raises(MemoryError, match="--set buffer_size="):
        refuse_if_too_large(copy.copy(spec), 10**15)
