"""Expectile loss, weights of weighted cloning, the conservative gap, ensemble diversity: numbers, slow references."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import expectile
from torch import Tensor

from rlctl.ops.offline import awr_weight, conservative_gap, ensemble_diversity, expectile_loss, sampled_backup

pytestmark = pytest.mark.usefixtures("double")


# ---------------------------------------------------------------------------------------------------------- expectiles
@pytest.mark.parametrize(("tau", "loss"), [(0.7, 1.0916666667), (0.9, 1.3083333333)])
def test_expectile_loss_by_number(tau: float, loss: float) -> None:
    assert float(expectile_loss(torch.tensor([-1.0, 0.5, 2.0]), tau)) == pytest.approx(loss, abs=1e-9)


def test_the_half_expectile_is_half_the_mean_square() -> None:
    u = torch.randn(50)
    assert float(expectile_loss(u, 0.5)) == pytest.approx(0.5 * float(u.square().mean()), rel=1e-12)


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.7, 0.9, 0.99])
def test_the_minimiser_is_the_expectile(tau: float) -> None:
    targets = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2 + 0.5
    known = float(expectile(targets.numpy(), alpha=tau))
    for shift, at_minimum in ((0.0, True), (0.05, False), (-0.05, False)):
        v = torch.tensor(known + shift, requires_grad=True)
        (g,) = torch.autograd.grad(expectile_loss(targets - v, tau), v)
        assert (abs(float(g)) < 1e-8) == at_minimum
        if not at_minimum:
            assert float(g) * shift > 0


# ----------------------------------------------------------------------------------------------------- weighted cloning
@pytest.mark.parametrize(
    ("beta", "weights"), [(3.0, [0.049787, 1.0, 2.459603, 100.0]), (10.0, [0.000045, 1.0, 20.085537, 100.0])]
)
def test_awr_weights_by_number(beta: float, weights: list[float]) -> None:
    assert awr_weight(torch.tensor([-1.0, 0.0, 0.3, 2.0]), beta).tolist() == pytest.approx(weights, abs=1e-6)


def test_awr_weights_are_bounded_and_constants() -> None:
    adv = torch.tensor([-1e6, 0.0, 1e6], requires_grad=True)
    weight = awr_weight(adv, 10.0)
    assert weight.tolist() == [0.0, 1.0, 100.0]
    assert not weight.requires_grad
    assert awr_weight(adv, 0.0).tolist() == [1.0, 1.0, 1.0]
    assert float(awr_weight(torch.tensor(5.0), 1.0, bound=7.0)) == 7.0


# ----------------------------------------------------------------------------------------------------------- pessimism
def candidates() -> tuple[Tensor, Tensor, Tensor]:
    """Two random, two next-policy, two policy actions at one state with A = 2: values, log-densities, data value."""
    q = torch.tensor([1.0, 2.0, 0.0, 2.5, 0.5, 1.5])
    log_density = torch.tensor([-2 * math.log(2), -2 * math.log(2), -0.5, 0.2, -1.0, 0.3])
    return q[None], log_density[None], torch.tensor([1.2])


def test_conservative_gap_by_number() -> None:
    q, log_density, data = candidates()
    gap = conservative_gap(q, data, log_density)
    assert float(gap + data) == pytest.approx(4.0919092898, abs=1e-9)
    assert float(gap) == pytest.approx(2.8919092898, abs=1e-9)
    assert 5 * float(gap) == pytest.approx(14.4595464491, abs=1e-9)


def test_conservative_gap_without_densities_and_with_the_data_action() -> None:
    q, _, data = candidates()
    gap = conservative_gap(torch.cat([q, data[:, None]], -1), data)
    assert float(gap) == pytest.approx(2.2886085417, abs=1e-9)


def test_conservative_gap_of_values_with_a_floor_on_the_policy_actions() -> None:
    """What a calibrated variant feeds in: the four policy entries at least 1.8."""
    q, log_density, data = candidates()
    floored = torch.cat([q[:, :2], q[:, 2:].clamp(min=1.8)], -1)
    assert float(conservative_gap(floored, data, log_density)) == pytest.approx(3.1981958611, abs=1e-9)


@pytest.mark.parametrize(("num", "act_dim", "c"), [(10, 3, 0.7), (4, 1, -50.0)])
def test_conservative_gap_of_a_constant_and_random_actions(num: int, act_dim: int, c: float) -> None:
    """LSE = c + log n + A log 2."""
    q = torch.full((2, 5, num), c)
    gap = conservative_gap(q, torch.zeros(2, 5), torch.full((5, num), -act_dim * math.log(2)))
    torch.testing.assert_close(gap, torch.full((2, 5), c + math.log(num) + act_dim * math.log(2)))


def test_conservative_gap_ignores_a_constant_in_q() -> None:
    q, data, mu = torch.randn(2, 5, 7), torch.randn(2, 5), torch.randn(5, 7)
    for temperature in (0.5, 1.0):
        plain = conservative_gap(q, data, mu, temperature)
        torch.testing.assert_close(conservative_gap(q + 300, data + 300, mu, temperature), plain, rtol=0, atol=1e-9)


def test_conservative_gap_at_a_temperature() -> None:
    """Slow reference; as T -> 0 it becomes the largest entry less the data value."""
    q, data, mu = torch.randn(2, 3, 4), torch.randn(2, 3), torch.randn(3, 4)
    gap = conservative_gap(q, data, mu, 0.3)
    for e in range(2):
        for b in range(3):
            total = sum(math.exp((float(q[e, b, k]) - float(mu[b, k])) / 0.3) for k in range(4))
            assert float(gap[e, b]) == pytest.approx(0.3 * math.log(total) - float(data[e, b]), rel=1e-9)
    torch.testing.assert_close(conservative_gap(q, data, mu, 1e-6), (q - mu).amax(-1) - data, rtol=0, atol=1e-5)


def test_conservative_gap_has_a_floor_per_sample() -> None:
    q, data = torch.zeros(1, 2, 3, requires_grad=True), torch.tensor([[500.0, 0.0]], requires_grad=True)
    gap = conservative_gap(q, data, floor=-200.0)
    assert gap[0].tolist() == pytest.approx([-200.0, math.log(3)])
    g_q, g_data = torch.autograd.grad(gap.sum(), [q, data])
    assert g_q[0].tolist() == [[0.0] * 3, pytest.approx([1 / 3] * 3)]
    assert g_data[0].tolist() == [0.0, -1.0]


def test_sampled_backups_by_number() -> None:
    """Critics [1, 5] and [4, 2] at two actions: best per critic is 5 and 4, smallest per action 1 and 2."""
    q = torch.tensor([[[1.0, 5.0]], [[4.0, 2.0]]])
    assert sampled_backup(q, "max-min").tolist() == [4.0]
    assert sampled_backup(q, "min-max").tolist() == [2.0]
    q = torch.randn(3, 50, 6)
    assert bool((sampled_backup(q, "max-min") >= sampled_backup(q, "min-max")).all())


def test_diversity_by_number() -> None:
    """<u1, u2> = 0.6, <u2, u3> = 0.8, <u1, u3> = 0: twice 1.4, over E - 1 = 2. Lengths do not count."""
    slopes = torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]], [[0.0, 1.0]]])
    assert float(ensemble_diversity(slopes)) == pytest.approx(1.4, abs=1e-12)
    assert float(ensemble_diversity(slopes * torch.tensor([0.1, 7.0, 300.0])[:, None, None])) == pytest.approx(1.4)


def test_diversity_of_the_extremes() -> None:
    same = torch.randn(1, 6, 3).expand(5, 6, 3)
    assert float(ensemble_diversity(same)) == pytest.approx(5.0)  # E (E - 1) / (E - 1)
    assert float(ensemble_diversity(torch.eye(4)[:, None, :])) == pytest.approx(0.0, abs=1e-12)
    opposed = torch.stack([same[0], -same[0]])
    assert float(ensemble_diversity(opposed)) == pytest.approx(-2.0)


def test_diversity_equals_the_table_of_pairs() -> None:
    slopes = torch.randn(5, 7, 3)
    u = slopes / slopes.norm(dim=-1, keepdim=True)
    pairs = torch.stack([(u[i] * u[j]).sum(-1) for i in range(5) for j in range(5) if i != j])
    assert float(ensemble_diversity(slopes)) == pytest.approx(float(pairs.sum(0).mean() / 4), rel=1e-12)


def test_diversity_where_a_critic_is_flat() -> None:
    slopes = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]]], requires_grad=True)
    value = ensemble_diversity(slopes)
    (g,) = torch.autograd.grad(value, slopes)
    assert float(value.detach()) == 0.0
    assert bool(g.isfinite().all())
