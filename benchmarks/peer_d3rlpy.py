"""Offline learners beside d3rlpy's, on one dataset: updates per second, and what the policies are worth.

    python -m venv peer && peer/bin/pip install d3rlpy          # an environment of its own: it pins other versions
    python benchmarks/peer_d3rlpy.py rate --peer peer/bin/python --data ladder/hopper-medium-replay-v0
    python benchmarks/peer_d3rlpy.py score --peer peer/bin/python --data ladder/hopper-medium-replay-v0 --env Hopper

Both sides: CPU, the same rows, batches of `--batch`, two layers of `--width` everywhere, the same learning rates and
weights, CQL with four actions where ten are usual. `rate` trains both in turn, drawing batches included, after
`--warm-up` updates (which matter to PRDC: a search takes as long as its policy is far from the data). `score` trains
the peer alone, `--updates` long, and rolls its policy out in our tasks, under our protocol; ours are runs of
`rlctl bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import interleaved, write

import rlctl
from rlctl import Agent, Spec, agents
from rlctl.data.dataset import load_dataset
from rlctl.data.reference import normalized_score
from rlctl.evaluate import evaluate
from rlctl.types import AgentConfig, Regime

SIDE = Path(__file__).resolve().parent / "peer_d3rlpy_side.py"
OURS: dict[str, dict[str, Any]] = {
    "td3bc": {},
    "iql": {},
    "cql": {"num_actions": 4},
    "prdc": {},
}
"""Our learners with what differs from their defaults, to draw as the peer does; networks are those of `settings`."""


def settings(algo: str, args: argparse.Namespace) -> dict[str, Any]:
    """What ours is told: the sizes asked for, and its entry of OURS."""
    return {"hidden": (args.width, args.width), "batch_size": args.batch} | OURS[algo]


class Peer:
    """A learner of d3rlpy in a process of its own; see `peer_d3rlpy_side.py` for what it can be told."""

    def __init__(self, args: argparse.Namespace, data: Path, algo: str, seed: int) -> None:
        env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open for as long as the process writes to it
        self.process = subprocess.Popen(
            [args.peer, str(SIDE), str(data), algo, *map(str, (args.updates, seed, args.width, args.batch))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=env,
        )

    def tell(self, command: str) -> dict[str, Any]:
        """What it answers; RuntimeError with its last words where it ended instead."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:  # d3rlpy logs on the same stream
            if line.startswith("ANSWER "):
                answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return answer
        self.log.seek(0)
        raise RuntimeError(f"d3rlpy ended at {command!r}:\n{self.log.read()[-2000:]}")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


class Exported(Agent):
    """A TorchScript policy `obs [N, D] -> action [N, A]`, for our evaluation."""

    regime: ClassVar[Regime] = "offline"
    Config: ClassVar[type[Any]] = AgentConfig
    policy: Any

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """What the policy does without noise."""
        return self.policy(obs).clamp(-1, 1), {}

    def update(self, batch: Any) -> Any:
        """It has learned all it ever will."""
        raise NotImplementedError("an exported policy does not learn")


def rates(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Updates per second of both, learner by learner."""
    dataset = load_dataset(args.data)
    spec = Spec(dataset.whole().obs.shape[-1], dataset.whole().action.shape[-1])
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {}
    for algo in args.algos:
        agent = agents.make(algo, spec, agents.get(algo).Config(**settings(algo, args)))
        agent.prepare(dataset)
        peer = Peer(args, data, algo, 0)

        def ours(n: int = args.block, agent: Agent = agent) -> float:
            start = time.perf_counter()
            for _ in range(n):
                agent.update(dataset.sample(args.batch))
            return n / (time.perf_counter() - start)

        def theirs(peer: Peer = peer) -> float:
            answer = peer.tell(f"go {args.block}")
            return float(answer["updates"] / answer["seconds"])

        print(f"{algo}: {args.warm_up} updates of each to warm up", flush=True)
        ours(args.warm_up)
        peer.tell(f"go {args.warm_up}")
        sides: dict[str, Callable[[], float]] = {f"rlctl {algo}": ours, f"d3rlpy {algo}": theirs}
        found[algo] = interleaved(sides, args.rounds) | {"peer": peer.tell("describe")}
        peer.close()
    return found


def scores(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Returns of the peer's policies after `--updates` updates, by learner and seed."""
    found: dict[str, Any] = {}
    torch.set_num_threads(args.threads)
    for algo in args.algos:
        for seed in args.seeds:
            peer = Peer(args, data, algo, seed)
            spent = 0.0
            for done in range(0, args.updates, args.block):
                spent += peer.tell(f"go {min(args.block, args.updates - done)}")["seconds"]
                print(f"\r{algo} seed {seed}: {done + args.block:,} of {args.updates:,} updates", end="", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                peer.tell(f"save {folder}/policy.pt")
                policy = torch.jit.load(f"{folder}/policy.pt")
            described = peer.tell("describe")
            peer.close()
            env = rlctl.make_env(args.env, 10, seed=0)
            agent = Exported(Spec(env.obs_dim, env.act_dim))
            agent.policy = policy
            result = evaluate(agent, env, args.episodes, seed=10_000 + seed)
            assert result is not None
            normalised = normalized_score(args.env, result.mean)
            print(
                f"\r{algo} seed {seed}: {result.mean:.1f} ± {result.std:.1f}, normalised {normalised:.1f}", flush=True
            )
            rows = found.setdefault(algo, {"peer": described, "seeds": {}})
            rows["seeds"][str(seed)] = {
                "return": result.mean,
                "std": result.std,
                "normalised": normalised,
                "episodes": args.episodes,
                "updates": args.updates,
                "seconds": spent,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rate", "score"))
    parser.add_argument("--peer", required=True, help="the Python of an environment that has d3rlpy")
    parser.add_argument("--data", required=True)
    parser.add_argument("--env", help="task to roll out in (score)")
    parser.add_argument("--algos", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--updates", type=int, default=50_000, help="length of the training")
    parser.add_argument("--warm-up", type=int, default=2_000)
    parser.add_argument("--block", type=int, default=500, help="updates per measurement, a multiple of 50")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--width", type=int, default=256, help="of the two hidden layers of every network")
    parser.add_argument("--batch", type=int, default=256, help="rows of a batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.what == "score" and not args.env:
        parser.error("score needs the task to roll out in: --env Hopper")
    if args.block % 50 or args.warm_up % 50 or args.updates % 50:
        parser.error("--block, --warm-up and --updates are multiples of 50: the peer counts so")
    with tempfile.TemporaryDirectory() as folder:
        flat = Path(folder) / "rows.npz"
        convert = [sys.executable, "-m", "rlctl", "data", "convert", args.data, "--out", str(flat), "--quiet"]
        if code := subprocess.run(convert).returncode:  # it has said what is wrong
            sys.exit(code)
        found = (rates if args.what == "rate" else scores)(args, flat)
    result = {"data": args.data, "threads": args.threads, "learners": found}
    result["settings"] = {algo: settings(algo, args) for algo in args.algos}
    if args.what == "rate":
        result |= {"warm_up": args.warm_up, "block": args.block}
    write("speed-d3rlpy" if args.what == "rate" else "scores-d3rlpy", result, args.out)


if __name__ == "__main__":
    main()
