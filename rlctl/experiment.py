"""From settings to a finished run: what `rlctl train`, `resume` and `eval` share with the Python API."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

import rlctl_envs
from rlctl import agents, checkpoint
from rlctl.config import as_plain, build, fingerprint, merge, unknown_key
from rlctl.data.reference import dataset_labels, run_score
from rlctl.data.reward import RewardTransform
from rlctl.display import Display
from rlctl.errors import Interrupted, UsageError
from rlctl.evaluate import Evaluation
from rlctl.provenance import provenance
from rlctl.run import Run, RunConfig, non_finite
from rlctl.seeding import derive
from rlctl.train import SCHEDULES, Job
from rlctl.types import Agent, Spec
from rlctl_envs.engines import available_cores

if TYPE_CHECKING:
    from rlctl.data.dataset import Dataset
    from rlctl_envs import VecEnv

KEYS = ("algo", "env", "data", "seed", "device", "env_options", "data_options", "agent", "run")
SECTIONS, NAMES = ("env_options", "data_options", "agent", "run"), ("algo", "env", "data", "device")
DATA_OPTIONS = {"view", "episode_len", "obs_keys"}
"""Keys of the section data_options; what they mean is told by `rlctl.data.dataset.load_dataset`."""
SCHEMA = 1
WORTH_SHARING = 8_000_000
"""Multiply-adds of an update's largest product from which a second thread shortens it."""


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
            "env_options": self.env_options,
            **({"data_options": self.data_options} if self.data_options else {}),
            "agent": as_plain(self.agent),
            "run": as_plain(self.run),
        }

    def key(self) -> str:
        """Hash of what decides the result, but for the seed: runs that share it are repetitions of one experiment."""
        return fingerprint({k: v for k, v in self.plain().items() if k not in ("seed", "run", "device")})


def resolve(algo: str | None, layers: list[Mapping[str, Any]]) -> Settings:
    """Merge layers of settings, weakest first, under them the packaged config of this algorithm on this task.

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
            f"{algo} learns from a dataset: give one with --data (a Minari id, or the path of an .hdf5 file)"
        )
    if "env" in cls.sources() and not env:
        raise UsageError(f"{algo} learns in an environment: give one with --env, `rlctl envs` lists them")
    if top.get("data") and "data" not in cls.sources() | cls.accepts:
        raise UsageError(f"{algo} learns online and reads no dataset: leave --data out, or use an offline learner")
    values = merge(packaged(algo, env), top)
    if values.get("agent", {}).get("offline_updates") is not None:
        _refuse_online(algo, cls)
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


def packaged(algo: str, env: str | None) -> dict[str, Any]:
    """The tuned config shipped for this pair, `configs/<algo>/<task>.yaml`; empty when there is none."""
    if env is None or ":" in algo:
        return {}
    name = env.replace(":", "-")
    here = Path(__file__).resolve().parent
    for root in (here / "configs", here.parent / "configs"):  # in a wheel, in a source tree
        file = root / algo / f"{name}.yaml"
        if file.exists():
            return load_yaml(file)
    return {}


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
    return _sectioned(values)


def train(
    settings: Settings, out: Path | None = None, *, quiet: bool = False, note: Mapping[str, Any] | None = None
) -> tuple[Path, Evaluation | None]:
    """Start a run and see it through. Returns its folder and the final evaluation. `note` goes into run.json."""
    folder = _new_folder(settings, out)
    return _carry_out(settings, folder, resume=False, quiet=quiet, note=note)


def resume(
    folder: Path, steps: int | None = None, *, quiet: bool = False, note: Mapping[str, Any] | None = None
) -> tuple[Path, Evaluation | None]:
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
        plain["agent"]["steps"] = steps
        settings = resolve(None, [plain])
    return _carry_out(settings, folder, resume=True, quiet=quiet, note=note)


def read_settings(folder: Path) -> Settings:
    """The settings of an existing run."""
    file = folder / "config.yaml"
    if not file.exists():
        raise UsageError(f"{folder} is not a run directory: it has no config.yaml")
    return resolve(None, [load_yaml(file)])


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file, or {} if it is missing."""
    return dict(json.loads(file.read_text())) if file.exists() else {}


