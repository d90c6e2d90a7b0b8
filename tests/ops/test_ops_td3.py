"""The pieces of TD3: hand numbers, and the bounds they promise."""

from __future__ import annotations

import pytest
import torch

from rlctl.ops.td3 import clipped_double_backup, scaled_value_loss, smoothed


def test_smoothed_by_hand(double: None) -> None:
    """Noise of std 0.2 is clipped to +-0.5, then the action to +-1."""
    action = torch.tensor([[0.9, -0.2], [0.0, 0.3], [-0.8, 0.1]])
    noise = torch.tensor([[5.0, -0.5], [1.0, -9.0], [-2.0, 0.0]])
    expected = torch.tensor([[1.0, -0.3], [0.2, -0.2], [-1.0, 0.1]])
    torch.testing.assert_close(smoothed(action, noise, 0.2, 0.5), expected)


def test_backup_by_hand(double: None) -> None:
    """The smaller critic counts, and nothing does behind a termination."""
    reward, terminated = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, True, False])
    q_next = torch.tensor([[2.0, 5.0, 1.0], [3.0, 4.0, 0.0]])
    assert clipped_double_backup(reward, terminated, q_next, 0.9).tolist() == pytest.approx([2.8, 2.0, 3.0])


def test_scaled_value_by_hand(double: None) -> None:
    """Q = [1, -2, 3], alpha 2.5: lambda 1.25, loss -1.25 * 2 / 3; the gradient treats lambda as a constant."""
    q = torch.tensor([1.0, -2.0, 3.0]).requires_grad_()
    loss = scaled_value_loss(q, 2.5)
    assert float(loss.detach()) == pytest.approx(-1.25 * 2 / 3, abs=1e-12)
    assert torch.autograd.grad(loss, q)[0].tolist() == pytest.approx([-1.25 / 3] * 3)


def test_scaled_value_of_nothing_is_finite() -> None:
    assert float(scaled_value_loss(torch.zeros(4), 2.5)) == 0.0
