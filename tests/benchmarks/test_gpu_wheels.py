"""Packages for a machine without a registry: what goes along, and that the parts make the whole again."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = "speed/gpu_wheels"


@pytest.mark.parametrize(
    ("name", "goes"),
    [
        ("warp/bin/warp.so", True),
        ("warp/bin/warp-clang.so", False),
        ("warp/examples/core/x.py", False),
        ("mujoco_warp/_src/solver.py", True),
        ("mujoco_warp/_src/solver_test.py", False),
        ("dm_control/suite/hopper.xml", True),
        ("dm_control/suite/hopper.py", False),
        ("dm_control/__init__.py", True),
        ("warp/", False),
    ],
)
def test_what_goes_along(script: ModuleType, name: str, goes: bool) -> None:
    assert script.needed(name) is goes


@pytest.mark.parametrize("mib", [0, 1])
def test_unpacked_is_what_was_packed(script: ModuleType, tmp_path: Path, mib: int) -> None:
    noise = np.random.default_rng(0).bytes(3 * 2**20)  # which does not compress
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as z:
        z.writestr("warp/bin/warp.so", noise)
        z.writestr("warp/tests/x.py", "left out")
    archive = tmp_path / script.ARCHIVE
    size = script.pack([tmp_path / "a.whl"], archive)
    parts = script.cut(archive, mib) if mib else [archive]
    assert sum(p.stat().st_size for p in parts) == size
    assert len(parts) == (4 if mib else 1)
    script.unpack(argparse.Namespace(folder=tmp_path, target=tmp_path / "site"))
    found = [p for p in (tmp_path / "site").rglob("*") if p.is_file()]
    assert [p.relative_to(tmp_path / "site").as_posix() for p in found] == ["warp/bin/warp.so"]
    assert found[0].read_bytes() == noise


def test_a_part_that_is_missing_is_said(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / f"{script.ARCHIVE}.02of02").write_bytes(b"x")
    with pytest.raises(SystemExit, match="not all parts"):
        script.unpack(argparse.Namespace(folder=tmp_path, target=tmp_path / "site"))
    with pytest.raises(SystemExit, match="run `fetch`"):
        script.unpack(argparse.Namespace(folder=tmp_path / "none", target=tmp_path / "site"))
