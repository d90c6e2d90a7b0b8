"""A suite file becomes a plan: every cell fully resolved, every mistake found, before anything starts.

    name: demo                      # the file's stem if left out
    description: one line
    seeds: 5                        # 0 to 4; or a list, [10, 11, 12]
    budgets: {on_policy: 1000000, off_policy: 100000, offline: 200000}      # steps by kind of learner
    evaluation: {evaluations: 20, episodes: 10, final_episodes: 100, stochastic: false}
    set: {env_options.physics: published}                                   # settings of all cells
    tasks: [Hopper, {env: HalfCheetah, budgets: {off_policy: 200000}}]
    datasets: [mujoco/hopper/medium-v0, {data: big.hdf5, env: Walker2d, name: walker-mine}]
    algorithms:
      - ppo
      - {algo: sac, name: sac-utd2, set: {updates_per_step: 2}, on: {Hopper: {gamma: 0.98}}}
      - {algo: "sb3:ppo", set: {num_envs: 8, n_steps: 256, normalize: true}, only: [Hopper]}

An algorithm that learns from data meets the datasets, any other one the tasks; one that may have data besides (expo,
rlpd) the datasets that its `only` names. Settings are taken from, weakest first:
the algorithm's defaults, the config shipped for the task, the suite's `set`, the budget, the source's `set`, the
algorithm's `steps` and `set`, and its `on` for that source. The evaluation protocol is the suite's alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
import yaml

import rlctl_envs
from rlctl import agents, experiment
from rlctl.bench.process import STALL
from rlctl.config import as_plain, build, fingerprint, merge, number, numbers, unknown_key
from rlctl.data.arrays import DatasetError
from rlctl.errors import UsageError
from rlctl.experiment import Settings
from rlctl.types import Count, Regime, Spec

if TYPE_CHECKING:
    from rlctl_envs import VecEnv

PROTOCOL = ("eval_every", "evaluations", "eval_episodes", "final_episodes", "eval_stochastic")
"""Settings of a run that decide what its scores mean: the suite's business, the same for every cell."""


@dataclass(frozen=True)
class Protocol:
    """How every cell is evaluated."""

    evaluations: Count = 20
    """Evaluations during a run, evenly spread."""
    episodes: Count = 10
    """Episodes of each of them."""
    final_episodes: Count = 100
    """Episodes of the evaluation at the end, of the last agent."""
    stochastic: bool = False
    """Evaluate with sampled actions as well."""

    def layer(self) -> dict[str, Any]:
        """As settings of a run."""
        return {
            "evaluations": self.evaluations,
            "eval_episodes": self.episodes,
            "final_episodes": self.final_episodes,
            "eval_stochastic": self.stochastic,
        }


@dataclass(frozen=True)
class Source:
    """A task, or a dataset with the task its policies are evaluated in."""

    env: str | None = None
    data: str | None = None
    name: str = ""
    """In tables and folders; the task or the dataset itself if empty."""
    budgets: dict[str, Count] = field(default_factory=dict)
    """Steps by kind of learner, where they differ from the suite's."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of every cell on this source."""


