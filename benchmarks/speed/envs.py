"""Environment steps per second: a plain C mj_step loop, ours, Gymnasium's SyncVectorEnv, SB3's DummyVecEnv.

    python benchmarks/speed/envs.py --tasks Hopper,HalfCheetah --num-envs 1,64 --out speed.json

All contenders take turns within every round, so that a slow moment of the machine hits them alike; medians over
rounds are reported, and ratios are medians of the ratios within a round. One env step is frame_skip physics steps.
Actions are random and drawn beforehand. The C loop (mj_step_loop.c) simulates the model ours simulates, with one
thread at one environment and all available cores otherwise, as ours does; it computes no observation, reward or
contact force, so a ratio of 1 is out of reach in principle, though ours may pass it where memory traffic decides.
The tasks of the DeepMind Control Suite ("dmc:hopper-stand") are measured without peers, and only when named.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import mujoco
import numpy as np
import torch

import rlctl_envs
from rlctl_envs.engines import available_cores, load_model
from rlctl_envs.tasks import DMC_TASKS, TASKS

HERE = Path(__file__).parent
ACTIONS = 64  # different action batches, used in turn
EVERY_TASK = TASKS | {f"dmc:{name}": task for name, task in DMC_TASKS.items()}


class Contender(Protocol):
    def run(self, seconds: float) -> float:
        """Step for about that long; return env steps per second."""

    def close(self) -> None: ...


def compile_loop(folder: Path) -> ctypes.CDLL:
    """Build mj_step_loop.c against the installed MuJoCo."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("no C compiler (cc) found: it builds the loop everything is compared with")
    package = Path(mujoco.__file__).parent
    library = sorted(package.glob("libmujoco*.so*")) or sorted(package.glob("libmujoco*.dylib"))
    target = folder / "mj_step_loop.so"
    subprocess.run(
        [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-pthread", f"-I{package / 'include'}",
         "-o", str(target), str(HERE / "mj_step_loop.c"), str(library[0]), f"-Wl,-rpath,{package}"],
        check=True,
    )  # fmt: skip
    lib = ctypes.CDLL(str(target))
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_double
    lib.loop_make.restype = pointer
    lib.loop_make.argtypes = [pointer, integer, integer, integer, integer, real, pointer, pointer]
    lib.loop_run.restype, lib.loop_run.argtypes = real, [pointer, real]
    lib.loop_free.restype, lib.loop_free.argtypes = None, [pointer]
    return lib


class CLoop:
    def __init__(self, lib: ctypes.CDLL, name: str, num_envs: int, threads: int) -> None:
        task = EVERY_TASK[name]()
        model = load_model(task)
        task.bind(model)
        size = model.nq + model.nv
        low = np.array(getattr(task, "_low", None), dtype=np.float64)
        high = np.array(getattr(task, "_high", None), dtype=np.float64)
        if low.shape != (size,):  # tasks without a box in the joint state
            low, high = np.full(size, -np.inf), np.full(size, np.inf)
            if name == "Humanoid":
                low[2], high[2] = task.healthy_z_range  # type: ignore[attr-defined]
            elif name == "InvertedDoublePendulum":
                low[1], high[1] = -0.7, 0.7  # the first pole well tilted: about where the tip falls below one metre
        noise = getattr(task, "reset_noise_scale", 0.005)
        self._lib = lib
        self._loop = lib.loop_make(
            model._address, num_envs, task.frame_skip, task.episode_len, threads, noise,
            low.ctypes.data, high.ctypes.data,
        )  # fmt: skip

    def run(self, seconds: float) -> float:
        return float(self._lib.loop_run(self._loop, seconds))

    def close(self) -> None:
        self._lib.loop_free(self._loop)


class Ours:
    def __init__(self, name: str, num_envs: int, threads: int, backend: str) -> None:
        self._env = rlctl_envs.make(name, num_envs, seed=0, threads=threads, backend=backend)  # type: ignore[arg-type]
        self._env.reset()
        self._actions = [torch.rand(num_envs, self._env.act_dim) * 2 - 1 for _ in range(ACTIONS)]

    def run(self, seconds: float) -> float:
        step, actions, steps = self._env.step, self._actions, 0
        start = time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            step(actions[steps % ACTIONS])
            steps += 1
        return steps * self._env.num_envs / passed

    def close(self) -> None:
        self._env.close()


