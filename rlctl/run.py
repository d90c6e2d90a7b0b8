"""A run: the one door through which training reaches logs, evaluation and checkpoints.

    RUN/run.json            status, command, host, versions, git, device, physics, seeds, times, final scores
        config.yaml         fully resolved; `rlctl train --config RUN/config.yaml` repeats the run
        metrics.jsonl       one row per log step         eval.jsonl   one row per evaluation EPISODE
        events.out.*        the same for TensorBoard     console.log  what was printed
        checkpoints/        see rlctl.checkpoint

A loop calls `begin` once, then `tick` after every update. Everything else follows from the counters: the order of work
within a tick is log, evaluate, checkpoint, stop, and each is due when the progress crosses a multiple of its period, so
an interrupted run and one that never stopped do the same things at the same moments.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from torch import Tensor

from rlctl import checkpoint, parallel
from rlctl.display import Display
from rlctl.errors import Diverged, Interrupted, UsageError
from rlctl.evaluate import Evaluation, evaluate
from rlctl.seeding import derive
from rlctl.types import Agent, Metrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from rlctl_envs import VecEnv


RECENT = 10
"""Evaluations in training whose mean goes beside that of the last agent and that of the best."""


@dataclass(frozen=True)
class RunConfig:
    """How a run watches itself. Periods count environment steps online and gradient steps offline."""

    log_every: Annotated[int, Field(ge=0)] | None = None
    """Period of metric rows; None takes 1/500 of the run, 0 writes one only at the end."""
    evaluations: Annotated[int, Field(ge=1)] = 100
    """Evaluations during a run, evenly spread."""
    eval_every: Annotated[int, Field(ge=0)] | None = None
    """Period of evaluations instead of their number; 0 evaluates only at the end."""
    eval_episodes: Annotated[int, Field(ge=1)] = 10
    """Episodes per evaluation during training."""
    final_episodes: Annotated[int, Field(ge=0)] = 100
    """Episodes of the evaluation at the end, 0 for none."""
    eval_stochastic: bool = False
    """Evaluate with sampled actions as well as with deterministic ones."""
    checkpoint_every: Annotated[int, Field(ge=0)] | None = None
    """Period of checkpoints; None takes 1/10 of the run, 0 writes one only at the end and on interruption."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Checkpoints kept, the newest ones (the best agent is kept beside them)."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of torch; None takes all cores, or one where the networks are too small to gain from more. Results
    are bit-reproducible for one value of it."""
    graphs: Literal["auto", "require", "never"] = "auto"
    """Run updates and actions from CUDA graphs: auto where device and agent allow it; require insists."""
    compile: bool = False
    """Run the agent's losses through torch.compile: half a minute or more at the start, then a tenth faster for PPO on
    a CPU. It pays in long runs of agents with many small steps, and not for SAC."""
    trace: bool = True
    """On a CPU run the loss of PPO and SPO, and its gradients, from a recording: the same bits, sooner where networks
    and minibatches are small. Not beside compile."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Arithmetic of the losses: float32; tf32 rounds the factors of matrix products on CUDA; bf16 is autocast."""


