"""Names: from "Hopper", "dmc:hopper-stand", "probe:constant" or "Pendulum-v1" to an environment."""

from __future__ import annotations

import difflib
import functools
import importlib.util
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import gymnasium
import torch

from rlctl_envs.contract import VecEnv
from rlctl_envs.tasks import DMC_TASKS, TASKS, Task, build_task

if TYPE_CHECKING:
    from rlctl_envs.engines import Backend, Physics

ENTRY_POINT_GROUP = "rlctl.envs"
"""A package adds an environment by an entry point of this group: name -> factory(num_envs, **kwargs) -> VecEnv."""

PROBE_PREFIX = "probe:"
DMC_PREFIX = "dmc:"
_VERSION = "-v5"


class UnknownTask(ValueError):
    """No environment of that name; the message is one line and names the nearest."""


def make(
    name: str,
    num_envs: int = 1,
    *,
    seed: int | None = None,
    device: str | torch.device = "cpu",
    backend: Backend = "auto",
    threads: int | None = None,
    physics: Physics = "published",
    dtype: torch.dtype = torch.float32,
    **task_kwargs: Any,
) -> VecEnv:
    """Make N copies of an environment by name.

    Args:
        name: a MuJoCo task ("Hopper", "Hopper-v5"; case does not matter), one of the DeepMind Control Suite
            ("dmc:hopper-stand"; needs the extra `dmc`), "probe:NAME", a name added by an installed package, or any
            other Gymnasium id with Box observations and actions ("Pendulum-v1").
        num_envs: number of copies, N.
        seed: of the environments' random stream.
        device: where the returned tensors live.
        backend: who simulates: "cpu" (or one of its engines, "batch", "pool"), "warp" (a GPU), or "auto", which decides
            by `rlctl_envs.engines.choose`; MuJoCo tasks only, ignored by the others, as are the next two.
        threads: simulation threads; by default the cores available, at most N.
        physics: "published" restores the contact margins of published results on MuJoCo >= 3.5, "native" is what the
            installed Gymnasium computes.
        dtype: of observations and rewards: torch.float32 or torch.float64.
        **task_kwargs: settings of the task, such as `ctrl_cost_weight` or `episode_len`; of the warp engine (`nconmax`,
            `njmax`, `capture`; see `rlctl_envs.warp_vector`); for a Gymnasium id, its own keywords and `workers`.

    Raises:
        UnknownTask: no such name. ValueError: a setting or value that is not known, or an extra that is not installed.
        EngineUnavailable: the engine asked for lacks a package or a device here.
    """
    common: dict[str, Any] = {"seed": seed, "device": device, "dtype": dtype}
    simulated = _simulated(name)
    if simulated is not None:
        common |= {"env_id": simulated[0], "physics": physics, "episode_len": task_kwargs.pop("episode_len", None)}
        return _make_simulated(simulated[1], num_envs, name, backend, threads, task_kwargs, common)
    if backend == "warp":
        raise ValueError(f"{name} cannot be simulated on a GPU: only the MuJoCo tasks and dmc: tasks can.")
    if name.lower().startswith(PROBE_PREFIX):
        from rlctl_envs.probes import make_probe

        return make_probe(name[len(PROBE_PREFIX) :].lower(), num_envs, **common, **task_kwargs)
    plugin = _plugins().get(name)
    if plugin is not None:
        factory: Callable[..., VecEnv] = plugin.load()
        return factory(num_envs, **common, **task_kwargs)
    gymnasium_id = _gymnasium_id(name)
    if gymnasium_id is not None:
        from rlctl_envs.adapters.gymnasium import GymnasiumVecEnv

        return GymnasiumVecEnv(gymnasium_id, num_envs, **common, **task_kwargs)
    raise UnknownTask(_unknown(name))


WARP_OPTIONS = ("nconmax", "njmax", "capture")
COMMON_OPTIONS = ("physics", "episode_len")
"""Keywords that `make` takes for every simulated task."""


def _make_simulated(
    task: type[Task],
    num_envs: int,
    name: str,
    backend: Backend,
    threads: int | None,
    options: dict[str, Any],
    common: dict[str, Any],
) -> VecEnv:
    """Make a MuJoCo task on the engine that `backend` names or "auto" finds the faster one."""
    from rlctl_envs.engines import choose

    choice = choose(simulated_task(name) or name, num_envs, common["device"], backend)
    own = {key: options.pop(key) for key in WARP_OPTIONS if key in options}
    built = build_task(task, options, COMMON_OPTIONS)
    if choice.backend == "warp":
        from rlctl_envs.warp_vector import WarpVecEnv

        return WarpVecEnv(built, num_envs, **common, **own)
    if own:
        raise ValueError(f"{', '.join(own)}: options of the warp engine, but the CPU simulates ({choice.why}).")
    from rlctl_envs.vector import MujocoVecEnv

    return MujocoVecEnv(built, num_envs, backend=choice.backend, threads=threads, **common)


