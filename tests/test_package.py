"""The package as it is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

import rlctl


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_command_line_loads_without_torch() -> None:
    heavy = ("torch", "mujoco", "gymnasium", "pydantic", "numpy")
    assert run(f"import sys, rlctl.cli; print([m for m in {heavy} if m in sys.modules])") == "[]"


@pytest.mark.parametrize("before", ["pass", "import rlctl.evaluate, rlctl.accelerate"])
def test_functions_stand_before_the_modules_of_their_names(before: str) -> None:
    kinds = run(f"import rlctl; {before}; print(*(type(f).__name__ for f in (rlctl.evaluate, rlctl.accelerate)))")
    assert kinds == "function function"


def test_every_public_name_is_there() -> None:
    assert all(getattr(rlctl, name) is not None for name in rlctl.__all__)
    assert set(rlctl.__all__) <= set(dir(rlctl))
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_that_name'"):
        _ = rlctl.nothing_of_that_name
