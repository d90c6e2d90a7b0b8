"""Shared by all tests: one torch thread (tests run side by side), reproducible draws, float64 on demand."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("rlctl", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("rlctl")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same draws on every run; another RLCTL_TEST_SEED shows which tests lean on these."""
    torch.manual_seed(int(os.environ.get("RLCTL_TEST_SEED", "0")))


@pytest.fixture
def double() -> Iterator[None]:
    """New tensors and networks are float64 while the test runs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
