"""`rlctl new algo`: what it writes is found by name, passes the checks, and trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_helpers import QUICK, Cli

from rlctl.conformance import check_algo, names
from rlctl.conformance.probes import write_dataset
from rlctl.templates import REGIMES

SMALL = {
    "on_policy": ["horizon=64", "num_envs=4"],
    "off_policy": ["learning_starts=50", "batch_size=32"],
    "offline": [],
}


def installed(folder: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an installer leaves: the package on the path, and its entry points beside it."""
    import tomllib

    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["rlctl.algos"]
    (info / "entry_points.txt").write_text("[rlctl.algos]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    for path in (site, folder):
        monkeypatch.syspath_prepend(path)


@pytest.mark.parametrize("regime", REGIMES)
def test_the_package_is_found_passes_and_trains(
    regime: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"brand-new-{regime.replace('_', '-')}"
    r = cli("new", "algo", name, "--regime", regime, "--out", "src")
    assert (r.code, r.err) == (0, "")
    folder = tmp_path / "src" / name
    text = "".join(p.read_text() for p in folder.rglob("*") if p.is_file())
    assert "my-algo" not in text
    assert "MyAlgo" not in text
    assert "my_algo" not in text

    installed(folder, tmp_path / "site", monkeypatch)
    assert name in {row["name"] for row in cli("algos", "--json").json["algorithms"]}
    quick = [c for c in names("algo") if not c.startswith("probe-")]
    r = cli("check", "algo", name, "--json", *[x for c in quick for x in ("--only", c)])
    assert r.code == 0, r.out
    assert r.json["fail"] == 0

    config = next((folder / "configs").iterdir())
    assert yaml.safe_load(config.read_text())["algo"] == name
    sets = [*QUICK, "steps=300", "run.eval_every=0", *SMALL[regime]]
    args: list[str | Path] = [
        "train",
        "--config",
        config,
        "--out",
        "run",
        "--quiet",
        *[x for s in sets for x in ("--set", s)],
    ]
    if regime == "offline":
        args += ["--data", write_dataset(tmp_path / "data.npz"), "--env", "probe:both"]
    r = cli(*args)
    assert r.code == 0, r.err
    assert (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
def test_the_template_passes_every_check(regime: str) -> None:
    failed = [r.line() for r in check_algo(f"rlctl.templates.{regime}:MyAlgo") if not r.ok]
    assert failed == []


@pytest.mark.slow
def test_it_installs_with_pip(cli: Cli, tmp_path: Path) -> None:
    """By pip into a folder of its own (needs the package index, for the build backend)."""
    assert cli("new", "algo", "brand-new").code == 0
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, tmp_path / "brand-new"]
    subprocess.run(pip, check=True)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from rlctl import agents; print(agents.get('brand-new'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "brand_new.agent.BrandNew" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["My_Algo"], "lower-case"),
        (["sac"], "already"),
        (["numpy"], "installed already"),
        (["fine", "--regime", "online"], "on_policy, off_policy, offline"),
    ],
)
def test_refusals(args: list[str], message: str, cli: Cli, tmp_path: Path) -> None:
    r = cli("new", "algo", *args)
    assert r.code == 2
    assert message in r.err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(cli: Cli) -> None:
    assert cli("new", "algo", "fine").code == 0
    r = cli("new", "algo", "fine")
    assert r.code == 2
    assert "exists" in r.err