@dataclass(frozen=True)
class Algorithm:
    """An algorithm with its settings."""

    algo: str
    name: str = ""
    """In tables and folders; the algorithm if empty."""
    steps: Count | None = None
    """Length of its runs, where it is not the budget."""
    set: dict[str, Any] = field(default_factory=dict)
    """Its settings."""
    on: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Its settings on single sources, by their names."""
    only: list[str] = field(default_factory=list)
    """The sources it meets, by their names; empty: all that suit it."""


@dataclass(frozen=True)
class File:
    """A suite as it is written."""

    name: str = ""
    description: str = ""
    seeds: int | list[int] = 5
    """That many from 0 on, or these."""
    device: str = "auto"
    threads: Count = 1
    """Threads of each cell, on every executor: results are bit-reproducible for one number of them."""
    stall_minutes: float = STALL / 60
    """A cell without a new metric row, evaluation or checkpoint for so long hangs, and is ended and tried again."""
    budgets: dict[str, Count] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)
    tasks: list[str | dict[str, Any]] = field(default_factory=list)
    datasets: list[str | dict[str, Any]] = field(default_factory=list)
    algorithms: list[str | dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    column: str
    source: str
    settings: Settings

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.settings.seed

    @property
    def steps(self) -> int:
        """Length of the run: environment steps, or gradient steps offline, or first the one and then the other."""
        return self.offline_updates + int(self.settings.agent.steps)

    @property
    def offline_updates(self) -> int:
        """Gradient steps on data alone before a run goes online; 0 for every other kind of run."""
        return getattr(self.settings.agent, "offline_updates", None) or 0

    @property
    def id(self) -> str:
        """COLUMN/SOURCE/sSEED-KEY: its name in the ledger and its folder under the suite's.

        KEY hashes the resolved settings without seed, device and paths, and the evaluation protocol: a cell whose key
        has not changed need not be run again.
        """
        return f"{folder_name(self.column)}/{folder_name(self.source)}/s{self.seed}-{self.key}"

    @property
    def key(self) -> str:
        """See `id`."""
        run = as_plain(self.settings.run)
        return fingerprint({"config": self.settings.key(), "protocol": {k: run[k] for k in PROTOCOL}})


@dataclass(frozen=True)
class Plan:
    """A validated suite."""

    name: str
    description: str
    file: Path
    cells: list[Cell]
    """Seed by seed: an interrupted grid has fewer seeds of everything, not fewer algorithms."""
    threads: int
    stall: float = STALL
    """Seconds without a sign of life after which a cell is ended and tried again; 0: never."""
    missing: list[str] = field(default_factory=list)
    """Datasets that are not on this machine, each with what to do."""

    def columns(self) -> list[str]:
        """Names of the algorithms, in the order of the file."""
        return list(dict.fromkeys(c.column for c in self.cells))

    def sources(self) -> list[str]:
        """Names of tasks and datasets, in the order of the file."""
        return list(dict.fromkeys(c.source for c in self.cells))


def find(name: str) -> Path:
    """A suite's file: a path, or the name of one that is shipped."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    shipped = {p.stem: p for folder in _shipped() for p in sorted(folder.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    close = get_close_matches(name, shipped, n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'?" if close else "give the path of a .yaml file"
    raise UsageError(f"no suite '{name}': {hint}; shipped are {', '.join(shipped) or 'none'}")


class _SafeLoader(yaml.SafeLoader):
    """`on` is a word, as in YAML 1.2, and not a name of the value true: it is a key of a suite."""


