"""The frequency loss by hand numbers and its minimiser; the effective number of components."""

from __future__ import annotations

import math

import pytest
import torch

from rlctl.ops.mixtures import components_used, effective_components, frequency_loss

pytestmark = pytest.mark.usefixtures("double")


def test_frequency_loss_by_number() -> None:
    w, best = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]), torch.tensor([1, 2])
    assert float(frequency_loss(w, best)) == pytest.approx(0.2066667, abs=5e-8)
    assert 3 * float(frequency_loss(w, best)) == pytest.approx(0.62, abs=1e-12)  # the sum over components


def test_the_gate_learns_how_often_each_component_is_best() -> None:
    best = torch.tensor([0] * 7 + [1] * 2 + [2])
    frequencies = torch.tensor([0.7, 0.2, 0.1])
    for logits, fitted in ((frequencies.log(), True), (frequencies.log() + torch.tensor([0.1, 0.0, 0.0]), False)):
        x = logits.clone().requires_grad_()
        (g,) = torch.autograd.grad(frequency_loss(x.softmax(-1).expand(10, 3), best), x)
        assert (float(g.abs().max()) < 1e-12) == fitted
    x = torch.zeros(3).requires_grad_()
    for _ in range(500):
        (g,) = torch.autograd.grad(frequency_loss(x.softmax(-1).expand(10, 3), best), x)
        x = (x.detach() - 10 * g).requires_grad_()
    torch.testing.assert_close(x.softmax(-1).detach(), frequencies, rtol=0, atol=1e-5)


def test_one_component_has_no_gate_loss() -> None:
    assert float(frequency_loss(torch.ones(5, 1), torch.zeros(5, dtype=torch.int64))) == 0


def test_components_used_tells_a_gate_that_knows_from_one_that_guesses() -> None:
    assert float(components_used(torch.eye(3))) == pytest.approx(1.0, abs=1e-12)  # each sure in its own state
    assert float(components_used(torch.full((5, 4), 0.25))) == pytest.approx(4.0, abs=1e-12)
    assert float(components_used(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))) == pytest.approx(1.5, abs=1e-12)


def test_effective_components() -> None:
    alone = torch.tensor([[1.0, 0.0, 0.0]])
    assert float(effective_components(alone)) == 1.0
    assert float(effective_components(torch.full((5, 4), 0.25))) == pytest.approx(4.0, abs=1e-12)
    assert float(effective_components(torch.eye(3))) == pytest.approx(3.0, abs=1e-12)  # each in a state of its own
    half = torch.tensor([[0.5, 0.25, 0.25]])
    assert float(effective_components(half)) == pytest.approx(math.exp(1.0397207708), abs=1e-9)
