"""What an action of a generative policy costs: milliseconds per batch of actions, side by side.

    python benchmarks/speed/generative.py                        # Hopper's sizes, 3 layers of 256 for every policy
    python benchmarks/speed/generative.py --hidden 512 512 512 512 --batch 1

One network for all: a diffusion of T steps and a flow of K Euler steps evaluate it T and K times, the squashed Gaussian
(the peer, last) once. Warm starts are of plans of `--horizon` actions: from scratch, and from the plan before. No
gradients. On a CPU with one thread the time is that of the processor, which other work on the machine hardly moves;
else it is wall-clock. Policies take turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved, rate, write

from rlctl.nets import DiffusionPolicy, FlowPolicy, TanhGaussianPolicy, WarmStarted


def contenders(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Name to a call that makes one batch of actions (or of plans)."""
    o, a, h = args.obs_dim, args.act_dim, tuple(args.hidden)
    device, n = torch.device(args.device), args.batch
    obs = torch.randn(n, o, device=device)
    made: dict[str, Callable[[], object]] = {}

    def sampler(policy: torch.nn.Module) -> Callable[[], object]:
        policy.to(device)
        return lambda: policy.sample(obs)  # type: ignore[operator]

    for steps in args.diffusion:
        made[f"diffusion T={steps}"] = sampler(DiffusionPolicy(o, a, h, steps=steps))
    for steps in args.flow:
        made[f"flow K={steps}"] = sampler(FlowPolicy(o, a, h, "mish", steps=steps))
    plans = a * args.horizon
    for name, policy in (
        (f"diffusion T={max(args.diffusion)}", DiffusionPolicy(o, plans, h, steps=max(args.diffusion))),
        (f"flow K={max(args.flow)}", FlowPolicy(o, plans, h, "mish", steps=max(args.flow))),
    ):
        warm = WarmStarted(policy, args.horizon, args.warm).to(device)
        previous = torch.rand(n, args.horizon, a, device=device) * 2 - 1
        made[f"plan, {name}"] = lambda w=warm: w.plan(obs)
        made[f"plan, {name}, warm, {args.warm} steps"] = lambda w=warm, p=previous: w.plan(obs, p)
    made["squashed Gaussian"] = sampler(TanhGaussianPolicy(o, a, h, "mish"))
    return made


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusion", type=int, nargs="*", default=[5, 10, 20], help="numbers of diffusion steps T")
    parser.add_argument("--flow", type=int, nargs="*", default=[1, 4, 10], help="numbers of flow steps K")
    parser.add_argument("--warm", type=int, default=2, help="steps of a warm start")
    parser.add_argument("--horizon", type=int, default=8, help="actions of a plan")
    parser.add_argument("--hidden", type=int, nargs="*", default=[256, 256, 256])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--obs-dim", type=int, default=11)
    parser.add_argument("--act-dim", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="per policy and round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.device == "cpu" and args.threads == 1 else time.perf_counter
    torch.manual_seed(0)

    def timed(call: Callable[[], object]) -> Callable[[], float]:
        def once() -> int:
            call()
            if args.device == "cuda":
                torch.cuda.synchronize()
            return 1

        once()
        return lambda: rate(once, args.seconds, clock)

    result = interleaved({name: timed(call) for name, call in contenders(args).items()}, args.rounds)
    for r in result.values():
        r["ms"] = 1000 / r["median"]
        r["times the Gaussian"] = 1 / r["ratio"]
    print(f"{'batch of ' + str(args.batch):<44} {'ms':>8} {'times the Gaussian':>20}")
    for name, r in result.items():
        print(f"{name:<44} {r['ms']:>8.2f} {r['times the Gaussian']:>20.1f}")
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    write(
        "speed-generative",
        {"unit": f"batches/s, by {clock.__name__}", "settings": settings, "results": result},
        args.out,
    )


if __name__ == "__main__":
    main()
