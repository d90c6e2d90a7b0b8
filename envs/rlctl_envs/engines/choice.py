"""Which engine simulates: the CPU's or the GPU's. Imports neither."""

from __future__ import annotations

import functools
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch

Backend: TypeAlias = Literal["auto", "cpu", "batch", "pool", "warp"]
"""auto: `choose`. cpu: MuJoCo on the CPU, by the faster of batch and pool that works. warp: MuJoCo Warp."""

EXTRA = "warp"
PACKAGES = {"warp": "warp-lang", "mujoco_warp": "mujoco-warp"}
"""Module to distribution."""

PROVISIONAL = 2048
"""Number of worlds from which the GPU is taken where nobody has measured: a guess, and announced as one. A step of one
world takes thousands of kernel launches, which a CPU undercuts, and of many worlds hardly more."""

_TABLE = Path(__file__).with_name("crossover.json")


class EngineUnavailable(ValueError):
    """This machine or installation lacks what the engine asked for needs; the message says what to do."""


@dataclass(frozen=True)
class Choice:
    """An engine and the reason for it."""

    backend: Backend
    why: str


@functools.cache
def crossovers() -> dict[str, dict[str, Any]]:
    """Measured by `benchmarks/speed/gpu.py`: task to the smallest number of worlds at which the GPU won.

    Keys of an entry: num_envs (None: it never did), gpu, cpu, cores. Empty as long as nobody has measured.
    """
    table: dict[str, dict[str, Any]] = json.loads(_TABLE.read_text())
    return table


def missing_packages() -> list[str]:
    """Distributions of the extra that are not installed."""
    return [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]


def require_warp(device: torch.device) -> None:
    """Raise EngineUnavailable unless MuJoCo Warp can run on `device` here."""
    if missing := missing_packages():
        raise EngineUnavailable(
            f"the warp engine needs {' and '.join(missing)}, of the extra '{EXTRA}': pip install 'rlctl[{EXTRA}]', "
            "or simulate on the CPU with --env-backend cpu."
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineUnavailable(
            f"the warp engine on {device} needs an NVIDIA GPU and a torch built for CUDA; this one, torch "
            f"{torch.__version__}, sees none. Use --device cpu (backend='cpu')."
        )


def choose(task: str, num_envs: int, device: torch.device | str, asked: Backend = "auto") -> Choice:
    """The engine for `num_envs` worlds of a simulated task ("Hopper", "dmc:walker-walk") with tensors on `device`.

    What is asked for by name is taken, or EngineUnavailable says what it lacks. "auto" takes the GPU where tensors live
    there, the packages are installed and so many worlds are wanted that it is the faster one by measurement.

    Raises ValueError for an engine that does not exist.
    """
    device = torch.device(device)
    if asked not in get_args(Backend):
        raise ValueError(f"backend is {asked!r}; it is one of {', '.join(get_args(Backend))}.")
    if asked == "warp":
        require_warp(device)
    if asked != "auto":
        slow = "; on the CPU it is for tests, and slow" if asked == "warp" and device.type == "cpu" else ""
        return Choice(asked, f"as asked{slow}")
    if device.type != "cuda":
        return Choice("cpu", "the device is the CPU")
    if missing := missing_packages():
        return Choice(
            "cpu", f"{' and '.join(missing)} not installed: pip install 'rlctl[{EXTRA}]' to simulate on a GPU"
        )
    measured = crossovers().get(task)
    if measured is None:
        side = "warp" if num_envs >= PROVISIONAL else "cpu"
        return Choice(
            side,  # type: ignore[arg-type]
            f"{num_envs} worlds, and the GPU is taken from {PROVISIONAL} on; that bound is a guess, nobody has "
            f"measured {task} (benchmarks/speed/gpu.py does)",
        )
    where = f"measured on {measured['gpu']} against {measured['cores']} cores of {measured['cpu']}"
    bound = measured["num_envs"]
    if bound is None:
        return Choice("cpu", f"the CPU was faster at every number of worlds tried, {where}")
    if num_envs >= bound:
        return Choice("warp", f"the GPU is faster from {bound} worlds on, {where}")
    return Choice("cpu", f"the CPU is faster below {bound} worlds, {where}")
