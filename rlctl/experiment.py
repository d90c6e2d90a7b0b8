"""From settings to a finished run: what `rlctl train`, `resume` and `eval` share with the Python API."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

import rlctl_envs
from rlctl import agents, checkpoint, parallel
from rlctl.accelerate import Report, accelerate
from rlctl.config import as_plain, build, fingerprint, merge, numbers, unknown_key
from rlctl.data.reference import run_score
from rlctl.data.reward import RewardTransform
from rlctl.display import Display
from rlctl.errors import DiskFull, Interrupted, UsageError
from rlctl.evaluate import Evaluation
from rlctl.provenance import provenance
from rlctl.run import Run, RunConfig, non_finite
from rlctl.seeding import derive
from rlctl.train import SCHEDULES, Job
from rlctl.types import Agent, Spec
from rlctl_envs.engines import Backend, Choice, available_cores, choose
from rlctl_envs.registry import WARP_OPTIONS

if TYPE_CHECKING:
    from rlctl.data.dataset import Dataset
    from rlctl_envs import VecEnv

KEYS = ("algo", "env", "data", "seed", "device", "env_backend", "env_options", "data_options", "agent", "run")
SECTIONS, NAMES = ("env_options", "data_options", "agent", "run"), ("algo", "env", "data", "device", "env_backend")
DATA_OPTIONS = {"view", "episode_len", "obs_keys"}
"""Keys of the section data_options; what they mean is told by `rlctl.data.dataset.load_dataset`."""
MANY_WORLDS = 1024
"""Number of worlds from which on-policy agents have other settings; see `many_worlds`."""
ARITHMETIC = ("precision", "compile")
"""Keys of the section run that change the numbers of an update, not only what is written about them."""
ENV_BACKENDS = ("auto", "cpu", "warp")
SCHEMA = 1
WORTH_SHARING = 8_000_000
"""Multiply-adds of an update's largest product from which a second thread shortens it."""
WORTH_A_GPU = 500_000_000
"""The same, from which `--device auto` moves the networks to a GPU although the tasks stay on the CPU. A guess."""


@dataclass(frozen=True)
class Settings:
    """One run, fully resolved."""

    algo: str
    env: str | None
    data: str | None
    seed: int
    device: str
    agent: Any
    """The agent's config dataclass."""
    run: RunConfig
    env_options: dict[str, Any] = field(default_factory=dict)
    data_options: dict[str, Any] = field(default_factory=dict)
    """How the dataset is read: view, episode_len, obs_keys."""
    env_backend: Backend = "auto"
    """Who simulates; see `rlctl_envs.engines.choose`."""

    @property
    def cls(self) -> type[Agent]:
        """The agent's class."""
        return agents.get(self.algo)

    @property
    def goes_online(self) -> bool:
        """Whether an offline learner goes on in an environment."""
        return getattr(self.agent, "offline_updates", None) is not None

    def plain(self) -> dict[str, Any]:
        """What config.yaml holds."""
        return {
            "algo": self.algo,
            "env": self.env,
            "data": self.data,
            "seed": self.seed,
            "device": self.device,
            **({"env_backend": self.env_backend} if self.env_backend != "auto" else {}),
            "env_options": self.env_options,
            **({"data_options": self.data_options} if self.data_options else {}),
            "agent": as_plain(self.agent),
            "run": as_plain(self.run),
        }

    def key(self) -> str:
        """Hash of what decides the result, but for the seed: runs that share it are repetitions of one experiment.

        Of the section `run` that is its arithmetic alone, where it is not the usual one.
        """
        usual = RunConfig()
        plain = {k: v for k, v in self.plain().items() if k not in ("seed", "run", "device")}
        arithmetic = {k: v for k in ARITHMETIC if (v := getattr(self.run, k)) != getattr(usual, k)}
        return fingerprint(plain | ({"run": arithmetic} if arithmetic else {}))


