"""`rlctl check`: one line per check, an exit code, JSON; refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Cli

from rlctl.conformance import names

BROKEN = """
from rlctl.agents.sac import SAC

class Masks(SAC):
    def update(self, b):
        return super().update(b._replace(terminated=b.terminated | b.truncated))
"""


def test_a_line_per_check(cli: Cli) -> None:
    r = cli("check", "env", "probe:both")
    assert r.code == 0
    lines = [line for line in r.out.splitlines() if line[:4] in ("pass", "skip")]
    assert [line.split()[1] for line in lines] == names("env")
    assert "0 failed" in r.out


def test_a_file_of_ones_own_fails_with_the_reason(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BROKEN)
    r = cli("check", "algo", "mine:Masks", "--only", "truncation", "--only", "act")
    assert r.code == 1
    failed = next(line for line in r.out.splitlines() if line.startswith("fail"))
    assert "truncation" in failed
    assert "~terminated" in failed
    assert "1 passed, 1 failed" in r.out


def test_json(cli: Cli, tmp_path: Path) -> None:
    """Episodes that all end after the same few steps look like time limits recorded as ends."""
    rng, path = np.random.default_rng(0), tmp_path / "d.npz"
    columns = {"observations": rng.normal(size=(40, 3)), "actions": rng.uniform(-1, 1, (40, 2))}
    ends = np.arange(40) % 2 == 1
    np.savez(path, **columns, rewards=rng.normal(size=40), terminals=ends, timeouts=np.zeros(40, bool))
    r = cli("check", "dataset", path, "--json")
    assert r.code == 1
    found = json.loads(r.out)
    assert not found["ok"]
    assert [c["check"] for c in found["checks"]] == names("dataset")
    assert [c["check"] for c in found["checks"] if c["status"] == "fail"] == ["terminated"]
    assert found["fail"] == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["algo", "sacc"], "did you mean 'sac'"),
        (["algo", "sb3:ppo"], "a learner of another library"),
        (["algo", "nothing.here:Agent"], "no module"),
        (["env", "Hoper"], "Hopper"),
        (["algo", "sac", "--only", "probe-bth"], "probe-both"),
        (["dataset", "no/such-v0"], "no dataset 'no/such-v0'"),
    ],
)
def test_refusals(args: list[str], message: str, cli: Cli) -> None:
    r = cli("check", *args)
    assert r.code == 2, r.out
    assert message in r.err