_SafeLoader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:bool"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_SafeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def load(name: str, *, seeds: list[int] | None = None) -> Plan:
    """Read and validate a suite; UsageError with file and place at the first mistake. `seeds` replaces the file's."""
    path = find(name)
    try:
        raw = yaml.load(path.read_text(), _SafeLoader)  # noqa: S506 - a safe loader
    except OSError as e:
        raise UsageError(f"cannot read the suite {path}: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(raw, dict):
        raise UsageError(
            f"{path} does not hold a mapping: a suite has {', '.join(f.name for f in dataclasses.fields(File))}"
        )
    try:
        return _plan(path, build(File, _lengths(raw), "a suite"), seeds)
    except ValueError as e:  # an unknown task is one, and not always ours
        raise UsageError(f"suite {path.name}: {e}") from e


def _plan(path: Path, file: File, seeds: list[int] | None) -> Plan:
    protocol = build(Protocol, file.evaluation, "the section evaluation")
    _check_kinds(file.budgets, "budgets")
    chosen = seeds if seeds is not None else list(range(file.seeds)) if isinstance(file.seeds, int) else file.seeds
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise UsageError(f"seeds are a number of them, or different non-negative integers, got {seeds or file.seeds}")
    sources = [
        *(_source(item, "env", f"task {k + 1}") for k, item in enumerate(file.tasks)),
        *(_source(item, "data", f"dataset {k + 1}") for k, item in enumerate(file.datasets)),
    ]
    _unique("source", [s.name for s in sources], "tasks or datasets")
    algorithms = [_algorithm(item, f"algorithm {k + 1}", sources) for k, item in enumerate(file.algorithms)]
    _unique("algorithm", [a.name for a in algorithms], "some")
    pairs = [(a, s, _settings(file, protocol, a, s)) for a in algorithms for s in _met_by(a, sources)]
    if idle := [s.name for s in sources if not any(s is met for _, met, _ in pairs)]:
        raise UsageError(f"no algorithm of the suite learns from {', '.join(idle)}")
    _check_made(pairs)
    cells = [
        Cell(a.name, s.name, dataclasses.replace(settings, seed=seed)) for seed in chosen for a, s, settings in pairs
    ]
    _unique("cell", [c.id for c in cells], "some")  # names that differ may be one as a folder
    if file.stall_minutes < 0:
        raise UsageError(f"stall_minutes is a time, or 0 for never, got {file.stall_minutes}")
    stall = 60.0 * file.stall_minutes
    return Plan(file.name or path.stem, file.description, path, cells, file.threads, stall, _missing(sources))


def _lengths(part: Mapping[str, Any]) -> dict[str, Any]:
    """With steps and episodes as numbers where they are written 1e6, which YAML 1.1 reads as a string."""
    return {
        k: number(v) if k == "steps" else numbers(v) if k in ("budgets", "evaluation") and isinstance(v, Mapping) else v
        for k, v in part.items()
    }


def _unique(what: str, names: list[str], some: str) -> None:
    if not names:
        raise UsageError(f"there is no {what}: a suite names {some}")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UsageError(f"two {what}s are called {', '.join(twice)}: give one of them another `name`")


def _source(item: str | dict[str, Any], key: str, where: str) -> Source:
    source = build(Source, {key: item} if isinstance(item, str) else _lengths(item), where)
    if getattr(source, key) is None:
        raise UsageError(f"{where} has no `{key}`")
    if key == "env" and source.data is not None:
        raise UsageError(f"{where} names a dataset: put it under `datasets`")
    _check_kinds(source.budgets, f"{where}: budgets")
    env = None if source.env is None else rlctl_envs.canonical(source.env)
    # an algorithm's `on` and `only` may use the short name
    return dataclasses.replace(source, env=env, name=source.name or (env if key == "env" else source.data) or "")


def _algorithm(item: str | dict[str, Any], where: str, sources: list[Source]) -> Algorithm:
    a = build(Algorithm, {"algo": item} if isinstance(item, str) else _lengths(item), where)
    agents.get(a.algo)
    name = a.name or a.algo
    only = [_named(n, sources, f"{name}: only") for n in a.only]
    on = {_named(n, sources, f"{name}: on"): settings for n, settings in a.on.items()}
    return dataclasses.replace(a, name=name, only=only, on=on)


def _named(name: str, sources: list[Source], where: str) -> str:
    """The full name of a source, from its name or from a short one of its task."""
    with contextlib.suppress(ValueError):
        name = next((s.name for s in sources if s.data is None and s.env == rlctl_envs.canonical(name)), name)
    if name not in (names := [s.name for s in sources]):
        close = get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean '{close[0]}'?" if close else f"the suite has {', '.join(names)}"
        raise UsageError(f"{where} names '{name}', which is no source of the suite: {hint}")
    return name


def _met_by(a: Algorithm, sources: list[Source]) -> list[Source]:
    """The sources that `a` learns from: datasets if it needs data, else tasks; of them those of its `only`.

    One that may be given data beside its environment meets the datasets that its `only` names.
    """
    cls = agents.get(a.algo)
    wants_data, takes_data = "data" in cls.sources(), "data" in cls.accepts
    kind = "datasets" if wants_data else "tasks"
    fitting = [s for s in sources if (s.data is not None) == wants_data or (takes_data and s.name in a.only)]
    if unfit := set(a.only) - {s.name for s in fitting}:
        raise UsageError(f"{a.name} learns from {kind}: it cannot meet {', '.join(sorted(unfit))}")
    if not fitting:
        raise UsageError(f"{a.name} learns from {kind}, and the suite has none")
    return [s for s in fitting if not a.only or s.name in a.only]


def _settings(file: File, protocol: Protocol, a: Algorithm, s: Source) -> Settings:
    regime: Regime = agents.get(a.algo).regime
    budget = s.budgets.get(regime, file.budgets.get(regime))
    layers: list[Mapping[str, Any]] = [
        _nested(file.set, "set"),
        {} if budget is None else {"agent": {"steps": budget}},
        _nested(s.set, f"{s.name}: set"),
        {} if a.steps is None else {"agent": {"steps": a.steps}},
        _nested(a.set, f"{a.name}: set"),
        _nested(a.on.get(s.name, {}), f"{a.name} on {s.name}"),
        {"env": s.env, "data": s.data, "device": file.device},
        {"run": protocol.layer() | {"threads": file.threads}},
    ]
    try:
        return experiment.resolve(a.algo, layers)
    except ValueError as e:
        raise UsageError(f"{a.name} on {s.name}: {e}") from e


def _nested(flat: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Dotted keys as nested ones, as in --set; what belongs to the suite as a whole is refused."""
    out: dict[str, Any] = {}
    for key, value in flat.items():
        if key.split(".")[0] in ("algo", "env", "data", "seed", "device"):
            raise UsageError(
                f"{where}: '{key}' is not a setting of an algorithm; it has a place of its own in the suite"
            )
        layer: Any = number(value) if not isinstance(value, Mapping) else _nested(value, where)
        for part in reversed(key.split(".")):
            layer = {part: layer}
        out = merge(out, layer)
    if fixed := set(out.get("run") or {}) & {*PROTOCOL, "threads"}:
        raise UsageError(
            f"{where}: run.{sorted(fixed)[0]} is the same for all cells of a suite: it goes to its section "
            "evaluation (evaluations, episodes, final_episodes, stochastic), or to threads"
        )
    return out


def _check_kinds(budgets: Mapping[str, int], where: str) -> None:
    kinds = set(get_args(Regime))
    for key in budgets:
        if key not in kinds:
            raise UsageError(unknown_key(key, kinds, where))


def _check_made(pairs: list[tuple[Algorithm, Source, Settings]]) -> None:
    """Build every environment and every agent once: what they refuse is better heard now than in the night."""
    built: dict[str, VecEnv] = {}
    try:
        for a, s, settings in pairs:
            if settings.env is None:
                continue  # the dataset names its task, and says so when it is read
            try:
                key = json.dumps([settings.env, settings.env_options], sort_keys=True, default=str)
                if key not in built:
                    built[key] = rlctl_envs.make(settings.env, 1, **settings.env_options)
                env = built[key]
                num_envs = getattr(settings.agent, "num_envs", 1)
                device = torch.device("cpu")  # whether a GPU is there is the executor's business
                spec = Spec(env.obs_dim, env.act_dim, num_envs, device, env.episode_len)
                agents.make(settings.cls, spec, settings.agent)
            except (ValueError, TypeError) as e:
                raise UsageError(f"{a.name} on {s.name}: {e}") from e
    finally:
        for env in built.values():
            env.close()


def _missing(sources: list[Source]) -> list[str]:
    """Datasets that are not here, as the loader would say it."""
    from rlctl.data.dataset import locate

    out = []
    for s in sources:
        if s.data is not None:
            try:
                locate(s.data)
            except DatasetError as e:
                out.append(str(e))
    return out


def _shipped() -> Iterator[Path]:
    """Folders of the suites that come with rlctl: in a wheel, in a source tree."""
    here = Path(__file__).resolve().parent.parent
    yield from (p for p in (here / "suites", here.parent / "benchmarks" / "suites") if p.is_dir())


def folder_name(name: str) -> str:
    """A name as a folder: sb3:ppo is sb3.ppo, mujoco/hopper/medium-v0 is mujoco-hopper-medium-v0."""
    stem = name.removesuffix(".hdf5").removesuffix(".h5").removesuffix(".npz")
    stem = Path(stem).name if stem != name else stem
    return stem.replace(":", ".").replace("/", "-").strip(".-") or "unnamed"