def resolve(algo: str | None, layers: list[Mapping[str, Any]]) -> Settings:
    """Merge layers of settings, weakest first, under them the packaged config of this algorithm on this task.

    The task is the one asked for or, where there is but a dataset, the one that this names.

    A layer is a mapping with any of the keys of `KEYS`; keys that are none of them are taken as the agent's.
    """
    top = merge(*[_sectioned(layer) for layer in layers])
    algo = algo or top.get("algo")
    if not algo:
        raise UsageError("no algorithm given: name one with --algo, `rlctl algos` lists them")
    cls = agents.get(algo)
    env = rlctl_envs.canonical(top["env"]) if top.get("env") else None
    if "data" in cls.sources() and not top.get("data"):
        raise UsageError(
            f"{algo} learns from a dataset: give one with --data (a Minari id, or the path of an .hdf5 or .npz file)"
        )
    if "env" in cls.sources() and not env:
        raise UsageError(f"{algo} learns in an environment: give one with --env, `rlctl envs` lists them")
    if top.get("data") and "data" not in cls.sources() | cls.accepts:
        raise UsageError(f"{algo} learns online and reads no dataset: leave --data out, or use an offline learner")
    task = env or (_named_by(str(top["data"])) if top.get("data") else None)
    values = merge(packaged(algo, task), many_worlds(cls, top.get("agent", {})), top)
    if values.get("agent", {}).get("offline_updates") is not None:
        _refuse_online(algo, cls)
    own = {f.name for f in fields(cls.Config)}
    for key in values.get("agent", {}):
        if key not in own and key in {f.name for f in fields(RunConfig)}:
            raise UsageError(f"the config of {algo} has no key '{key}': did you mean 'run.{key}'?")
    data_options = dict(values.get("data_options", {}))
    for key in data_options:
        if key not in DATA_OPTIONS:
            raise UsageError(unknown_key(key, DATA_OPTIONS, "the section data_options"))
    return Settings(
        algo=algo,
        env=env,
        data=values.get("data"),
        seed=_seed(values.get("seed", 0)),
        device=values.get("device", "auto"),
        env_backend=_backend(values.get("env_backend", "auto")),
        agent=build(cls.Config, values.get("agent", {}), f"the config of {algo}"),
        run=build(RunConfig, values.get("run", {}), "the section run"),
        env_options=dict(values.get("env_options", {})),
        data_options=data_options,
    )


def _refuse_online(algo: str, cls: type[Agent]) -> None:
    """UsageError for a learner that does not go from a dataset to an environment."""
    why = cls.offline_only
    if not why and "offline_updates" not in {f.name for f in fields(cls.Config)}:
        online = "it learns in its environment from the start"
        why = online if cls.regime != "offline" else "its config does not derive from rlctl.train.OfflineRLConfig"
    if why:
        raise UsageError(f"{algo} does not go from a dataset to an environment: {why}; leave --offline-updates out")


