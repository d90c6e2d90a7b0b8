"""What a GPU gains: simulation, updates, PPO from start to a return. One command, at most ten minutes.

    python benchmarks/speed/gpu.py                     # on a machine with an NVIDIA GPU
    python benchmarks/speed/gpu.py --dry-run           # anywhere: tiny, on the CPU, to see that it works

Runs from a source tree; the packages may be installed or unpacked into a folder (`benchmarks/speed/gpu_wheels.py`).
Each piece is measured in a process of its own, the kernels of all tasks are compiled side by side beforehand, and what
was measured is written after each piece: one that crashes, or an interrupted run, costs nothing else. What did not fit
into the time, or is not installed, is listed under `skipped`, with the reason; no number is ever filled in.

Measured, on the same host:
- environment steps per second of Hopper, HalfCheetah, Ant and Humanoid at several numbers of worlds: captured and eager
  on the GPU, and the CPU engine on all cores; bytes of device memory per world;
- updates per second of SAC, TD3, TD3+BC, IQL and EXPO, eager and captured, and of Stable-Baselines3 on the same GPU;
- PPO end to end: steps per second, and seconds until the mean return of finished episodes reaches a mark, not counting
  compilation, capture and the four rollouts in which they happen.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2]), str(HERE.parents[2] / "envs")]

import torch
from common import RESULTS, write

import rlctl
from rlctl import agents
from rlctl.agents.ppo import PPOConfig
from rlctl.data.dataset import Dataset
from rlctl.types import Agent, Batch, Spec

NUMBERS = (256, 1024, 4096, 16384)
"""Worlds, ascending: memory that a graph allocated stays with the process, so a smaller number would hide in it."""
PARTS = ("updates", "simulation", "ppo")
SHARES = {"updates": 0.3, "simulation": 0.6, "ppo": 1.0}
"""Of the time that is left when a part begins, all its pieces together."""
TARGETS = {"Hopper": 2500.0, "HalfCheetah": 4000.0, "Ant": 3000.0, "Humanoid": 4000.0}
OBS, ACT, ROWS, BATCH = 17, 6, 100_000, 256
"""HalfCheetah's sizes, for the updates."""
LEARNERS = ("sac", "td3", "td3bc", "iql", "expo")


class OutOfTime(Exception):
    """The rest of the time belongs to others."""


class Clock:
    """The time there is, and who may use how much of it."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.stops = [self.end]

    def left(self) -> float:
        return self.stops[-1] - time.monotonic()

    @contextmanager
    def share(self, part: float) -> Iterator[None]:
        """Within, `left` counts to the end of `part` of what is left now."""
        self.stops.append(time.monotonic() + part * self.left())
        try:
            yield
        finally:
            self.stops.pop()

    def need(self, seconds: float) -> None:
        if self.left() < seconds:
            raise OutOfTime(f"{self.left():.0f} s were left")


class Report:
    """Rows by part, written as soon as they are there."""

    def __init__(self, out: Path, head: dict[str, Any]) -> None:
        self.out = out
        self.result: dict[str, Any] = head | {"simulation": [], "updates": [], "ppo": [], "skipped": []}

    def add(self, part: str, **row: Any) -> None:
        self.result[part].append(row)
        self.write()
        print("  ".join(f"{k}={v:,.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)

    def write(self) -> None:
        """So that whoever kills this after ten minutes keeps what was measured."""
        write("speed-gpu", self.result, self.out, quiet=True)

    def merge(self, file: Path) -> None:
        """Take over what a piece has written."""
        found = json.loads(file.read_text())
        for part in (*PARTS, "skipped"):
            self.result[part] += found[part]

    def save(self) -> None:
        write("speed-gpu", self.result, self.out)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Note why something could not be measured, and go on."""
        try:
            yield
        except OutOfTime as e:
            self.result["skipped"].append({"what": what, "why": f"no time: {e}"})
        except Exception as e:
            self.result["skipped"].append({"what": what, "why": f"{type(e).__name__}: {e}"})
            print(f"skipped {what}: {type(e).__name__}: {e}", flush=True)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rate(step: Callable[[], int], seconds: float, rounds: int = 3) -> float:
    """Units per second of `step`, which returns the units it did: median of rounds, each waiting for the device."""
    step()
    seen = []
    for _ in range(rounds):
        synchronize()
        start, done = time.perf_counter(), 0
        while True:
            for _ in range(4):
                done += step()
            synchronize()
            if (spent := time.perf_counter() - start) >= seconds / rounds:
                break
        seen.append(done / spent)
    return statistics.median(seen)


