"""Peak memory of a SAC run with a replay buffer of a million transitions, against the plan made before the start.

    python benchmarks/speed/memory.py [--env HalfCheetah]

Fills the whole buffer (with copies of collected steps: only the volume matters), then makes some updates and writes a
checkpoint, and reads the process's peak resident set.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write

import rlctl
from rlctl.data.ring import planned_bytes


def peak() -> int:
    """Peak resident set of this process, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah")
    parser.add_argument("--capacity", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    env = rlctl.make_env(args.env, 1, seed=0)
    agent = rlctl.make_agent("sac", env)
    obs, _ = env.reset()
    empty = peak()
    ring = rlctl.Ring(args.capacity)
    n = 1000
    flags = torch.zeros(n, dtype=torch.bool)
    rows = obs.expand(n, -1), torch.zeros(n, env.act_dim), torch.zeros(n), obs.expand(n, -1)
    while len(ring) < args.capacity:
        ring.add(rlctl.Batch(*rows, flags, flags))
    for _ in range(20):
        agent.update(ring.sample(256))
    trained = peak()
    with tempfile.TemporaryDirectory() as folder:
        ring.save(Path(folder))
    saved = peak()
    plan = planned_bytes(agent.spec, args.capacity)
    mib = {
        "planned buffer": plan / 2**20,
        "peak before the buffer": empty / 2**20,
        "peak with full buffer and updates": trained / 2**20,
        "peak after a checkpoint": saved / 2**20,
        "buffer measured / planned": (trained - empty) / plan,
    }
    for name, value in mib.items():
        print(f"{name:<36} {value:>10.2f}" + ("" if "/" in name else " MiB"))
    write("memory-sac", {"env": env.id, "capacity": args.capacity, "mib": mib}, args.out)


if __name__ == "__main__":
    main()
