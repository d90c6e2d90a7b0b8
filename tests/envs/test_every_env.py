"""What every environment must keep: the checks of `rlctl.conformance`, which `rlctl check env` runs."""

from __future__ import annotations

import pytest

from rlctl.conformance import Skip
from rlctl.conformance.env import CHECKS, Subject
from rlctl_envs import task_table

NAMES = [*(row["name"] for row in task_table()), "Pendulum-v1"]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", NAMES)
def test_check(name: str, check: str) -> None:
    try:
        CHECKS[check](Subject(name))
    except Skip as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ["Hopper", "Ant"])
def test_the_pool_of_simulations_too(name: str, check: str) -> None:
    CHECKS[check](Subject(name, {"backend": "pool"}))
