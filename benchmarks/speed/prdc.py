"""PRDC: updates per second with each neighbour search, against the query of the published code, side by side.

    python benchmarks/speed/prdc.py --env Hopper HalfCheetah --rows 300000
    python benchmarks/speed/prdc.py --data mujoco/hopper/medium-v0

Same agent, same data, batch 256, sampling included. The peer is what the published code does: a KD-tree with SciPy's
defaults, asked with all processors, whose neighbours' actions come back as a float64 array. Without `--data`, the rows
are what random actions meet in the environment. How long a tree takes depends on how far the policy is from the data:
every contender learns on from the same agent, trained for `--warm-up` updates; the report says how far it then is.
All learn from the same `--batches` batches, over and over, for whose rows the short lists are made beforehand (a run
makes them as it goes, once per row of the dataset). `--cpu-time` counts the CPU seconds of the process instead of the
clock's: on a machine that others use too.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scipy.spatial import cKDTree
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved, rate, write

import rlctl
from rlctl import Batch, Spec, agents
from rlctl.agents.prdc import PRDC, PRDCConfig
from rlctl.data.dataset import Dataset, load_dataset
from rlctl.data.neighbours import Shortlist


class Published(PRDC):
    """The search of the published code."""

    def prepare(self, data: Any) -> None:
        rows = data.whole()
        self.obs_norm.fit(rows.obs)
        self.table = self.key(self.obs_norm(rows.obs), rows.action).double().cpu().numpy()
        self.tree = cKDTree(self.table)

    @torch.no_grad()
    def nearest_action(self, obs: Tensor, action: Tensor, row: Tensor | None = None) -> Tensor:
        _, index = self.tree.query(self.key(obs, action).cpu().numpy(), [self.cfg.k], workers=-1)
        return torch.tensor(self.table[index[:, 0], -action.shape[-1] :], device=obs.device, dtype=torch.float32)


def random_rows(env_id: str, rows: int, device: str) -> Dataset:
    """What random actions meet, world after world."""
    env = rlctl.make_env(env_id, 100, seed=0)
    g = torch.Generator().manual_seed(0)
    obs, _ = env.reset(seed=0)
    log = []
    for _ in range(-(-rows // 100)):
        action = torch.rand(100, env.act_dim, generator=g) * 2 - 1
        following, reward, terminated, truncated, info = env.step(action)
        log.append(Batch(obs.clone(), action, reward.clone(), info["next_obs"].clone(), terminated, truncated))
        obs = following
    core = [torch.stack(x, 1).flatten(0, 1)[:rows].to(device) for x in list(zip(*log, strict=True))[:6]]
    return Dataset(Batch(*core), torch.tensor([rows]), id=f"random-{env_id}")


def measure(data: Dataset, args: argparse.Namespace) -> dict[str, Any]:
    cfg = PRDCConfig(alpha=args.alpha, beta=args.beta)
    spec = Spec(*data.spec_dims, device=torch.device(args.device))
    trained = agents.make(PRDC, spec, cfg)
    trained.prepare(data)
    for _ in range(args.warm_up):
        trained.update(data.sample(256))
    weights = copy.deepcopy(trained.state_dict())
    b = data.sample(1000)
    obs = trained.obs_norm(b.obs)
    with torch.no_grad():
        action = trained.pi(obs)
        near = trained.nearest_action(obs, action)
    found = {
        "rows": len(data),
        "dims": sum(data.spec_dims),
        "mean distance of the policy to the action of the row": float((action - b.action).norm(dim=-1).mean()),
        "share of states whose own row is the nearest": float((near == b.action).all(-1).float().mean()),
        "seconds to build": {},
    }

    def contender(cls: type[PRDC], **changes: Any) -> PRDC:
        agent = agents.make(cls, spec, PRDCConfig(alpha=args.alpha, beta=args.beta, **changes))
        start = time.perf_counter()
        agent.prepare(data)
        found["seconds to build"][changes.get("neighbours", "published")] = time.perf_counter() - start
        agent.load_state_dict(weights)
        if isinstance(agent.index, Shortlist):
            start = time.process_time()
            for b in batches:
                agent.index.fill(b.extra["row"])
            found["CPU milliseconds to list 256 rows, once"] = 1e3 * (time.process_time() - start) / len(batches)
        return agent

    batches = [data.sample(256) for _ in range(args.batches)]
    contenders = {f"rlctl prdc, {m}": contender(PRDC, neighbours=m) for m in args.methods}
    contenders["the published code's query"] = contender(Published)

    turn = itertools.cycle(batches)

    def pair(agent: PRDC) -> int:
        """Two updates: one with and one without a step of the actor."""
        for _ in range(2):
            agent.update(next(turn))
        if args.device == "cuda":
            torch.cuda.synchronize()
        return 2

    for agent in contenders.values():
        pair(agent)
    clock = time.process_time if args.cpu_time else time.perf_counter
    timed = {name: lambda a=agent: rate(lambda: pair(a), args.seconds, clock) for name, agent in contenders.items()}
    return found | {"results": interleaved(timed, args.rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=[], help="datasets, as rlctl train takes them")
    parser.add_argument("--env", nargs="*", default=[], help="environments to collect random rows in")
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--methods", nargs="*", default=["shortlist", "tree"])
    parser.add_argument("--alpha", type=float, default=2.5)
    parser.add_argument("--beta", type=float, default=2.0)
    parser.add_argument("--warm-up", type=int, default=1000, help="updates before the clock starts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="per contender and round")
    parser.add_argument("--batches", type=int, default=33, help="batches to learn from, over and over")
    parser.add_argument("--cpu-time", action="store_true", help="rates per CPU second of the process")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not args.data and not args.env:
        args.env = ["Hopper"]
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    result: dict[str, Any] = {}
    for source in [*args.data, *args.env]:
        print(source)
        data = load_dataset(source, device=args.device) if source in args.data else None
        data = random_rows(source, args.rows, args.device) if data is None else data
        result[data.id] = measure(data, args)
    for name, r in result.items():
        for who, x in list(r["results"].items())[:-1]:
            print(f"{name}: {who} {x['median']:.0f} updates/s, {x['ratio']:.2f} times the published query")
    settings = {k: getattr(args, k) for k in ("alpha", "beta", "warm_up", "batches", "cpu_time", "threads", "device")}
    write("speed-prdc", {"unit": "updates/s at batch 256", "settings": settings, "results": result}, args.out)


if __name__ == "__main__":
    main()
