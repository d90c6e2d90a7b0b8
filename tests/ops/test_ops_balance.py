"""The coefficient of FamO2O: its encoding and its range by number."""

from __future__ import annotations

import pytest
import torch

from rlctl.ops.balance import ENCODING_DIM, conditioned, encoded, spanned, uniform

KNOWN = {
    2.0: [0.909297, -0.416147, 0.092699, 0.995694, 0.004309, 0.999991],
    11.0: [-0.99999, 0.004426, 0.488679, 0.872464, 0.023697, 0.999719],
}


def test_encoding_by_number(double: None) -> None:
    got = encoded(torch.tensor(list(KNOWN)))
    assert got.shape == (2, ENCODING_DIM)
    for row, known in zip(got, KNOWN.values(), strict=True):
        assert row.tolist() == pytest.approx(known, abs=1e-6)
    obs = torch.randn(2, 4)
    assert torch.equal(conditioned(obs, torch.tensor(list(KNOWN))), torch.cat([obs, got], -1))


def test_range(double: None) -> None:
    x = torch.tensor([-1.0, -0.5, 0.0, 1.0])
    assert spanned(x, 8.0, 14.0).tolist() == [8.0, 9.5, 11.0, 14.0]
    assert spanned(x, 0.5, 1.5).tolist() == [0.5, 0.75, 1.0, 1.5]
    g = torch.Generator().manual_seed(0)
    draw = uniform(torch.zeros(5000), 2.0, 5.0, g)
    assert 2.0 <= float(draw.min()) < 2.01
    assert 4.99 < float(draw.max()) < 5.0
    assert float(draw.mean()) == pytest.approx(3.5, abs=0.05)
    assert len(draw.unique()) > 4000  # one per row