def many_worlds(cls: type[Agent], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an on-policy agent whose user asks for `MANY_WORLDS` or more; empty for all others.

    Rollouts of 256 steps are a million transitions then, and minibatches of 64 a hundred thousand gradient steps. With
    many worlds rollouts are short, minibatches large and passes few, as is usual for simulators on a GPU.
    """
    num_envs, known = asked.get("num_envs"), {f.name for f in fields(cls.Config)}
    if cls.regime != "on_policy" or "horizon" not in known or not isinstance(num_envs, int) or num_envs < MANY_WORLDS:
        return {}
    horizon = asked.get("horizon", 16)
    if not isinstance(horizon, int):
        return {}  # and let the config say what is wrong with it
    agent = {"horizon": horizon, "minibatch_size": num_envs * horizon // 4, "epochs": 5, "steps": 20_000 * num_envs}
    return {"agent": {key: value for key, value in agent.items() if key in known}, "run": {"evaluations": 10}}


def packaged(algo: str, env: str | None) -> dict[str, Any]:
    """The config shipped for this pair, `configs/<algo>/<task>.yaml`; empty when there is none.

    One named after the task without its version (`Hopper.yaml`) serves all versions that have none of their own.
    """
    if env is None or ":" in algo:
        return {}
    name = env.replace(":", "-")
    here = Path(__file__).resolve().parent
    for root in (here / "configs", here.parent / "configs"):  # in a wheel, in a source tree
        for stem in dict.fromkeys((name, re.sub(r"-v\d+$", "", name))):
            file = root / algo / f"{stem}.yaml"
            if file.exists():
                return load_yaml(file)
    return {}


def _named_by(data: str) -> str | None:
    """The task that a local Minari dataset says it is of; None where none is named, or no dataset found."""
    from rlctl.data.arrays import DatasetError
    from rlctl.data.dataset import named_task

    with contextlib.suppress(DatasetError):  # loading it will say what is wrong
        return named_task(data)
    return None


def load_yaml(file: Path) -> dict[str, Any]:
    """A config file as a layer; UsageError with its name when it cannot be read."""
    try:
        values = yaml.safe_load(file.read_text())
    except OSError as e:
        raise UsageError(f"cannot read the config file {file}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UsageError(f"{file} is not a text file") from e
    except yaml.YAMLError as e:
        raise UsageError(f"{file} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(values, dict):
        raise UsageError(f"{file} does not hold a mapping of settings")
    return _sectioned(numbers(values))


def train(
    settings: Settings, out: Path | None = None, *, quiet: bool = False, note: Mapping[str, Any] | None = None
) -> tuple[Path | None, Evaluation | None]:
    """Start a run and see it through. Returns its folder (None on a process beside rank 0) and the final evaluation.

    `note` goes into run.json.
    """
    folder = None if parallel.launched_rank() else _new_folder(settings, out)
    return _carry_out(settings, folder, resume=False, quiet=quiet, note=note)


def resume(
    folder: Path, steps: int | None = None, *, quiet: bool = False, note: Mapping[str, Any] | None = None
) -> tuple[Path | None, Evaluation | None]:
    """Go on with an interrupted, killed or finished run (the latter with more `steps`). `note` as of `train`."""
    settings = read_settings(folder)
    done = read_json(folder / "run.json").get("status") == "done"
    if (why := settings.cls.one_length) and (done or steps not in (None, settings.agent.steps)):
        raise UsageError(f"{folder} {'is finished and ' if done else ''}keeps its length: {why}; start a new run")
    if done and steps is None:
        raise UsageError(f"{folder} is finished: give a larger total with --steps to train on")
    if steps is not None:
        made = checkpoint.progress(folder / "checkpoints")
        if settings.goes_online:  # `steps` then counts those in the environment alone
            made = max(made - settings.agent.offline_updates, 0)
        if steps <= made and (done or steps != settings.agent.steps):
            raise UsageError(f"{folder} has made {made:,} steps already: --steps is the new total, give a larger one")
        plain = settings.plain()
        if plain["agent"]["steps"] != steps:
            plain["agent"]["steps"] = steps
            settings = resolve(None, [plain])
            note = {**(note or {}), "config_key": settings.key()}  # runs of one key have one length
    return _carry_out(settings, folder, resume=True, quiet=quiet, note=note)


def read_settings(folder: Path) -> Settings:
    """The settings of an existing run."""
    file = folder / "config.yaml"
    if not file.exists():
        raise UsageError(f"{folder} is not a run directory: it has no config.yaml")
    return resolve(None, [load_yaml(file)])


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file, or {} if it is missing; UsageError with its name when it is damaged."""
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as e:
        raise UsageError(f"{file} is damaged ({e}): restore it from a backup, or train anew") from e


def load_agent(folder: Path, which: str = "latest") -> tuple[Agent, Settings]:
    """The trained agent of a run, ready to act: the `latest` checkpoint, the `best` one, or that of a STEP.

    UsageError where its files are missing or not what was written.
    """
    settings = read_settings(folder)
    weights = _weights(folder, which)
    record = read_json(folder / "run.json")
    if "spec" not in record:
        raise UsageError(f"{folder / 'run.json'} is missing or incomplete, and with it the sizes of the networks")
    dims = record["spec"]
    device = pick_device(settings.device if settings.device != "auto" else "cpu")[0]
    _use(device)
    spec = Spec(dims["obs_dim"], dims["act_dim"], dims["num_envs"], device, dims["episode_len"], settings.seed)
    cfg = parallel.share(settings.agent, record.get("processes", 1))
    agent = agents.make(settings.cls, spec, cfg)
    checkpoint.load_agent(weights, agent)
    return agent, settings


def load_named(folder: str, which: str, field: str, role: str) -> tuple[Agent, Settings]:
    """`load_agent` of the run that another agent's config names in `field`, there to be what `role` says.

    UsageError where the run is gone, as it is for who copies a run without what it was built on.
    """
    if not (Path(folder) / "config.yaml").is_file():
        raise UsageError(
            f"no run in {folder}, of {role}: put it back, or name where it is now (agent.{field} in the "
            f"config.yaml of the run, --set {field}=RUN_DIR for a new one)"
        )
    return load_agent(Path(folder), which)


def _weights(folder: Path, which: str) -> Path:
    root = folder / "checkpoints"
    if which in ("latest", "best"):
        weights = root / "best" if which == "best" else checkpoint.latest(root)
        if weights is None or not weights.exists():
            raise UsageError(f"{folder} holds no {which} checkpoint yet")
        return weights
    steps = which.removeprefix("step_")
    there = sorted(p for p in root.glob("step_*") if p.is_dir())
    found = [p for p in there if steps.isdigit() and int(p.name.removeprefix("step_")) == int(steps)]
    if not found:
        have = ", ".join(str(int(p.name.removeprefix("step_"))) for p in there)
        raise UsageError(f"{folder} has no checkpoint '{which}': it has latest, best (if evaluated) and {have}")
    return found[0]


def evaluated_in(folder: Path, settings: Settings) -> tuple[str, dict[str, Any]]:
    """The environment that a run is evaluated in, and the keyword arguments it is made with."""
    record = read_json(folder / "run.json")
    env_id = settings.env or record.get("eval_env")
    if env_id is None:
        raise UsageError(f"{folder} does not name an environment to evaluate in")
    options = record.get("eval_env_options")  # {} is an answer: options of a GPU engine are left out of it
    return env_id, dict(settings.env_options if options is None else options)


def pick_device(asked: str, settings: Settings | None = None) -> tuple[torch.device, str]:
    """The device and the reason for it; "auto" goes by what `settings` simulate and learn."""
    if asked == "auto":
        return _best_device(settings)
    try:
        device = torch.device(asked)
    except RuntimeError as e:
        raise UsageError(f"unknown device '{asked}': allowed are auto, cpu, cuda, cuda:N") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--device {asked}: this machine shows no CUDA device to torch {torch.__version__}; use --device cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device '{asked}': allowed are auto, cpu, cuda, cuda:N")
    if str(device) == "cuda" and parallel.launched():
        return torch.device("cuda", parallel.local_rank()), "as asked, one for each process"
    return device, "as asked"


def _use(device: torch.device) -> None:
    """Make a CUDA device the current one: what names none, streams and memory pools among it, lies there too."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def _best_device(settings: Settings | None) -> tuple[torch.device, str]:
    """What "auto" means: a GPU for tasks that are simulated there and for large networks, else the CPU."""
    wants_warp = settings is not None and settings.env_backend == "warp"
    if not torch.cuda.is_available():
        if wants_warp:
            raise UsageError(
                f"--env-backend warp: this machine shows no CUDA device to torch {torch.__version__}; "
                "leave the backend to auto (with --device cpu it would run, slowly, for tests)"
            )
        return torch.device("cpu"), f"torch {torch.__version__} sees no CUDA device"
    cuda = torch.device("cuda", parallel.local_rank() if parallel.launched() else 0)
    if settings is None:
        return torch.device("cpu"), "nothing asks for a GPU"
    num_envs = getattr(settings.agent, "num_envs", 1)
    if (choice := _engine(settings, num_envs, cuda)) is not None and choice.backend == "warp":
        return cuda, f"the tasks are simulated there ({choice.why})"
    if largest_product(settings.agent) >= WORTH_A_GPU:
        return cuda, "the networks are large"
    return (
        torch.device("cpu"),
        "the tasks are simulated on the CPU, and networks of this size gain little from a GPU; --device cuda insists",
    )


def _engine(s: Settings, num_envs: int, device: torch.device, backend: Backend | None = None) -> Choice | None:
    """The engine for a MuJoCo task, and why; None for every other environment, which has no choice."""
    if s.env is None or (task := rlctl_envs.simulated_task(s.env)) is None:
        return None
    return choose(task, num_envs, device, s.env_backend if backend is None else backend)


def torch_threads(cfg: Any) -> int:
    """CPU threads that pay off for the updates of an agent with config `cfg`: all cores, or one for small networks.

    Two threads that share a product of a few million multiply-adds spend more on meeting than they save. The variable
    OMP_NUM_THREADS has the last word. A config whose sizes cannot be told (no field `...hidden`) gets all cores.
    """
    if chosen := os.environ.get("OMP_NUM_THREADS"):
        return int(chosen)
    product = largest_product(cfg)
    return 1 if 0 < product < WORTH_SHARING else available_cores()


def largest_product(cfg: Any) -> int:
    """Multiply-adds of the largest matrix product in an update; 0 where the config does not tell (no `...hidden`)."""
    rows = getattr(cfg, "minibatch_size", 0) or getattr(cfg, "batch_size", 0)
    rows = rows or getattr(cfg, "num_envs", 1) * getattr(cfg, "horizon", 1)  # updates on the whole rollout
    widths = [w for name, ws in vars(cfg).items() if name.endswith("hidden") for w in ws or ()]
    return int(rows * max(widths) ** 2) if widths else 0


def _carry_out(
    settings: Settings, folder: Path | None, *, resume: bool, quiet: bool, note: Mapping[str, Any] | None = None
) -> tuple[Path | None, Evaluation | None]:
    """Train from start to end; `folder` is None on a process beside rank 0, which keeps nothing."""
    alone = not parallel.launched()
    mine = None if parallel.launched_rank() else folder
    torch.set_num_threads(settings.run.threads or torch_threads(settings.agent))
    torch.manual_seed(derive(settings.seed, "torch"))  # ours never use the global stream, a user's agent may
    torch.set_flush_denormal(True)  # denormal Adam moments late in training cost several times a normal multiply
    display = Display(quiet=quiet or mine is None)
    env: VecEnv | None = None
    data: Dataset | None = None
    run: Run | None = None
    recorded = started = refused = full = False
    try:
        device, why = pick_device(settings.device, settings)
        _use(device)
        if not alone:
            _refuse_unless_shareable(settings)
            parallel.join(device)
        before = read_json(folder / "run.json") if resume and folder is not None else {}
        part = _part(settings, before)
        found = _sources(part, device, before.get("engine"))
        env, data, env_id, spec = found.env, found.data, found.env_id, found.spec

        def eval_env(num_envs: int, seed: int) -> VecEnv:
            assert env_id is not None
            return rlctl_envs.make(
                env_id, num_envs, seed=seed, device=device, threads=settings.run.threads, **found.eval_options()
            )

        def record_transforms(agent: Agent) -> None:
            transforms = {n: m.describe() for n, m in agent.named_modules() if isinstance(m, RewardTransform)}
            if transforms:
                _record(mine, settings, {"reward_transform": transforms})

        rank = parallel.rank()
        run = Run(  # first of all, for it takes the lock: nothing below may touch a run that is somebody else's
            mine,
            settings.run,
            seed=derive(settings.seed, f"rank {rank}", 31) if rank else settings.seed,
            make_eval_env=eval_env if env_id is not None and mine is not None else None,
            display=display,
            score=lambda ret: None if env_id is None else run_score(env_id, ret, on_data=settings.data is not None),
            labels={} if data is None else data.labels(),
            resume=resume,
            follow=folder if rank else None,
            on_begin=record_transforms,
        )
        agent = agents.make(settings.cls, spec, part.agent)  # before the records: a refused resume changes none
        if not alone:
            _share_agent(agent, rank, settings.seed)
        if mine is not None:
            checkpoint.write_atomically(mine / "config.yaml", yaml.safe_dump(settings.plain(), sort_keys=False))
        _record(
            mine,
            settings,
            {
                "status": "running",
                "error": None,
                "spec": _dims(spec),
                "engine": None if found.engine is None else found.engine.backend,
                "processes": parallel.world_size(),
                "eval_env": env_id,
                "eval_env_options": {k: v for k, v in found.eval_options().items() if k != "backend"},
                "dataset": None if data is None else data.record(),
                **(note or {}),
            },
            begin=not resume,
        )
        recorded = True
        chosen = settings.run
        report = accelerate(
            agent,
            graphs=chosen.graphs,
            compile=chosen.compile,
            trace=chosen.trace,
            precision=chosen.precision,
            cores=chosen.threads or max(available_cores() // parallel.world_size(), 1),
            say=display.say,
        )
        _announce(display, settings, mine or Path("-"), device, why, found, agent, report)
        job = Job(agent, env, data, run, settings.agent, settings.seed)
        schedule = settings.cls.schedule or SCHEDULES[settings.cls.regime]
        with run.stop_on_signals():
            started = True
            try:
                schedule(job)
                result = run.finish(agent)
            except ValueError as e:
                if non_finite(agent) or isinstance(e, rlctl_envs.NonFiniteAction):
                    raise run.diverged(agent) from e
                raise
        done = {"status": "done", "final": run.final, "progress": run.progress, "spent_s": run.spent}
        _record(mine, settings, done)
        return mine, result
    except Interrupted as e:
        _record(mine, settings, {"status": "preempted", "error": str(e)})
        raise
    except BaseException as e:
        # a request that was refused before the first step leaves nothing behind
        ours = (UsageError, MemoryError) if started else (ValueError, MemoryError)
        refused = isinstance(e, ours) and not resume and (run is None or run.progress == 0)
        full = mine is not None and checkpoint.disk_full(e)
        if run is not None and (recorded or not resume):
            with contextlib.suppress(OSError) if full else contextlib.nullcontext():
                _record(mine, settings, {"status": "failed", "error": f"{type(e).__name__}: {e}"})
        if mine is not None and full:
            raise DiskFull(mine) from e
        raise
    finally:
        torch.set_flush_denormal(False)
        if run is not None:
            with contextlib.suppress(OSError) if full else contextlib.nullcontext():
                run.close()
        if env is not None:
            env.close()
        if refused and mine is not None:
            shutil.rmtree(mine, ignore_errors=True)
        parallel.leave()


def _refuse_unless_shareable(s: Settings) -> None:
    """UsageError for an agent whose update several processes cannot share."""
    why = ""
    if s.cls.regime != "on_policy" or s.cls.schedule is not None:
        why = "only on-policy agents share their updates"
    elif s.cls.host_reads and not s.cls.decides_together:
        why = f"each process would decide for itself: {s.cls.host_reads}"
    elif s.cls.moved_by_hand is not Agent.moved_by_hand and not s.cls.decides_together:
        why = "it moves parameters without a gradient step, which is where processes meet"
    if why:
        raise UsageError(f"{s.algo} cannot be trained by several processes: {why}; start it without torchrun")


def _part(s: Settings, before: Mapping[str, Any]) -> Settings:
    """The settings one process works with, its share of worlds and minibatches; `before`: the run.json of a resume."""
    size = parallel.world_size()
    if before and before.get("processes", 1) != size:
        raise UsageError(
            f"the run was started with {before.get('processes', 1)} processes, this is {size}: resume it with as many"
        )
    return replace(s, agent=parallel.share(s.agent, size)) if size > 1 else s


def _share_agent(agent: Agent, rank: int, seed: int) -> None:
    """Same parameters everywhere, other noise on every rank."""
    parallel.broadcast(agent)
    if rank:
        own = derive(seed, f"rank {rank}")
        for name, g in agent.rng.items():
            g.manual_seed(derive(own, name))


@dataclass(frozen=True)
class _Sources:
    """What a run learns from and is evaluated in."""

    env: VecEnv | None
    data: Dataset | None
    env_id: str | None
    """Environment of the evaluations, None where there can be none."""
    env_options: dict[str, Any]
    spec: Spec
    no_evaluation: str = ""
    """Why there is none."""
    engine: Choice | None = None
    """Who simulates the worlds the agent learns in, where there is a choice."""
    insisted: Backend = "auto"
    """The engine asked for by name."""

    def eval_options(self) -> dict[str, Any]:
        """Options of the environment to evaluate in.

        It is simulated by the engine of training, so that a run on a GPU stays there. The buffers of a GPU engine are
        sized for training and left out.
        """
        options = {k: v for k, v in self.env_options.items() if k not in WARP_OPTIONS}
        on_gpu = self.engine is not None and self.engine.backend == "warp"
        backend: Backend = "warp" if on_gpu else self.insisted
        return options | ({"backend": backend} if backend != "auto" else {})


def _sources(s: Settings, device: torch.device, engine: Backend | None = None) -> _Sources:
    """The environment to train in, the dataset, the environment to evaluate in, and the agent's spec.

    `engine` is the one a resumed run was started with.

    A dataset names the environment it was recorded in; that it is not installed is no obstacle to learning from it.
    """
    env: VecEnv | None = None
    data: Dataset | None = None
    no_evaluation = "the dataset does not name its environment; give one with --env"
    if s.data is not None:
        from rlctl.data.dataset import load_dataset

        data = load_dataset(s.data, device=device, seed=s.seed, **s.data_options)
    env_id, options = s.env, dict(s.env_options)
    if env_id is None and data is not None and data.env_id is not None:
        env_id, options = data.env_id, data.origin.env_options | options
    trains = "env" in s.cls.sources() or s.goes_online
    num_envs = s.agent.num_envs if trains else 1
    threads = s.run.threads
    if threads is None and parallel.world_size() > 1:
        threads = max(available_cores() // parallel.world_size(), 1)
    choice = _engine(s, num_envs, device, engine) if trains else None
    backend = choice.backend if choice is not None else s.env_backend if trains else "auto"
    own = options if trains else {k: v for k, v in options.items() if k not in WARP_OPTIONS}
    if env_id is not None:
        seed = derive(s.seed, "env", 31)
        try:
            env = rlctl_envs.make(env_id, num_envs, seed=seed, device=device, threads=threads, backend=backend, **own)
        except ValueError as e:
            if s.env is not None or s.env_options:
                raise
            no_evaluation = f"the environment of the dataset cannot be made here ({e}); give one with --env"
            env_id = None
    if env is None and trains:
        raise UsageError(f"{s.algo} is to go on in an environment: {no_evaluation}")
    if env is not None:
        spec = Spec(env.obs_dim, env.act_dim, num_envs, device, env.episode_len, s.seed)
    else:
        assert data is not None
        spec = Spec(*data.spec_dims, 1, device, data.origin.episode_len or 1000, s.seed)
    if data is not None and data.spec_dims != (spec.obs_dim, spec.act_dim):
        raise UsageError(
            f"{s.data} has observations of {data.spec_dims[0]} and actions of {data.spec_dims[1]} dimensions, "
            f"{env_id} has {spec.obs_dim} and {spec.act_dim}: they are not the same task"
        )
    if env is not None and not trains:
        env.close()
        env = None
    return _Sources(env, data, env_id, options, spec, no_evaluation, choice, s.env_backend)


def _announce(
    display: Display,
    s: Settings,
    folder: Path,
    device: torch.device,
    why: str,
    found: _Sources,
    agent: Agent,
    report: Report,
) -> None:
    parameters = sum(p.numel() for p in agent.parameters())
    source = " and ".join(x for x in (s.env, s.data) if x)
    steps = f"{s.agent.steps:,} steps"
    if s.goes_online:
        steps = f"{s.agent.offline_updates:,} updates on the data, then {s.agent.steps:,} steps online"
    display.say(f"{s.algo} on {source}, seed {s.seed}: {steps}, {parameters:,} parameters, in {folder}")
    display.say(f"device {device}: {why}; {torch.get_num_threads()} CPU threads")
    if found.engine is not None and (device.type == "cuda" or found.engine.backend == "warp"):
        display.say(f"simulated by the {found.engine.backend} engine: {found.engine.why}")
    if device.type == "cuda" or report.compiled or s.run.precision != "float32":
        display.say(f"updates: {report.say()}")
    if s.cls.regime == "on_policy" and agent.spec.num_envs >= MANY_WORLDS:
        display.say(f"{agent.spec.num_envs:,} worlds: short rollouts and large minibatches, unless you set others")
    if parallel.world_size() > 1:
        display.say(f"{parallel.world_size()} processes, {agent.spec.num_envs} worlds each")
    if s.cls.regime == "off_policy" or s.goes_online:
        from rlctl.data.ring import planned_bytes

        held = min(s.agent.buffer_size, s.agent.steps)
        display.say(f"replay buffer: {held:,} transitions, up to {planned_bytes(agent.spec, held) / 2**20:,.0f} MiB")
    if found.data is not None:
        box = found.data.origin.action_box
        display.say(f"{found.data}, view {found.data.view}" + ("" if box is None else ", actions mapped to [-1, 1]"))
        for doubt in _doubts(found.data):
            display.say(f"warning: {doubt} (see `rlctl data verify {s.data}`)")
    if found.env_id is None:
        display.say(f"no evaluation: {found.no_evaluation}")


def _doubts(data: Dataset) -> Iterator[str]:
    """What makes training on a dataset pointless or misleading, as far as it can be seen at once."""
    low, high = data.rows.action.aminmax()
    far = max(-float(low), float(high))
    if far > 1 + 1e-5:
        yield f"the dataset has actions outside [-1, 1], up to {far:.4g} in size; no policy acts there"
    some = slice(None, None, 1 + len(data) // 10_000)
    goes_on = ~data.rows.terminated[some]
    copied = (data.rows.next_obs[some] == data.rows.obs[some]).all(1) & goes_on
    if copied.sum() > 0.5 * goes_on.sum():
        yield "next_obs is a copy of obs in most rows; nothing can be learnt from such pairs"


def _dims(spec: Spec) -> dict[str, int]:
    return {k: getattr(spec, k) for k in ("obs_dim", "act_dim", "num_envs", "episode_len")}


def _new_folder(s: Settings, out: Path | None) -> Path:
    """Create the run directory with its config; a name that is taken gets a number, an explicit one is refused."""
    n = 1
    if out is not None:
        folder = base = out
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} is not empty: go on with `rlctl resume {folder}`, or choose another --out")
    else:
        source = (s.env or "") if s.cls.regime != "offline" else Path(s.data or "").stem.replace("/", "-")
        algo = s.algo.replace(":", ".")
        base = Path("runs") / algo / source.replace(":", "-") / f"s{s.seed}-{s.key()}"
        folder = base
        while folder.exists():
            n += 1
            folder = base.with_name(f"{base.name}-{n}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # complete or absent: a run directory always has its config; two starts at once each have a name of their own
        temp = folder.with_name(f".tmp-{folder.name}-{uuid.uuid4().hex[:8]}")
        temp.mkdir()
        (temp / "config.yaml").write_text(yaml.safe_dump(s.plain(), sort_keys=False))
        while True:
            try:
                temp.rename(folder)  # over an empty folder too, never over one that holds something
                return folder
            except OSError as e:
                if out is not None or e.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    shutil.rmtree(temp, ignore_errors=True)
                    raise
                n += 1  # somebody was faster
                folder = base.with_name(f"{base.name}-{n}")
    except OSError as e:
        raise UsageError(f"cannot create the run directory {folder}: {e.strerror}; choose another --out") from e


def _record(folder: Path | None, s: Settings, fields: Mapping[str, Any], begin: bool = False) -> None:
    """Merge `fields` into run.json; `begin` writes the provenance of the run, a resume appends its own."""
    if folder is None:
        return
    record = read_json(folder / "run.json")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if begin or "schema" not in record:
        record = {
            "schema": SCHEMA,
            "algo": s.algo,
            "env": s.env,
            "data": s.data,
            "seed": s.seed,
            "config_key": s.key(),
            "physics": s.env_options.get("physics", "published"),
            "started": now,
            "sessions": [],
        }
    if fields.get("status") == "running":
        record["sessions"].append({"started": now, **provenance(), "torch_threads": torch.get_num_threads()})
    record |= dict(fields) | {"updated": now}
    checkpoint.write_atomically(folder / "run.json", json.dumps(record, indent=1) + "\n")


def _sectioned(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Put keys that are not sections under `agent`, so that `--set lr=1e-3` and `--set agent.lr=1e-3` are one."""
    out: dict[str, Any] = {}
    for key, value in layer.items():
        if key in SECTIONS and not isinstance(value, Mapping):
            if value is not None:  # an empty section of a file
                raise UsageError(f"'{key}' is a section of settings, got {value!r}: write {key}.KEY=VALUE")
        elif key in NAMES and not isinstance(value, str | None):
            raise UsageError(f"'{key}' is a name, got {value!r}")
        elif key in KEYS:
            out[key] = (
                merge(out[key], value) if isinstance(out.get(key), dict) and isinstance(value, Mapping) else value
            )
        elif isinstance(value, Mapping):
            raise UsageError(unknown_key(key, set(KEYS), "a config"))
        else:
            out["agent"] = merge(out.get("agent", {}), {key: value})
    return out


def _backend(value: Any) -> Backend:
    if value not in ENV_BACKENDS:
        raise UsageError(f"env_backend is one of {', '.join(ENV_BACKENDS)}; got {value!r}")
    backend: Backend = value
    return backend


def _seed(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UsageError(f"a seed is a non-negative integer, got {value!r}")
    return value