class EpisodeStats:
    """Returns and lengths of the episodes that training itself finishes, accumulated on the device.

    `add` only keeps what it is given; many steps are worked through at once, when the numbers are asked for or
    `SPAN` steps have come.
    """

    SPAN = 256

    def __init__(self, num_envs: int, device: torch.device) -> None:
        self.ret = torch.zeros(num_envs, dtype=torch.float64, device=device)
        """Return of each world's running episode up to the pending steps; NaN for an episode that is not counted."""
        self.length = torch.zeros(num_envs, dtype=torch.float64, device=device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        """Since the last `take`: sum of returns, sum of lengths, number of episodes."""
        self._pending: list[tuple[Tensor, Tensor]] = []

    def add(self, reward: Tensor, done: Tensor) -> None:
        """Take in one vector step: reward [N], episode ends [N]."""
        if self._pending and self._pending[-1][0].shape != reward.shape:
            self._settle()  # another environment, of another number of worlds
        self._pending.append((reward, done))  # never written over: see `VecEnv`
        if len(self._pending) >= self.SPAN:
            self._settle()

    def leave_out(self, worlds: slice) -> None:
        """Do not count the running episodes of `worlds`: their time limits come early."""
        self._settle()
        self.ret[worlds] = math.nan

    def take(self) -> tuple[float, float, int]:
        """(mean return, mean length, count) of the episodes since the last call, of all processes; reads the device."""
        self._settle()
        ret, length, n = parallel.total(self.sums).tolist()
        self.sums.zero_()
        return (ret / n, length / n, int(n)) if n else (math.nan, math.nan, 0)

    def state(self) -> dict[str, Tensor]:
        """Everything, the pending steps as they are: when they are worked through must not depend on a checkpoint."""
        reward, done = self._stacked()
        return {"ret": self.ret, "length": self.length, "sums": self.sums, "reward": reward, "done": done}

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Undo `state`."""
        self.ret, self.length, self.sums = state["ret"], state["length"], state["sums"]
        self._pending = list(zip(state["reward"], state["done"], strict=True))

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """The pending rewards and episode ends, `[T, N]`."""
        if not self._pending:
            return self.ret.new_empty((0, len(self.ret))), self.ret.new_empty((0, len(self.ret)), dtype=torch.bool)
        reward, done = zip(*self._pending, strict=True)
        return torch.stack(reward), torch.stack(done)

    def _settle(self) -> None:
        """Work through the pending steps. An episode's return is a difference of running sums over them."""
        if not self._pending:
            return
        reward, done = self._stacked()
        self._pending.clear()
        if self.ret.shape != reward.shape[1:]:
            self.ret, self.length = (torch.zeros_like(reward[0], dtype=torch.float64) for _ in range(2))
        # row t: after t of the steps
        total = torch.cat([torch.zeros_like(self.ret)[None], reward.double().cumsum(0)])
        step = torch.arange(len(total), device=reward.device)[:, None]
        ends = torch.cat([torch.zeros_like(done[:1]), done])
        began = torch.where(ends, step, 0).cummax(0).values  # of the episode that runs after t steps; 0: before them
        before = began == 0

        def so_far(rows: slice, at: slice) -> tuple[Tensor, Tensor]:
            """Return and length, up to `rows`, of the episodes that run at `at`."""
            carried = torch.where(before[at], self.ret, 0.0)  # not a product: NaN times 0 is NaN
            ret = total[rows] - total.gather(0, began[at]) + carried
            return ret, step[rows] - began[at] + self.length * before[at]

        ret, length = so_far(slice(1, None), slice(-1))
        counted = done & ~ret.isnan()
        ret_sum, length_sum = (torch.where(counted, x, 0.0).sum() for x in (ret, length))
        self.sums += torch.stack([ret_sum, length_sum, counted.sum().double()])
        last = slice(-1, None)
        ret, length = so_far(last, last)
        self.ret, self.length = ret[0], length[0]


@dataclass
class Stage:
    """A named part of a run, with counters of its own."""

    name: str
    env_steps: int = 0
    updates: int = 0


class Stateful(Protocol):
    """An environment that can be checkpointed: flat arrays in, flat arrays out."""

    def state(self) -> dict[str, np.ndarray]:
        """Everything the simulation needs to go on."""

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Undo `state`."""


class EnvPart:
    """An environment as a part of a checkpoint."""

    def __init__(self, env: Stateful) -> None:
        self.env = env

    def save(self, folder: Path, previous: Path | None = None) -> None:
        """Write the environment's arrays."""
        arrays = {k: np.asarray(v, order="C") for k, v in self.env.state().items()}  # keeps 0-d arrays 0-d
        save_numpy(arrays, folder / "state.safetensors")

    def load(self, folder: Path) -> None:
        """Read them back."""
        self.env.set_state(load_numpy(folder / "state.safetensors"))


EnvFactory = Callable[[int, int], "VecEnv"]
"""(num_envs, seed) -> environment."""


class Run:
    """Counts, logs, evaluates, checkpoints. `folder=None` keeps everything in memory and writes nothing.

    `follow` is for the processes beside rank 0 (`rlctl.parallel`): with `resume` they take agent and counters from the
    checkpoints of that run directory, which is not theirs, and begin fresh episodes.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        config: RunConfig | None = None,
        *,
        seed: int = 0,
        make_eval_env: EnvFactory | None = None,
        display: Display | None = None,
        score: Callable[[float], float | None] = lambda _: None,
        labels: Mapping[str, Any] | None = None,
        resume: bool = False,
        follow: Path | None = None,
        on_begin: Callable[[Agent], None] = lambda _: None,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.config = config or RunConfig()
        self.seed = seed
        self.make_eval_env = make_eval_env
        self.display = display or Display(quiet=True)
        self.score = score
        """Raw return to normalised score, or None where no reference is known."""
        self.labels = dict(labels or {})
        """Goes into every row of eval.jsonl: which dataset a score belongs to."""
        self.on_begin = on_begin
        """Called with the agent when a stage begins: what it takes from a dataset is there by then."""
        self.env_steps = 0
        self.updates = 0
        self.progress = 0
        """Environment steps plus updates made without any: the clock of all periods and the x axis of all plots."""
        self.total = 0
        self.marks = {"log": 0, "eval": 0, "checkpoint": 0}
        self.episodes = EpisodeStats(1, torch.device("cpu"))
        self.spent = {"collect": 0.0, "learn": 0.0, "eval": 0.0}
        self.eval_episodes_used = 0
        self.best = -math.inf
        self.recent: deque[float] = deque(maxlen=RECENT)
        """Mean returns of the latest evaluations in training, the newest last."""
        self.last_eval: Evaluation | None = None
        self.final: dict[str, Any] | None = None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._interval = (0, 0.0, 0.0)  # env steps, collect seconds, learn seconds at the last log row
        self._parts: dict[str, checkpoint.Part] = {}
        self._eval_envs: dict[int, VecEnv] = {}
        self._stop = False
        self._saved_at = -1
        self._restored: Path | None = None
        self.stages: dict[str, Stage] = {}
        self._stage = Stage("none")
        self._planned = False
        self._envs: list[VecEnv] = []
        self._unclaimed: dict[str, Path] = {}
        """Folders of restored parts by name, until a stage brings the object they belong to."""
        self._offsets: dict[str, int] = {}
        self._rows: dict[str, IO[str]] = {}
        self._writer: SummaryWriter | None = None
        self._lock: IO[str] | None = None
        self._follows = follow is not None
        if follow is not None and resume:
            self._restored = checkpoint.newest_intact(follow / "checkpoints", self.display.say)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self.display.log_to(self.folder / "console.log")
            if resume:
                self._restored = checkpoint.newest_intact(self.folder / "checkpoints", self.display.say)

    # -------------------------------------------------------------------------------------------------- the loop
    def stage(self, agent: Agent, name: str) -> Stage:
        """The counters of the stage `name`; the first call restores agent and run when the run is a resumed one.

        A loop asks for its stage first and returns at once when the stage has made all its steps: so a resumed
        multi-stage run calls its loops again from the start and goes on where it was.
        """
        if self._restored is not None:
            self._restore_run(agent, self._restored)
        if self.folder is not None and not self._rows:
            self._open_logs()
        return self.stages.setdefault(name, Stage(name))

    def begin(
        self,
        agent: Agent,
        stage: Stage,
        *,
        env: VecEnv | None = None,
        buffer: Any = None,
        left: int,
        stagger: bool = False,
    ) -> Any:
        """Start or go on with a stage that has `left` steps to make. Returns the observation to act on.

        `stagger` spreads the ages of the first episodes (`VecEnv.stagger`), where the environment can.

        The first stage that brings an environment or a buffer makes it part of all checkpoints from then on, and loads
        it if the run is resumed. An environment that an earlier stage has used goes on where it stands.
        """
        unowned_parameters(agent)
        self._stage = stage
        self.on_begin(agent)
        if not self._planned:
            self._set_total(self.progress + left)
        if buffer is not None and hasattr(buffer, "save"):
            self._claim(f"{stage.name}.buffer", buffer)
        obs = None if env is None else self._start_env(agent, env, stage, stagger)
        self.display.start(self.total, self.progress)
        self._evaluate_if_due(agent)
        self._stop = parallel.anybody(self._stop, agent.spec.device)
        if self._stop:  # an evaluation that was due and is not made stays due at this very step
            self.save(agent)
            raise Interrupted(self.folder)
        return obs

    def pass_over(self, stage: Stage, *, env: VecEnv | None = None, buffer: Any = None) -> None:
        """Of a stage that is done: restore what it left behind in a resumed run, for a later stage may go on with it.

        A run that stopped between two stages holds nothing yet under the name of the second.
        """
        if buffer is not None and f"{stage.name}.buffer" in self._unclaimed:
            self._claim(f"{stage.name}.buffer", buffer)
        if env is not None and f"{stage.name}.env" in self._unclaimed and env.can_checkpoint:
            self._envs.append(env)
            self._claim(f"{stage.name}.env", EnvPart(env))

    def plan(self, total: int) -> None:
        """Say how long the whole of a multi-stage run is (its progress at the end), before its first loop.

        Without it periods that are parts of the total, and the time to go, refer to the stage under way.
        """
        self._set_total(total)
        self._planned = True

    def _start_env(self, agent: Agent, env: VecEnv, stage: Stage, stagger: bool) -> Tensor:
        name = f"{stage.name}.env"
        if any(e is env for e in self._envs):
            if env.can_checkpoint:
                self._claim(name, EnvPart(env))
            return env.current_obs
        self._envs.append(env)
        if env.can_checkpoint and self._claim(name, EnvPart(env)):
            return env.current_obs
        self.episodes = EpisodeStats(env.num_envs, agent.spec.device)
        stream = "env"
        if self.progress and self._follows:
            stream = f"env at {self.progress}"
        elif self.progress and not env.can_checkpoint:
            self.display.say(f"{env.id} cannot restore its simulator: the run goes on with fresh episodes")
            stream = f"env at {self.progress}"  # not the episodes it has already seen
        obs, _ = env.reset(seed=derive(self.seed, f"{stream}/{stage.name}", 31))
        if stagger and env.num_envs > 1:
            if env.can_stagger:
                env.stagger()
                self.episodes.leave_out(slice(1, None))  # environment 0 keeps its full time
            else:
                self.display.say(f"{env.id} cannot stagger its worlds: they may reach their time limits together")
        return obs

    def _claim(self, name: str, part: checkpoint.Part) -> bool:
        """Make `part` a part of the checkpoints; load it and return True if the restored checkpoint holds it."""
        self._parts = {
            n: p for n, p in self._parts.items() if not _covers(part, p)
        }  # it may have had another stage's name
        self._parts[name] = part
        folder = self._unclaimed.pop(name, None)
        if folder is not None:
            part.load(folder)
        return folder is not None

    def _set_total(self, total: int) -> None:
        """Change the length of the run; periods that are parts of it move, and so do the marks that count them."""
        if total == self.total:
            return
        self.total = total
        if self.progress:
            chosen = (self.config.log_every, self.config.eval_every, self.config.checkpoint_every)
            auto = {"log": 500, "eval": self.config.evaluations, "checkpoint": 10}
            for (what, parts), every in zip(auto.items(), chosen, strict=True):
                if every is None:
                    self.marks[what] = self.progress // self.period(None, parts)

    def tick(self, agent: Agent, metrics: Sequence[Metrics], env_steps: int) -> None:
        """After each step of a loop: `metrics` of its updates (maybe none) and the env steps it took.

        Raises Diverged when a metric is not finite, Interrupted after a signal (with the checkpoint written).
        """
        self.env_steps += env_steps
        self.updates += len(metrics)
        self._stage.env_steps += env_steps
        self._stage.updates += len(metrics)
        self.progress += env_steps or len(metrics)
        for row in metrics:
            if not isinstance(row, Mapping):
                raise TypeError(f"{type(agent).__name__}.update returned {row!r}, not a dict of metrics")
            for name, value in row.items():
                self._sums[name] = self._sums[name] + value if name in self._sums else _metric(agent, name, value)
                self._counts[name] = self._counts.get(name, 0) + 1
        if self._due("log", self.period(self.config.log_every, 500)):
            self._log(agent)
        self._evaluate_if_due(agent)
        self._stop = parallel.anybody(self._stop, agent.spec.device)
        every = self.period(self.config.checkpoint_every, 10)
        if self._stop or (every and self._due("checkpoint", every)):
            self.save(agent)
        if self._stop:
            raise Interrupted(self.folder)

    def finish(self, agent: Agent) -> Evaluation | None:
        """Last log row, checkpoint, final evaluation. Returns the latter (None without an evaluation environment)."""
        if self._counts:
            self._log(agent)
        self.save(agent)
        result = None
        if self.make_eval_env is not None and self.config.final_episodes:
            result = self._evaluate(agent, self.config.final_episodes, "final", final=True)
            if result is None:
                raise Interrupted(self.folder)
            self.final = {
                "episodes": len(result.returns),
                "return_mean": result.mean,
                "return_std": result.std,
                "normalized_score": self.score(result.mean),
                "deterministic": True,
                f"last{RECENT}_eval_mean": fmean(self.recent) if self.recent else None,
                f"last{RECENT}_evals": len(self.recent),
                "best_eval_mean": self.best if math.isfinite(self.best) else None,
                "eval_episodes_used_total": self.eval_episodes_used,
                **self.labels,
            }
        self.display.stop()
        return result

    def period(self, chosen: int | None, parts: int) -> int:
        """A configured period, or `total / parts`, at least 1; 0 stays 0 (never)."""
        return max(self.total // parts, 1) if chosen is None else chosen

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the block's wall-clock seconds to `spent[what]`."""
        start = time.perf_counter()
        yield
        self.spent[what] += time.perf_counter() - start

    def _due(self, what: str, every: int) -> bool:
        if every < 1:
            return False
        mark = self.progress // every
        crossed, self.marks[what] = mark > self.marks[what], mark
        return crossed

    # ------------------------------------------------------------------------------------------------------ logs
    def _log(self, agent: Agent) -> None:
        names = list(self._sums)
        sums = torch.stack([self._sums[n].float() for n in names]) if names else torch.zeros(0)
        values = parallel.mean(sums).tolist() if names else []
        row = {n: v / self._counts[n] for n, v in zip(names, values, strict=True)}
        self._sums, self._counts = {}, {}
        ret, length, n = self.episodes.take()
        if n:
            row |= {"charts/episodic_return": ret, "charts/episodic_length": length, "charts/episodes": float(n)}
        if self._envs:
            row |= self._envs[-1].report()
        if bad := [k for k, v in row.items() if not math.isfinite(v)]:
            raise self.diverged(agent, bad)
        steps, collect, learn = self._interval
        d_steps, d_collect, d_learn = (
            self.env_steps - steps,
            self.spent["collect"] - collect,
            self.spent["learn"] - learn,
        )
        busy = self.spent["collect"] + self.spent["learn"]
        row |= {
            "charts/SPS": (self.env_steps or self.updates) / busy if busy else 0.0,
            "time/SPS_interval": d_steps / (d_collect + d_learn) if d_steps and d_collect + d_learn else 0.0,
            "time/SPS_collect": d_steps / d_collect if d_collect else 0.0,
            "time/SPS_learn": d_steps / d_learn if d_steps and d_learn else 0.0,
            "time/collect_s": self.spent["collect"],
            "time/learn_s": self.spent["learn"],
            "time/eval_s": self.spent["eval"],
        }
        self._interval = (self.env_steps, self.spent["collect"], self.spent["learn"])
        self._write("metrics", {"env_steps": self.env_steps, "updates": self.updates} | row)
        self._scalars(row)
        self.display.progress(self.progress, self.env_steps > 0, row, collect=d_collect, learn=d_learn)

    def _write(self, log: str, row: dict[str, Any]) -> None:
        if log in self._rows:
            self._rows[log].write(json.dumps(row) + "\n")
            self._rows[log].flush()

    def _scalars(self, row: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in row.items():
                self._writer.add_scalar(name, value, self.progress)
            other = self.updates if self.env_steps else self.env_steps
            self._writer.add_scalar("charts/updates" if self.env_steps else "charts/env_steps", other, self.progress)

    def _open_logs(self) -> None:
        assert self.folder is not None
        for name in ("metrics", "eval"):
            file = (self.folder / f"{name}.jsonl").open("a")
            file.truncate(self._offsets.get(name, 0))  # rows after the checkpoint belong to a past that is redone
            self._rows[name] = file
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second to import: only when it is wanted

            self._writer = SummaryWriter(str(self.folder), purge_step=self.progress + 1 if self.progress else None)

    # ------------------------------------------------------------------------------------------------ evaluation
    def _evaluate_if_due(self, agent: Agent) -> None:
        every = self.period(self.config.eval_every, self.config.evaluations)
        if self.make_eval_env is None or every < 1 or self.progress // every <= self.marks["eval"]:
            return
        if self._stop:
            return  # stays due: the resumed run begins with it
        if self._evaluate(agent, self.config.eval_episodes, "eval") is not None:
            self.marks["eval"] = self.progress // every

    def _evaluate(self, agent: Agent, episodes: int, stream: str, final: bool = False) -> Evaluation | None:
        """Evaluate and log; None, with nothing logged, if a signal came meanwhile."""
        assert self.make_eval_env is not None
        with self.timed("eval"):
            if episodes not in self._eval_envs:
                self._eval_envs[episodes] = self.make_eval_env(episodes, derive(self.seed, stream, 31))
            env = self._eval_envs[episodes]
            results = {}
            for stochastic in (False, True) if self.config.eval_stochastic else (False,):
                result = evaluate(
                    agent,
                    env,
                    episodes,
                    seed=derive(self.seed, stream, 31),
                    stochastic=stochastic,
                    interrupted=lambda: self._stop,
                )
                if result is None:
                    return None
                results[stochastic] = result
        row: dict[str, float] = {}
        for stochastic, result in results.items():
            for i, (ret, length) in enumerate(zip(result.returns, result.lengths, strict=True)):
                self._write(
                    "eval",
                    {
                        "env_steps": self.env_steps,
                        "updates": self.updates,
                        "episode": i,
                        "return": ret,
                        "length": length,
                        "deterministic": not stochastic,
                        "final": final,
                        **self.labels,
                    },
                )
            if not final:
                self.eval_episodes_used += len(result.returns)
            prefix = f"eval/{'stochastic_' if stochastic else ''}"
            row |= {f"{prefix}return_mean": result.mean, f"{prefix}return_std": result.std}
        main = results[False]
        if (score := self.score(main.mean)) is not None:
            row["eval/normalized_score"] = score
        row["eval/episodes_used_total"] = float(self.eval_episodes_used)
        if not final:
            self._scalars(row)
            self.last_eval = main
            self.recent.append(main.mean)
            self.display.evaluated(self.progress, main.mean, main.std, len(main.returns), score)
            if main.mean > self.best:
                self.best = main.mean
                if self.folder is not None:
                    note = {"env_steps": self.env_steps, "updates": self.updates, "eval_return_mean": main.mean}
                    used = {"eval_episodes_used_total": self.eval_episodes_used}
                    checkpoint.save_agent(self.folder / "checkpoints" / "best", agent, note | used)
        return main

    # ------------------------------------------------------------------------------------------------ checkpoint
    def save(self, agent: Agent) -> None:
        """Write a checkpoint of this moment (once)."""
        if self.folder is None or self._saved_at == self.progress:
            return
        self._refuse_non_finite(agent)
        for file in self._rows.values():
            file.flush()
        state = {
            "env_steps": self.env_steps,
            "updates": self.updates,
            "progress": self.progress,
            "total": self.total,
            "stages": {n: [x.env_steps, x.updates] for n, x in self.stages.items()},
            "marks": self.marks,
            "spent": self.spent,
            "interval": list(self._interval),
            "counts": self._counts,
            "best": self.best if math.isfinite(self.best) else None,
            "recent": list(self.recent),
            "eval_episodes_used": self.eval_episodes_used,
            "offsets": {k: f.tell() for k, f in self._rows.items()},
        }
        tensors = {f"sum.{k}": v for k, v in self._sums.items()}
        tensors |= {f"episodes.{k}": v for k, v in self.episodes.state().items()}
        name = f"step_{self.progress:012d}"
        snap = checkpoint.Snapshot(state, tensors)
        folder = checkpoint.save(
            self.folder / "checkpoints", name, agent, self._parts, snap, self.config.keep, self._unclaimed
        )
        self._unclaimed = {n: folder / n for n in self._unclaimed}
        self._saved_at = self.progress

    def _restore_run(self, agent: Agent, folder: Path) -> None:
        snap = checkpoint.load(folder, agent)
        s = snap.state
        self.env_steps, self.updates, self.progress = s["env_steps"], s["updates"], s["progress"]
        self.marks, self.spent = s["marks"], s["spent"]
        self._interval = (int(s["interval"][0]), s["interval"][1], s["interval"][2])
        self._counts = s["counts"]
        self.best = -math.inf if s["best"] is None else s["best"]
        self.recent = deque(s.get("recent", []), maxlen=RECENT)  # checkpoints of before it was kept lack it
        self.eval_episodes_used = s["eval_episodes_used"]
        if self._follows:  # generators, worlds and logs are those of rank 0
            for name, g in agent.rng.items():
                g.manual_seed(derive(self.seed, f"{name} at {self.progress}"))
        else:
            self._offsets = s["offsets"]
            self.episodes.set_state({k[9:]: v for k, v in snap.tensors.items() if k.startswith("episodes.")})
            self._unclaimed = {p.name: p for p in folder.iterdir() if p.is_dir()}
        self._sums = {k.removeprefix("sum."): v for k, v in snap.tensors.items() if k.startswith("sum.")}
        self.stages = {n: Stage(n, *counts) for n, counts in s["stages"].items()}
        self._restored, self._saved_at = None, self.progress
        planned, self.total = self.total, s["total"]
        if self._planned:
            self._set_total(planned)
        self.display.say(f"resumed from {folder.name}: {self.env_steps:,} env steps, {self.updates:,} updates")

    def diverged(self, agent: Agent, names: Sequence[str] = ()) -> Diverged:
        """The error to raise when `names` are no longer finite; dumps the agent and a report beside the checkpoints.

        Without names they are the metrics since the last log row, or the parameters.
        """
        params = non_finite(agent)
        names = names or self._non_finite_metrics() or ["the parameters" if params else "the action"]
        where = f"env step {self.env_steps:,}, update {self.updates:,}"
        message = f"{', '.join(names)} became non-finite at {where}"
        if params:
            message += f" (parameters affected: {', '.join(params[:4])}{', ...' if len(params) > 4 else ''})"
        if self.folder is not None:
            report = {
                "metrics": list(names),
                "parameters": params,
                "env_steps": self.env_steps,
                "updates": self.updates,
            }
            checkpoint.save_agent(self.folder / "diverged", agent, report)
            good = checkpoint.latest(self.folder / "checkpoints")
            message += f"; state dumped in {self.folder / 'diverged'}"
            message += f", last good checkpoint: {good.name}" if good else ""
        return Diverged(message)

    def _refuse_non_finite(self, agent: Agent) -> None:
        """A checkpoint must never hold a dead agent: it would be the one a resume picks."""
        if self._non_finite_metrics() or non_finite(agent):
            raise self.diverged(agent)

    def _non_finite_metrics(self) -> list[str]:
        return [k for k, v in self._sums.items() if not bool(v.isfinite())]

    # --------------------------------------------------------------------------------------------------- signals
    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Signals ask for a checkpoint at the next step boundary; the same signal again is not caught.

        They are SIGINT, SIGTERM and, unless it is ignored (nohup), the SIGHUP of a terminal that goes away.
        """

        def ask(signum: int, _: FrameType | None) -> None:
            self._stop = True
            signal.signal(signum, signal.SIG_DFL if signum != signal.SIGINT else signal.default_int_handler)
            if not self.display.quiet:
                # straight to the descriptor: the signal may have come amid a write to the stream or the log, and
                # Python's buffered writers refuse to be entered twice
                line = f"\n{signal.Signals(signum).name}: writing a checkpoint at the next step boundary\n"
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, line.encode())

        caught = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            caught.append(signal.SIGHUP)
        before = {s: signal.signal(s, ask) for s in caught}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _take_lock(self) -> None:
        assert self.folder is not None
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise UsageError(f"{self.folder} is in use by another process: wait for it, or stop it first") from e

    def close(self) -> None:
        """Close files and environments."""
        for env in self._eval_envs.values():
            env.close()
        for file in self._rows.values():
            file.close()
        self._rows = {}
        if self._writer is not None:
            self._writer.close()
        self.display.stop()
        if self._lock is not None:
            self._lock.close()


def _metric(agent: Agent, name: str, value: Any) -> Tensor:
    """A copy of a metric; TypeError unless it is a 0-dim tensor."""
    if not isinstance(value, Tensor) or value.dim():
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
        raise TypeError(f"{type(agent).__name__}.update gives {name} as {what}: a metric is a detached 0-dim tensor")
    return value.clone()


def unowned_parameters(agent: Agent) -> None:
    """Raise TypeError for a trainable parameter that none of the agent's optimisers holds: it would never move."""
    owned = {id(p) for opt in agent.optimizers().values() for group in opt.param_groups for p in group["params"]}
    owned |= {id(p) for p in agent.moved_by_hand()}
    if lost := [n for n, p in agent.named_parameters() if p.requires_grad and id(p) not in owned]:
        names = ", ".join(lost[:4]) + (", ..." if len(lost) > 4 else "")
        raise TypeError(
            f"no optimiser of {type(agent).__name__} holds {names}: keep optimisers as attributes (or in a dict or "
            "list that is one), or freeze with requires_grad_(False)"
        )


def _covers(new: checkpoint.Part, old: checkpoint.Part) -> bool:
    """Whether `new` saves what `old` does: the same thing, or one that `new` holds (`Mix.holds`)."""
    if isinstance(new, EnvPart) and isinstance(old, EnvPart):
        return new.env is old.env
    return old is new or any(old is x for x in getattr(new, "holds", ()))


def non_finite(agent: Agent) -> list[str]:
    """Names of parameters and buffers that hold a NaN or an infinity."""
    return [k for k, v in agent.state_dict().items() if v.is_floating_point() and not bool(v.isfinite().all())]
