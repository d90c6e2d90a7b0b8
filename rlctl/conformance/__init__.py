"""The conformance suite: what an algorithm, an environment or a dataset must keep to work with everything else.

    for result in check_algo("my_pkg.my_file:MyAgent"):
        print(result.line())

The same checks are the project's own tests of everything it registers; `rlctl check` runs them on anything that can be
named, plug-ins included. A check is a function of the name; its docstring says what it looks for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from rlctl.conformance.results import Check, CheckFailed, Result, Skip, run_checks
from rlctl.conformance.settings import Traits, override

__all__ = ["Check", "CheckFailed", "Result", "Skip", "Traits", "check_algo", "check_dataset", "check_env"]


def check_algo(name: str, only: Collection[str] = (), *, solve: Mapping[str, Any] | None = None) -> Iterator[Result]:
    """Check an algorithm: a name of `rlctl algos` or `package.module:Class`. Yields as results come.

    `solve` are settings with which it solves the probe environments, over those it is known to need (`Traits`).
    """
    from rlctl.conformance.algo import CHECKS

    with override(name, solve or {}):
        yield from run_checks(CHECKS, name, only)


def check_env(name: str, only: Collection[str] = (), *, options: Mapping[str, Any] | None = None) -> Iterator[Result]:
    """Check an environment: any name that `rlctl_envs.make` takes; `options` are its keyword arguments."""
    from rlctl.conformance.env import CHECKS, Subject

    yield from run_checks(CHECKS, Subject(name, dict(options or {})), only)


def check_dataset(
    name: str,
    only: Collection[str] = (),
    *,
    episode_len: int | None = None,
    reward_range: tuple[float, float] | None = None,
) -> Iterator[Result]:
    """Check a dataset: a Minari or D4RL id, or a file. The parameters are those of `rlctl.data.inspect.verify`."""
    from rlctl.conformance.dataset import CHECKS, Subject

    subject = Subject(name, episode_len, reward_range)
    _ = subject.findings  # no dataset of that name is the caller's mistake, not a failed check
    yield from run_checks(CHECKS, subject, only)


def names(kind: str) -> list[str]:
    """The names of the checks of a kind: algo, env or dataset."""
    from rlctl.conformance import algo, dataset, env

    of: dict[str, Mapping[str, Callable[[Any], None]]] = {
        "algo": algo.CHECKS,
        "env": env.CHECKS,
        "dataset": dataset.CHECKS,
    }
    return list(of[kind])
