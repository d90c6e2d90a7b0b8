"""What the components of a mixture policy have learned, on one page.

    python benchmarks/plot_primitives.py RUN_DIR --out primitives.png      # any run whose policy is a Gaussian mixture

Upper left: the gate's probabilities along one deterministic episode (which, under `deterministic=value`, the gate does
not steer). Upper right: the states of several episodes on
their first two principal components, coloured by the component with the largest weight, stronger colour for a surer
gate. Below, one panel per action dimension: how often the mean action of each component takes each value in [-1, 1],
pale over all those states, strong over those where the gate prefers the component. Means are clipped to [-1, 1], as the
environment clips them: an edge that stands high is a component that pushes against its bound. Heights are square roots
of counts, so that what a policy does before it settles stays visible.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import rlctl_envs
from rlctl import experiment
from rlctl.errors import UsageError
from rlctl.types import Agent

SMOOTH = 20
"""Steps over which the gate is averaged in the first panel."""
EDGES = np.linspace(-1, 1, 101)
CENTRES = (EDGES[1:] + EDGES[:-1]) / 2


class Primitives(NamedTuple):
    """Of every visited state."""

    obs: np.ndarray
    """[S, O]."""
    episode: np.ndarray
    """[S] which episode it belongs to."""
    weights: np.ndarray
    """[S, K] gate probabilities."""
    means: np.ndarray
    """[S, K, A] the deterministic action of each component, in [-1, 1]."""


@torch.no_grad()
def primitives(agent: Agent, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate probabilities [N, K] and component means [N, K, A] of the agent's policy at raw observations [N, O].

    An agent that normalises observations (`obs_norm`) shows its policy the normalised ones; means that no tanh bounds
    are clipped to [-1, 1], as the environment clips actions.
    """
    pi = getattr(agent, "pi", None)
    if "components" not in getattr(pi, "can", ()):
        raise UsageError(f"the policy of {type(agent).__name__} is no mixture: only those have components to draw")
    seen = agent.obs_norm(obs) if hasattr(agent, "obs_norm") else obs  # type: ignore[operator]
    dist = agent.pi(seen)  # type: ignore[operator]
    return dist.weights, dist.components.mode.clamp(-1, 1)


@torch.no_grad()
def visit(agent: Agent, env: Any, seed: int = 0) -> Primitives:
    """The states of one deterministic episode in each world of `env`."""
    kept: list[tuple[torch.Tensor, ...]] = []
    agent.eval()
    obs, _ = env.reset(seed=seed)
    alive = torch.ones(env.num_envs, dtype=torch.bool, device=obs.device)
    while bool(alive.any()):
        kept.append((obs, alive, *primitives(agent, obs)))
        obs, _, terminated, truncated, _ = env.step(agent.act(obs, explore=False)[0])
        alive = alive & ~(terminated | truncated)
    obs, alive, weights, means = (torch.stack(x, 1).cpu() for x in zip(*kept, strict=True))  # [N, T, ...]
    episode = torch.arange(env.num_envs)[:, None].expand_as(alive)
    return Primitives(*[x[alive].numpy() for x in (obs, episode, weights, means)])