def simulated_task(name: str) -> str | None:
    """The MuJoCo task of that name ("Hopper" for "hopper-v5"), or None if it is another kind of environment."""
    simulated = _simulated(name)
    return None if simulated is None else simulated[0].removesuffix(_VERSION)


def canonical(name: str) -> str:
    """The one spelling of a name that `make` accepts: "hopper" is "Hopper-v5"; UnknownTask if there is none.

    It says nothing about whether the extra is installed that the environment needs.
    """
    simulated = _simulated(name)
    if simulated is not None:
        return simulated[0]
    if name.lower().startswith(PROBE_PREFIX):
        from rlctl_envs.probes import PROBES

        if name.lower().removeprefix(PROBE_PREFIX) in PROBES:
            return name.lower()
    elif name in _plugins():
        return name
    elif (gymnasium_id := _gymnasium_id(name)) is not None:
        return gymnasium_id
    raise UnknownTask(_unknown(name))


def task_table() -> list[dict[str, Any]]:
    """One row per environment of this package and its plug-ins, for listings; loads no simulator.

    Keys: name, id, obs_dim, act_dim, episode_len, engine, summary; sizes are None where only construction tells.
    """
    from rlctl_envs.probes import PROBES

    named = [(name, name + _VERSION, task) for name, task in TASKS.items()]
    named += [(DMC_PREFIX + name, DMC_PREFIX + name, task) for name, task in DMC_TASKS.items()]
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "id": env_id,
            "obs_dim": task.obs_dim,
            "act_dim": task.act_dim,
            "episode_len": task.episode_len,
            "engine": "mujoco",
            "summary": task.summary,
        }
        for name, env_id, task in named
    ]
    rows += [
        {
            "name": PROBE_PREFIX + name,
            "id": PROBE_PREFIX + name,
            "obs_dim": probe.probe_obs_dim,
            "act_dim": 1,
            "episode_len": probe.default_episode_len,
            "engine": "torch",
            "summary": probe.summary,
        }
        for name, probe in PROBES.items()
    ]
    rows += [
        {
            "name": name,
            "id": name,
            "obs_dim": None,
            "act_dim": None,
            "episode_len": None,
            "engine": "plug-in",
            "summary": f"added by {point.value}",
        }
        for name, point in _plugins().items()
    ]
    return rows


def register_with_gymnasium() -> None:
    """Register "rlctl/Hopper-v5" and the rest, for `gymnasium.make_vec("rlctl_envs:rlctl/Hopper-v5", num_envs=4)`.

    Gymnasium takes what stands before a colon for a module: "dmc:hopper-stand" is "rlctl/dmc-hopper-stand" there.
    """
    names = {f"rlctl/{name}{_VERSION}": name for name in TASKS}
    names |= {f"rlctl/{DMC_PREFIX[:-1]}-{name}": DMC_PREFIX + name for name in DMC_TASKS}
    for env_id, name in names.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(id=env_id, vector_entry_point=functools.partial(make, name))


def _simulated(name: str) -> tuple[str, type[Task]] | None:
    """Resolve "hopper", "Hopper-v5" or "dmc:Hopper_Stand" to an id and its task, or None."""
    wanted = name.lower()
    if wanted.startswith(DMC_PREFIX):
        plain = wanted.removeprefix(DMC_PREFIX).replace("_", "-")
        return next(
            ((DMC_PREFIX + known, task) for known, task in DMC_TASKS.items() if known.replace("_", "-") == plain), None
        )
    wanted = wanted.removesuffix(_VERSION)
    return next(((known + _VERSION, task) for known, task in TASKS.items() if known.lower() == wanted), None)


@functools.cache
def _plugins() -> dict[str, EntryPoint]:
    """Entry points of installed packages, by name."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def _importable(module: str) -> bool:
    """Whether there is such a module; a dotted one imports its parents."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _gymnasium_id(name: str) -> str | None:
    """Resolve a Gymnasium id, whatever its case, or None. "module:Id" imports the module, as Gymnasium does."""
    if ":" in name:
        return name if _importable(name.partition(":")[0]) else None
    if name in gymnasium.registry:
        return name
    return next((known for known in gymnasium.registry if known.lower() == name.lower()), None)


def _unknown(name: str) -> str:
    """Word the error for an unknown name."""
    own = [*TASKS, *(row["name"] for row in task_table() if row["name"] not in TASKS)]
    spellings = {known.lower(): known for known in [*gymnasium.registry, *own]}
    near = difflib.get_close_matches(name.lower(), spellings, n=1)
    hint = f"did you mean {spellings[near[0]]!r}? " if near else ""
    return f"unknown environment {name!r}: {hint}list them with `rlctl envs`"
