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


@pytest.mark.parametrize("name", ["evaluate", "accelerate"])
def test_functions_stand_before_the_modules_of_their_names(name: str) -> None:
    code = f"import rlctl; {{}}; print(type(rlctl.{name}).__name__)"
    for before in ("pass", f"import rlctl.{name}", f"from rlctl.{name} import {name}", f"rlctl.{name}"):
        assert run(code.format(before)) == "function"


def test_every_public_name_is_there() -> None:
    assert all(getattr(rlctl, name) is not None for name in rlctl.__all__)
    assert set(rlctl.__all__) <= set(dir(rlctl))
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_that_name'"):
        _ = rlctl.nothing_of_that_name