def free_memory() -> int:
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


# ---------------------------------------------------------------------------------------------------------- simulation
def load_kernels(task: str, device: str) -> None:
    """Run a few worlds once, which compiles what they need."""
    env = rlctl.make_env(task, 16, seed=0, device=device, backend="warp")
    env.reset()
    env.step(torch.zeros(16, env.act_dim, device=device))
    synchronize()
    env.close()


@functools.cache
def memory_without_worlds(task: str, device: str) -> int:
    """Free bytes of this process once the code it loads is there, which is not memory of a world."""
    load_kernels(task, device)
    return free_memory()


def simulate(task: str, n: int, device: str, seconds: float, clock: Clock, report: Report) -> None:
    """The GPU engine, captured and eager, then the CPU engine."""
    clock.need(4 * seconds + 5)
    before = memory_without_worlds(task, device)
    start = time.perf_counter()
    env: Any = rlctl.make_env(task, n, seed=0, device=device, backend="warp")
    env.reset()
    synchronize()
    built = time.perf_counter() - start
    used = before - free_memory()
    action = torch.zeros(n, env.act_dim, device=device)

    def captured() -> int:
        action.uniform_(-1, 1)
        env.step(action)
        return n

    def eager() -> int:
        env._action.uniform_(-1, 1)
        env.program.run_eagerly()
        return n

    row: dict[str, Any] = {"task": task, "num_envs": n, "mode": env.program.mode, "ready_after_s": built}
    row["captured"] = rate(captured, seconds)
    row["eager"] = rate(eager, seconds, rounds=1)
    row["bytes_per_env"] = used / n if used > 0 else None
    row["troubles"] = env.report()
    env.close()
    cpu = rlctl.make_env(task, n, seed=0, backend="cpu")
    cpu.reset()
    moves = torch.rand(n, cpu.act_dim) * 2 - 1

    def on_cpu() -> int:
        cpu.step(moves)
        return n

    row["cpu_engine"] = rate(on_cpu, seconds, rounds=1)
    cpu.close()
    row["captured_over_cpu"] = row["captured"] / row["cpu_engine"]
    report.add("simulation", **row)


# ------------------------------------------------------------------------------------------------------------- updates
def transitions(rows: int, device: str) -> Batch:
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, generator=g, device=device)

    flag = torch.zeros(rows, dtype=torch.bool, device=device)
    return Batch(normal(OBS), normal(ACT).tanh(), normal(), normal(OBS), flag, flag.clone())


def learner(name: str, device: str) -> tuple[Agent, Callable[[], int]]:
    """An agent and one update of it, sampling included."""
    spec = Spec(OBS, ACT, 1, torch.device(device))
    agent = agents.make(name, spec)
    rows = transitions(ROWS, device)
    source: Any
    if agent.regime == "offline":
        source = Dataset(rows, torch.arange(1000, ROWS + 1, 1000), id="made-up")  # episodes of 1000 steps
        agent.prepare(source)
    else:
        source = rlctl.Ring(ROWS, device)
        source.add(rows)

    def update() -> int:
        agent.update(source.sample(BATCH))
        return 1

    return agent, update


def updates(name: str, device: str, graphs: Any, seconds: float, clock: Clock, report: Report) -> None:
    """Eager, captured, and the peer where there is one."""
    clock.need(4 * seconds + 3)
    if name not in agents.names():
        raise LookupError("no such algorithm in this version")
    row: dict[str, Any] = {"algo": name, "batch": BATCH}
    _, update = learner(name, device)
    for _ in range(5):
        update()
    row["eager"] = rate(update, seconds)
    agent, update = learner(name, device)
    row["how"] = rlctl.accelerate(agent, graphs=graphs).say()
    for _ in range(3 * max(getattr(agent.cfg, "policy_every", 4), 4) + 2):  # each turn of its Python comes three times
        update()
    row["captured"] = rate(update, seconds)
    row["captured_over_eager"] = row["captured"] / row["eager"]
    row["replays"] = getattr(agent.update, "replays", 0)
    if name in ("sac", "td3"):
        with report.attempt(f"Stable-Baselines3 {name}"):
            row["sb3"] = rate(peer(name, device), seconds)
            row["captured_over_sb3"] = row["captured"] / row["sb3"]
    report.add("updates", **row)