def load_agent(folder: Path, which: str = "latest") -> tuple[Agent, Settings]:
    """The trained agent of a run, ready to act: the `latest` checkpoint, the `best` one, or that of a STEP."""
    settings = read_settings(folder)
    weights = _weights(folder, which)
    dims = read_json(folder / "run.json")["spec"]
    device = pick_device(settings.device)[0]
    spec = Spec(dims["obs_dim"], dims["act_dim"], dims["num_envs"], device, dims["episode_len"], settings.seed)
    agent = agents.make(settings.cls, spec, settings.agent)
    checkpoint.load_agent(weights, agent)
    return agent, settings


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
    return env_id, dict(record.get("eval_env_options") or settings.env_options)


def pick_device(asked: str) -> tuple[torch.device, str]:
    """The device and the reason for it."""
    if asked == "auto":
        return torch.device("cpu"), "the simulator runs on the CPU, and networks of this size gain nothing from a GPU"
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
    return device, "as asked"


def torch_threads(cfg: Any) -> int:
    """CPU threads that pay off for the updates of an agent with config `cfg`: all cores, or one for small networks.

    Two threads that share a product of a few million multiply-adds spend more on meeting than they save. The variable
    OMP_NUM_THREADS has the last word. A config whose sizes cannot be told (no field `...hidden`) gets all cores.
    """
    if chosen := os.environ.get("OMP_NUM_THREADS"):
        return int(chosen)
    rows = getattr(cfg, "minibatch_size", 0) or getattr(cfg, "batch_size", 0)
    rows = rows or getattr(cfg, "num_envs", 1) * getattr(cfg, "horizon", 1)  # updates on the whole rollout
    widths = [w for name, ws in vars(cfg).items() if name.endswith("hidden") for w in ws or ()]
    small = widths and rows * max(widths) ** 2 < WORTH_SHARING
    return 1 if small else available_cores()


def _carry_out(
    settings: Settings, folder: Path, *, resume: bool, quiet: bool, note: Mapping[str, Any] | None = None
) -> tuple[Path, Evaluation | None]:
    torch.set_num_threads(settings.run.threads or torch_threads(settings.agent))
    torch.manual_seed(derive(settings.seed, "torch"))  # ours never use the global stream, a user's agent may
    torch.set_flush_denormal(True)  # denormal Adam moments late in training cost several times a normal multiply
    display = Display(quiet=quiet)
    env: VecEnv | None = None
    data: Dataset | None = None
    run: Run | None = None
    started = refused = False
    try:
        device, why = pick_device(settings.device)
        found = _sources(settings, device)
        env, data, env_id, spec = found.env, found.data, found.env_id, found.spec
        cfg = settings.agent

        def eval_env(num_envs: int, seed: int) -> VecEnv:
            assert env_id is not None
            threads = settings.run.threads
            return rlctl_envs.make(env_id, num_envs, seed=seed, device=device, threads=threads, **found.env_options)

        run = Run(  # first of all, for it takes the lock: nothing below may touch a run that is somebody else's
            folder,
            settings.run,
            seed=settings.seed,
            make_eval_env=eval_env if env_id is not None else None,
            display=display,
            score=lambda ret: None if env_id is None else run_score(env_id, ret, on_data=settings.data is not None),
            labels=dataset_labels(data.id, data.origin.format) if data is not None else {},
            resume=resume,
        )
        checkpoint.write_atomically(folder / "config.yaml", yaml.safe_dump(settings.plain(), sort_keys=False))
        _record(
            folder,
            settings,
            {
                "status": "running",
                "error": None,
                "spec": _dims(spec),
                "eval_env": env_id,
                "eval_env_options": found.env_options,
                "dataset": None if data is None else data.record(),
                **(note or {}),
            },
            begin=not resume,
        )
        agent = agents.make(settings.cls, spec, cfg)
        _announce(display, settings, folder, device, why, found, agent)
        job = Job(agent, env, data, run, cfg, settings.seed)
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
        transforms = {n: m.describe() for n, m in agent.named_modules() if isinstance(m, RewardTransform)}
        _record(folder, settings, done | ({"reward_transform": transforms} if transforms else {}))
        return folder, result
    except Interrupted as e:
        _record(folder, settings, {"status": "preempted", "error": str(e)})
        raise
    except BaseException as e:
        # a request that was refused before the first step leaves nothing behind
        ours = (UsageError, MemoryError) if started else (ValueError, MemoryError)
        refused = isinstance(e, ours) and not resume and (run is None or run.progress == 0)
        if run is not None:
            _record(folder, settings, {"status": "failed", "error": f"{type(e).__name__}: {e}"})
        raise
    finally:
        torch.set_flush_denormal(False)
        if run is not None:
            run.close()
        if env is not None:
            env.close()
        if refused:
            shutil.rmtree(folder, ignore_errors=True)


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