def principal_plane(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standardised states on their first two principal components [S, 2], and the share of variance of each [2].

    What has a single direction keeps a second coordinate of zero.
    """
    x = (obs - obs.mean(0)) / (obs.std(0) + 1e-8)
    _, s, v = np.linalg.svd(x, full_matrices=False)
    plane, share = np.zeros((len(x), 2)), np.zeros(2)
    plane[:, : len(v[:2])] = x @ v[:2].T
    share[: len(v[:2])] = np.square(s[:2]) / max(np.square(s).sum(), 1e-12)
    return plane, share


def density(values: np.ndarray) -> np.ndarray:
    """Square roots of the counts of `values` in the bins of `EDGES`, smoothed over three of them; zeros for none."""
    return np.sqrt(np.convolve(np.histogram(values, EDGES)[0], [0.25, 0.5, 0.25], "same"))


def draw(p: Primitives, title: str, out: Path) -> None:
    """Write the page to `out`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    num, act_dim = p.weights.shape[1], p.means.shape[2]
    colors = [plt.get_cmap("tab10")(k % 10) for k in range(num)]
    winner, names = p.weights.argmax(1), [f"component {k}" for k in range(num)]
    cols = min(act_dim, 4)
    rows = -(-act_dim // cols)
    fig = plt.figure(figsize=(13, 5 + 2.6 * rows), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[4.4, 2.6 * rows])
    left, right = top.subplots(1, 2)

    first = p.weights[p.episode == 0]
    width = min(SMOOTH, len(first))
    kernel = np.ones(width) / width
    padded = np.pad(first, ((width // 2, width - 1 - width // 2), (0, 0)), mode="edge")
    smooth = np.stack([np.convolve(padded[:, k], kernel, "valid") for k in range(num)])
    left.stackplot(np.arange(len(first)), smooth, colors=colors, labels=names, alpha=0.85)
    left.set(xlim=(0, max(len(first) - 1, 1)), ylim=(0, 1), xlabel="step", ylabel="gate probability")
    left.set_title(f"one episode (mean of {width} steps)", fontsize=10)
    left.legend(loc="lower right", fontsize=8)

    plane, share = principal_plane(p.obs)
    sure = p.weights.max(1)
    strength = 0.3 + 0.7 * (sure - 1 / num) / max(1 - 1 / num, 1e-8)
    order = np.random.default_rng(0).permutation(len(plane))[:4000]
    rgba = np.array([(*colors[k][:3], a) for k, a in zip(winner, strength, strict=True)])
    right.scatter(*plane[order].T, c=rgba[order], s=7, linewidths=0)
    for k in range(num):
        used = winner == k
        right.scatter([], [], color=colors[k], s=20, label=f"{names[k]}: {used.mean():.0%} of states")
    axis = [f"principal component {i + 1} ({s:.0%} of variance)" for i, s in enumerate(share)]
    low, high = np.quantile(plane, [0.002, 0.998], axis=0)
    (x0, y0), (x1, y1) = low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3
    right.set(xlabel=axis[0], ylabel=axis[1], xlim=(x0, x1), ylim=(y0, y1))
    right.set_title(f"preferred component by state ({len(p.obs)} states)", fontsize=10)
    right.legend(fontsize=8)

    for a, ax in enumerate(bottom.subplots(rows, cols, squeeze=False).flat):
        if a >= act_dim:
            ax.set_axis_off()
            continue
        for k in range(num):
            everywhere, preferred = (density(p.means[rows, k, a]) for rows in (winner >= 0, winner == k))
            peak = everywhere.max() or 1.0  # of no states at all
            ax.fill_between(CENTRES, k, k + 0.8 * everywhere / peak, color=colors[k], alpha=0.25, lw=0)
            ax.fill_between(CENTRES, k, k + 0.8 * preferred / peak, color=colors[k], alpha=0.85, lw=0)
        ax.set(xlim=(-1, 1), ylim=(-0.1, num), yticks=range(num))
        ax.axvline(0, color="gray", lw=0.5)
        ax.set_title(f"action {a}", fontsize=9)
        if a % cols == 0:
            ax.set_ylabel("component")
    bottom.supxlabel(
        "how often (square root) a component's mean action takes each value: pale over all states, "
        "strong where the gate prefers it",
        fontsize=9,
    )
    fig.suptitle(title)
    fig.savefig(out, dpi=110)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=Path("primitives.png"))
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--best", action="store_true", help="the best agent seen in training instead of the last")
    args = parser.parse_args()
    agent, settings = experiment.load_agent(args.run, "best" if args.best else "latest")
    env_id = settings.env or experiment.read_json(args.run / "run.json").get("eval_env")
    env = rlctl_envs.make(env_id, args.episodes, seed=args.seed, device=agent.spec.device, **settings.env_options)
    seen = visit(agent, env, args.seed)
    env.close()
    draw(seen, f"{settings.algo} on {env_id}, seed {settings.seed}", args.out)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