class Peer:
    """Gymnasium's or SB3's vector environment, both of which step one copy after the other."""

    def __init__(self, kind: str, name: str, num_envs: int) -> None:
        def build() -> gymnasium.Env[Any, Any]:
            return gymnasium.make(f"{name}-v5")

        if kind == "gymnasium":
            self._env: Any = gymnasium.vector.SyncVectorEnv([build] * num_envs)
            space: Any = self._env.single_action_space
        else:
            from stable_baselines3.common.vec_env import DummyVecEnv

            self._env = DummyVecEnv([build] * num_envs)
            space = self._env.action_space
        rng = np.random.default_rng(0)
        shape = (num_envs, *space.shape)
        self._actions = [rng.uniform(space.low, space.high, shape).astype(np.float32) for _ in range(ACTIONS)]
        self._num_envs = num_envs
        self._env.reset()

    def run(self, seconds: float) -> float:
        step, actions, steps = self._env.step, self._actions, 0
        start = time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            step(actions[steps % ACTIONS])
            steps += 1
        return steps * self._num_envs / passed

    def close(self) -> None:
        self._env.close()


def measure(
    lib: ctypes.CDLL, name: str, num_envs: int, rounds: int, seconds: float, threads: int, backend: str, peers: bool
) -> list[dict[str, Any]]:
    """One row per contender: median rate, its quartiles, and the median of its ratio to the C loop."""
    threads = min(num_envs, threads)
    contenders: dict[str, Contender] = {
        "c": CLoop(lib, name, num_envs, threads),
        "rlctl": Ours(name, num_envs, threads, backend),
    }
    if peers:
        contenders |= {"gymnasium": Peer("gymnasium", name, num_envs), "sb3": Peer("sb3", name, num_envs)}
    rates: dict[str, list[float]] = {key: [] for key in contenders}
    for contender in contenders.values():
        contender.run(min(seconds, 0.1))  # warm up
    order = list(contenders)
    for round_number in range(rounds):
        # Alternate the order: a drift within a round must not favour whoever comes first.
        for key in order if round_number % 2 == 0 else reversed(order):
            rates[key].append(contenders[key].run(seconds))
    for contender in contenders.values():
        contender.close()
    rows = []
    for key, values in rates.items():
        against = {
            other: statistics.median(a / b for a, b in zip(values, rates[other], strict=True)) for other in order
        }
        rows.append(
            {
                "task": name,
                "num_envs": num_envs,
                "threads": threads if key in ("c", "rlctl") else 1,
                "contender": key,
                "steps_per_second": statistics.median(values),
                "rates": values,
                "ratio_to": {other: ratio for other, ratio in against.items() if other != key},
            }
        )
    return rows


def cpu_model() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def git_sha() -> str:
    """Commit of this checkout, with a plus sign if files have changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated names (default: Gymnasium's eleven)")
    parser.add_argument("--num-envs", default="1,8,64,256,1024", help="comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.7, help="per contender and round")
    parser.add_argument("--threads", type=int, default=available_cores(), help="for C and ours (default: %(default)s)")
    parser.add_argument("--backend", default="auto", help="of ours: auto, batch or pool")
    parser.add_argument("--max-peer-envs", type=int, default=64, help="leave the peers out above this (default: 64)")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    args = parser.parse_args()

    names = [rlctl_envs.canonical(name).removesuffix("-v5") for name in args.tasks.split(",")]
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        lib = compile_loop(Path(folder))
        print(f"{'task':24}{'N':>6}{'C loop':>10}{'rlctl':>10}{'/C':>6}{'gym':>10}{'ours/':>7}{'sb3':>10}{'ours/':>7}")
        for name in names:
            for num_envs in map(int, args.num_envs.split(",")):
                peers = num_envs <= args.max_peer_envs and name in TASKS  # they have none of the suite's tasks
                new = measure(lib, name, num_envs, args.rounds, args.seconds, args.threads, args.backend, peers)
                rows += new
                rate = {row["contender"]: row["steps_per_second"] for row in new}
                ratio = next(row["ratio_to"] for row in new if row["contender"] == "rlctl")
                line = f"{name:24}{num_envs:6}{rate['c']:10.0f}{rate['rlctl']:10.0f}{ratio['c']:6.2f}"
                for peer in ("gymnasium", "sb3"):
                    line += f"{rate[peer]:10.0f}{ratio[peer]:6.2f}x" if peer in rate else f"{'-':>10}{'':7}"
                print(line, flush=True)
    if args.out is not None:
        meta = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv),
            "git": git_sha(),
            "cpu": cpu_model(),
            "cores": available_cores(),
            "python": platform.python_version(),
            "versions": {m.__name__: m.__version__ for m in (mujoco, gymnasium, np, torch)},
            "rounds": args.rounds,
            "seconds": args.seconds,
            "physics": "published (C and rlctl), native (peers)",
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"meta": meta, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
