"""What `rlctl new` writes from: working algorithms, in which only the name is to be replaced.

They are modules like any other, so they are linted, typed and checked with the rest.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
from importlib.resources import files
from pathlib import Path

from rlctl import __version__
from rlctl.errors import UsageError
from rlctl.types import Regime

REGIMES: tuple[Regime, ...] = ("on_policy", "off_policy", "offline")


def write_algo(name: str, regime: Regime, parent: Path) -> Path:
    """Write an installable package with the algorithm `name` (lower-case-with-dashes) into `parent/name`.

    Returns the folder. UsageError for a name that cannot be one, or is taken.
    """
    from rlctl import agents

    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise UsageError(f"'{name}' is no name for an algorithm: lower-case letters, digits and dashes, e.g. my-algo")
    if name in agents.names():
        raise UsageError(f"there is an algorithm '{name}' already: choose another name")
    if regime not in REGIMES:
        raise UsageError(f"no regime '{regime}': allowed are {', '.join(REGIMES)}")
    if importlib.util.find_spec(name.replace("-", "_")) is not None:
        raise UsageError(f"a module '{name.replace('-', '_')}' is installed already: choose another name")
    folder = parent / name
    if folder.exists():
        raise UsageError(f"{folder} exists: choose another name or --out")
    module, cls = name.replace("-", "_"), "".join(part.capitalize() for part in name.split("-"))
    tuned, how = TUNED[regime]
    texts = {
        "pyproject.toml": _PYPROJECT,
        "README.md": _README,
        f"{module}/__init__.py": _INIT,
        f"{module}/agent.py": files("rlctl.templates").joinpath(f"{regime}.py").read_text(),
        f"configs/{'Pendulum-v1' if regime != 'offline' else 'offline'}.yaml": tuned,
        f"tests/test_{module}.py": _TEST,
    }
    words = {"MyAlgo": cls, "my_algo": module, "my-algo": name, "{version}": __version__, "{how}": how}
    for path, text in texts.items():
        for word, replacement in words.items():
            text = text.replace(word, replacement)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


TUNED: dict[Regime, tuple[str, str]] = {
    "on_policy": (
        "# What differs from the defaults of MyAlgoConfig on this task.\nalgo: my-algo\nenv: Pendulum-v1\n"
        "agent:\n  steps: 100000\n  gamma: 0.9\n",
        "rlctl train --config configs/Pendulum-v1.yaml",
    ),
    "off_policy": (
        "# What differs from the defaults of MyAlgoConfig on this task.\nalgo: my-algo\nenv: Pendulum-v1\n"
        "agent:\n  steps: 20000\n  learning_starts: 1000\n  hidden: [64, 64]\n",
        "rlctl train --config configs/Pendulum-v1.yaml",
    ),
    "offline": (
        "# What differs from the defaults of MyAlgoConfig.\nalgo: my-algo\nagent:\n  steps: 100000\n",
        "rlctl train --config configs/offline.yaml --data DATASET",
    ),
}
"""The config of a new package, and how to use it."""

_PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"

[project]
name = "my-algo"
version = "0.1.0"
description = "The algorithm my-algo for rlctl."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["rlctl>={version}"]

[project.optional-dependencies]
test = ["pytest>=8"]

# This line is what makes `rlctl train --algo my-algo` find it.
[project.entry-points."rlctl.algos"]
my-algo = "my_algo.agent:MyAlgo"

[tool.hatch.build.targets.wheel]
packages = ["my_algo"]
"""

_README = """\
# my-algo

An algorithm for rlctl: `my_algo/agent.py` is all of it.

```sh
pip install -e .
rlctl check algo my-algo        # it solves the probe environments, resumes bit for bit, ...
{how}
pytest
```

Without installing it, from this folder: `rlctl train --algo my_algo.agent:MyAlgo ...`.
"""

_INIT = '''\
"""my-algo, an algorithm for rlctl."""

from my_algo.agent import MyAlgo, MyAlgoConfig

__all__ = ["MyAlgo", "MyAlgoConfig"]
'''

_TEST = '''\
"""my-algo keeps what rlctl builds on; add tests with your own numbers below."""

import pytest

from rlctl.conformance import check_algo, names

NAME = "my_algo.agent:MyAlgo"


@pytest.mark.parametrize("check", names("algo"))
def test_conformance(check: str) -> None:
    (result,) = check_algo(NAME, [check])
    if result.status == "skip":
        pytest.skip(result.reason)
    assert result.ok, result.line()
'''
