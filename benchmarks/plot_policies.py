"""What policies of different kinds make of the same data, on a state where they differ.

    python benchmarks/plot_policies.py --out docs/policies.png

The data: in one state, actions at four places with equal chance. A squashed Gaussian, a flow and a diffusion are cloned
from them, each with the settings below, and 1500 actions of each are drawn beside the data's. Takes about a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from rlctl import Batch, Spec, agents

CENTRES = torch.tensor([[0.7, 0.7], [0.7, -0.7], [-0.7, 0.7], [-0.7, -0.7]])
HIDDEN = (64, 64, 64)
POLICIES = {
    "Gaussian (bc, head=gaussian)": ("bc", {"head": "gaussian", "hidden": HIDDEN}),
    "diffusion (diffusion-bc, T = 10)": ("diffusion-bc", {"hidden": HIDDEN, "diffusion_steps": 10}),
    "flow (flow-bc, K = 10)": ("flow-bc", {"hidden": HIDDEN}),
}


def actions(g: torch.Generator, n: int) -> Tensor:
    """`n` actions of the data, [n, 2]."""
    mode = torch.randint(0, 4, (n,), generator=g)
    return (CENTRES[mode] + 0.08 * torch.randn(n, 2, generator=g)).clamp(-1, 1)


def cloned(name: str, settings: dict[str, object], updates: int, seed: int) -> Tensor:
    """1500 stochastic actions of the algorithm `name` after `updates` updates of 256 actions."""
    cls = agents.get(name).Config
    extra = {"ema_start": updates // 2, "ema_decay": 0.98} if "ema_start" in cls.__dataclass_fields__ else {}
    agent = agents.make(name, Spec(1, 2, seed=seed), cls(actor_lr=1e-3, **extra, **settings))
    g = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        nothing, no = torch.zeros(256, 1), torch.zeros(256, dtype=torch.bool)
        agent.update(Batch(nothing, actions(g, 256), nothing[:, 0], nothing, ~no, no))
    with torch.no_grad():
        return agent.act(torch.zeros(1500, 1), explore=True)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("policies.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = {"the data": actions(torch.Generator().manual_seed(args.seed + 1), 1500)}
    for title, (name, settings) in POLICIES.items():
        drawn[title] = x = cloned(name, settings, args.updates, args.seed)
        near = ((x[:, None] - CENTRES).norm(dim=-1) < 0.35).float().mean(0)
        print(f"{title}: share of actions near each mode {[round(v, 3) for v in near.tolist()]}")
    figure, axes = plt.subplots(1, len(drawn), figsize=(3.2 * len(drawn), 3.4), sharex=True, sharey=True)
    for axis, (title, x) in zip(axes, drawn.items(), strict=True):
        axis.scatter(x[:, 0], x[:, 1], s=3, alpha=0.4, linewidths=0)
        axis.set(title=title, xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xlabel="action 0")
    axes[0].set_ylabel("action 1")
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