def peer(name: str, device: str) -> Callable[[], int]:
    """One gradient step of Stable-Baselines3, its replay buffer on the host as it always is."""
    import gymnasium
    import numpy as np
    import stable_baselines3
    from stable_baselines3.common.logger import configure

    env = gymnasium.make("HalfCheetah-v5")
    cls = getattr(stable_baselines3, name.upper())
    model = cls(
        "MlpPolicy", env, batch_size=BATCH, buffer_size=ROWS // 10, device=device,
        policy_kwargs={"net_arch": [256, 256]},
    )  # fmt: skip
    model.set_logger(configure(None, []))
    model._setup_learn(1)
    rng = np.random.default_rng(0)
    for _ in range(ROWS // 10):
        obs, following = rng.standard_normal((2, 1, OBS), dtype=np.float32)
        action = rng.uniform(-1, 1, (1, ACT)).astype(np.float32)
        model.replay_buffer.add(obs, following, action, np.ones(1, np.float32), np.zeros(1), [{}])

    def step() -> int:
        model.train(gradient_steps=10, batch_size=BATCH)
        return 10

    return step


# ----------------------------------------------------------------------------------------------------------------- PPO
def ppo(task: str, n: int, device: str, graphs: Any, clock: Clock, report: Report, horizon: int = 16) -> None:
    """Train until the mean return of the episodes that ended lately reaches the mark, or the time is over."""
    clock.need(10)
    env = rlctl.make_env(task, n, seed=0, device=device, backend="warp")
    cfg = PPOConfig(
        num_envs=n, horizon=horizon, minibatch_size=n * horizon // 4, epochs=5, hidden=(256, 128), activation="elu",
        lr=1e-3, anneal_lr=False, log_std=-0.5, steps=10**9,
    )  # fmt: skip
    agent = rlctl.make_agent("ppo", env, cfg)
    how = rlctl.accelerate(agent, graphs=graphs).say()
    run = rlctl.Run(config=rlctl.RunConfig(log_every=0, evaluations=1, eval_every=0, checkpoint_every=0))
    size, target = n * horizon, TARGETS[task]

    def rollouts(count: int) -> None:
        rlctl.on_policy(agent, env, run, steps=run.env_steps + count * size, stagger=True)
        synchronize()

    rollouts(4)  # kernels compiled, everything captured; these steps count as training, not as time
    run.episodes.take()
    start, first = time.perf_counter(), run.env_steps
    reached: float | None = None
    best, curve = -math.inf, []
    while clock.left() > 2 and reached is None:
        rollouts(8)
        ret, _, ended = run.episodes.take()
        spent = time.perf_counter() - start
        if ended:
            best = max(best, ret)
            curve.append([round(spent, 2), run.env_steps, round(ret, 1), ended])
            # episodes that fell early are over first: only a full generation of worlds tells the mean
            if ret >= target and ended >= n // 20:
                reached = spent
    if run.env_steps == first:
        raise OutOfTime("compiling and capturing took all of the share")
    spent = time.perf_counter() - start
    report.add(
        "ppo",
        task=task,
        num_envs=n,
        steps_per_second=(run.env_steps - first) / spent,
        target=target,
        seconds_to_target=reached,
        best_return=best if math.isfinite(best) else None,
        env_steps=run.env_steps,
        how=how,
        troubles=env.report(),
        curve=curve[:: max(len(curve) // 40, 1)],
    )
    env.close()


# ---------------------------------------------------------------------------------------------------------------- main
def crossovers(rows: list[dict[str, Any]], head: dict[str, Any]) -> dict[str, Any]:
    """What `rlctl_envs/engines/crossover.json` holds: the smallest number of worlds at which the GPU won."""
    table: dict[str, Any] = {}
    for task in sorted({row["task"] for row in rows}):
        mine = sorted((r for r in rows if r["task"] == task), key=lambda r: r["num_envs"])
        # the smallest from which on it stays ahead
        wins = [k for k in range(len(mine)) if all(r["captured_over_cpu"] > 1 for r in mine[k:])]
        ahead = mine[wins[0]]["num_envs"] if wins else None
        table[task] = {"num_envs": ahead, **head}
    return table


def pieces(args: argparse.Namespace) -> dict[str, list[str]]:
    """What is measured in one process each, by part: tasks or learners."""
    names = {"updates": list(LEARNERS), "simulation": args.tasks, "ppo": args.tasks}
    return {part: names[part] for part in PARTS if part in args.parts}


def measure(part: str, name: str, args: argparse.Namespace, clock: Clock, report: Report) -> None:
    """One piece, in this process."""
    device, graphs = ("cpu", "tape") if args.dry_run else ("cuda", "auto")
    if part == "compile":
        load_kernels(name, device)
    elif part == "simulation":
        for n in args.numbers:
            with report.attempt(f"simulation of {n} {name}"):
                simulate(name, n, device, args.seconds, clock, report)
    elif part == "updates":
        with report.attempt(f"updates of {name}"):
            updates(name, device, graphs, args.seconds, clock, report)
    else:
        with report.attempt(f"PPO on {name}"):
            ppo(name, 8 if args.dry_run else 4096, device, graphs, clock, report)


def child(part: str, name: str, args: argparse.Namespace, budget: float, out: Path) -> subprocess.Popen[bytes]:
    """A process that measures one piece."""
    command = [sys.executable, str(HERE), "--piece", part, name, "--budget", str(budget), "--out", str(out)]
    command += ["--seconds", str(args.seconds), "--numbers", *map(str, args.numbers)]
    return subprocess.Popen(command + (["--dry-run"] if args.dry_run else []))


def ended(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Wait for a piece, which keeps its own time: beyond `seconds` it hangs. Why it did not end well, or nothing."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"no end after {seconds:.0f} s"
    return f"its process ended with {code}" if code else ""


def measure_all(args: argparse.Namespace, clock: Clock, report: Report) -> None:
    """Every piece in a process of its own, one after the other, each with a share of the time that is left."""
    skipped = report.result["skipped"]
    with tempfile.TemporaryDirectory() as temp:
        start = time.monotonic()
        compiling = {task: child("compile", task, args, clock.left(), Path(temp) / task) for task in args.tasks}
        for task, process in compiling.items():
            if why := ended(process, max(clock.left() / 2, 1)):
                skipped.append({"what": f"compiling {task}", "why": why})
        report.result["compiled_after_s"] = time.monotonic() - start
        for part, names in pieces(args).items():
            with clock.share(SHARES[part] if len(args.parts) > 1 else 1.0):
                for k, name in enumerate(names):
                    budget = clock.left() / (len(names) - k)
                    if args.dry_run:
                        budget = 30 if part == "ppo" else 120
                    if budget < 5:
                        skipped.append({"what": f"{part} of {name}", "why": "no time was left"})
                        continue
                    out = Path(temp) / f"{part}-{name}.json"
                    why = ended(child(part, name, args, budget, out), budget + 30)
                    if out.exists():
                        report.merge(out)
                    if why:
                        skipped.append({"what": f"{part} of {name}", "why": why})
                    report.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds, everything included")
    parser.add_argument("--seconds", type=float, default=1.5, help="per measurement")
    parser.add_argument("--tasks", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--numbers", nargs="*", type=int, default=list(NUMBERS), help="of worlds")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS, help="what to measure")
    parser.add_argument("--out", type=Path, default=RESULTS / "speed-gpu.json")
    parser.add_argument("--write-crossover", action="store_true", help="let --env-backend auto go by these numbers")
    parser.add_argument("--piece", nargs=2, metavar=("PART", "NAME"), help="one piece, in this process")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny, on the CPU: shows that it works, measures nothing"
    )
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("this machine shows no CUDA device to torch; --dry-run runs anywhere")
    if args.dry_run:
        args.tasks, args.numbers, args.seconds = args.tasks[:1], [4], 0.1
        args.out = args.out if args.out != RESULTS / "speed-gpu.json" else Path("speed-gpu-dry-run.json")
    torch.set_flush_denormal(True)
    from rlctl.provenance import cpu_model

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0))
    report = Report(args.out, {"dry_run": args.dry_run, "gpu": gpu, "cores": cores, "unit": "per second"})
    clock = Clock(args.budget)
    if args.piece:
        measure(*args.piece, args, clock, report)
        report.write()
        return
    measure_all(args, clock, report)
    report.save()
    if args.write_crossover and not args.dry_run:
        table = crossovers(report.result["simulation"], {"gpu": gpu, "cpu": cpu_model(), "cores": cores})
        file = HERE.parents[2] / "envs" / "rlctl_envs" / "engines" / "crossover.json"
        file.write_text(json.dumps(table, indent=1) + "\n")
        print(f"written to {file}")
    print(f"{len(report.result['skipped'])} not measured; {clock.left():.0f} s of the budget left")


if __name__ == "__main__":
    main()