def _sources(s: Settings, device: torch.device) -> _Sources:
    """The environment to train in, the dataset, the environment to evaluate in, and the agent's spec.

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
    if env_id is not None:
        seed = derive(s.seed, "env", 31)
        try:
            env = rlctl_envs.make(env_id, num_envs, seed=seed, device=device, threads=s.run.threads, **options)
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
    return _Sources(env, data, env_id, options, spec, no_evaluation)


def _announce(
    display: Display, s: Settings, folder: Path, device: torch.device, why: str, found: _Sources, agent: Agent
) -> None:
    parameters = sum(p.numel() for p in agent.parameters())
    source = " and ".join(x for x in (s.env, s.data) if x)
    steps = f"{s.agent.steps:,} steps"
    if s.goes_online:
        steps = f"{s.agent.offline_updates:,} updates on the data, then {s.agent.steps:,} steps online"
    display.say(f"{s.algo} on {source}, seed {s.seed}: {steps}, {parameters:,} parameters, in {folder}")
    display.say(f"device {device}: {why}; {torch.get_num_threads()} CPU threads")
    if s.cls.regime == "off_policy" or s.goes_online:
        from rlctl.data.ring import planned_bytes

        held = min(s.agent.buffer_size, s.agent.steps)
        display.say(f"replay buffer: {held:,} transitions, up to {planned_bytes(agent.spec, held) / 2**20:,.0f} MiB")
    if found.data is not None:
        box = found.data.origin.action_box
        display.say(f"{found.data}, view {found.data.view}" + ("" if box is None else ", actions mapped to [-1, 1]"))
    if found.env_id is None:
        display.say(f"no evaluation: {found.no_evaluation}")


def _dims(spec: Spec) -> dict[str, int]:
    return {k: getattr(spec, k) for k in ("obs_dim", "act_dim", "num_envs", "episode_len")}


def _new_folder(s: Settings, out: Path | None) -> Path:
    """Create the run directory with its config; a name that is taken gets a number, an explicit one is refused."""
    if out is not None:
        folder = out
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} is not empty: go on with `rlctl resume {folder}`, or choose another --out")
    else:
        source = (s.env or "") if s.cls.regime != "offline" else Path(s.data or "").stem.replace("/", "-")
        algo = s.algo.replace(":", ".")
        base = Path("runs") / algo / source.replace(":", "-") / f"s{s.seed}-{s.key()}"
        folder, n = base, 1
        while folder.exists():
            n += 1
            folder = base.with_name(f"{base.name}-{n}")
    # complete or absent: a run directory always has its config
    temp = folder.with_name(f".tmp-{folder.name}")
    try:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        (temp / "config.yaml").write_text(yaml.safe_dump(s.plain(), sort_keys=False))
        if folder.exists():
            folder.rmdir()
        temp.rename(folder)
    except OSError as e:
        raise UsageError(f"cannot create the run directory {folder}: {e.strerror}; choose another --out") from e
    return folder


def _record(folder: Path, s: Settings, fields: Mapping[str, Any], begin: bool = False) -> None:
    """Merge `fields` into run.json; `begin` writes the provenance of the run, a resume appends its own."""
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


def _seed(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UsageError(f"a seed is a non-negative integer, got {value!r}")
    return value
