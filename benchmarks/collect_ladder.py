r"""Roll out a ladder of behaviour policies into a Minari dataset.

    python benchmarks/collect_ladder.py --ladder ladder.npz --env Hopper --steps 300000 --snapshots 1 \
        --id ladder/hopper-medium-v0

The ladder is an .npz of K snapshots of one Gaussian policy, from random to expert: W0 b0 W1 b1 W2 b2 [K, ...], obs_mean
and obs_std [K, O], log_std [K, A], optionally logged_ret [K]. An action is drawn from N(mean, exp(log_std)^2) with
mean = W2 tanh(W1 tanh(W0 z + b0) + b1) + b2 and z = (obs - obs_mean) / (obs_std + 1e-6); nothing is squashed.

`--snapshots` names one or several, by index; they share the steps equally. An index between two snapshots (1.4) mixes
the parameters of its neighbours linearly, which gives returns that the ladder skips. Several snapshots give the
"medium-expert" and "replay" kinds of dataset.

Every episode begun within the budget of steps is played to its end and kept, so that no episode is cut and short ones
are not preferred; the set is therefore somewhat longer than asked. Stored is the action that was executed: the drawn
one, clipped to [-1, 1].
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import torch
from torch import Tensor

import rlctl_envs
from rlctl.data.collect import roll_out
from rlctl.data.dataset import load_dataset
from rlctl.data.reference import normalized_score
from rlctl.data.write import check_new_id, spaces_of, to_buffer, write_minari
from rlctl.seeding import derive, generator

LAYERS = ("W0", "b0", "W1", "b1", "W2", "b2", "obs_mean", "obs_std", "log_std")


def snapshot(ladder: dict[str, np.ndarray], index: float) -> dict[str, Tensor]:
    """Parameters of one rung, float32; between two rungs a linear mixture of both."""
    count = len(ladder["log_std"])
    if not 0 <= index <= count - 1:
        raise SystemExit(f"snapshot {index} is not in the ladder: it has 0 to {count - 1}")
    low = int(index)
    high, share = min(low + 1, count - 1), index - low
    mixed = {k: (1 - share) * ladder[k][low] + share * ladder[k][high] for k in LAYERS}
    return {k: torch.as_tensor(x, dtype=torch.float32) for k, x in mixed.items()}


def draw(p: dict[str, Tensor], obs: Tensor, rng: torch.Generator) -> Tensor:
    """Stochastic actions [N, A] for `obs` [N, O], clipped to [-1, 1]."""
    h = (obs - p["obs_mean"]) / (p["obs_std"] + 1e-6)
    h = torch.tanh(h @ p["W0"].T + p["b0"])
    h = torch.tanh(h @ p["W1"].T + p["b1"])
    mean = h @ p["W2"].T + p["b2"]
    return (mean + p["log_std"].exp() * torch.randn(mean.shape, generator=rng)).clamp(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladder", type=Path, required=True, help="the .npz of snapshots")
    parser.add_argument("--env", required=True, help="task, e.g. Hopper")
    parser.add_argument("--steps", type=int, default=300_000, help="transitions, at least")
    parser.add_argument("--snapshots", type=float, nargs="+", required=True, help="indices, e.g. 1 or 0 1.5 20")
    parser.add_argument("--id", required=True, help="Minari id, e.g. ladder/hopper-medium-v0")
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--physics", choices=("published", "native"), default="published", help="see rlctl_envs.make")
    parser.add_argument("--algorithm", default="TRPO", help="what trained the ladder")
    parser.add_argument("--author", default="The rlctl authors")
    args = parser.parse_args()
    check_new_id(args.id)

    with np.load(args.ladder, allow_pickle=False) as file:
        ladder = {k: file[k] for k in (*LAYERS, "logged_ret") if k in file}
    spec = gymnasium.spec(rlctl_envs.canonical(args.env))
    rungs = ", ".join(f"{k:g}" for k in args.snapshots)
    rng = generator(args.seed, "action")
    episodes = []
    for k, index in enumerate(args.snapshots):
        env = rlctl_envs.make(args.env, num_envs=args.num_envs, seed=derive(args.seed, f"env{k}"), physics=args.physics)
        policy = snapshot(ladder, index)
        played = list(roll_out(env, lambda obs, p=policy: draw(p, obs, rng), args.steps // len(args.snapshots)))
        spaces = spaces_of(env)
        env.close()
        returns = np.array([float(np.sum(e.reward, dtype=np.float64)) for e in played])
        line = f"snapshot {index:g}: {len(played)} episodes, return {returns.mean():.1f} ± {returns.std():.1f}"
        if "logged_ret" in ladder and index % 1 == 0:
            line += f", its authors logged {ladder['logged_ret'][int(index)]:.1f}"
        print(line)
        label = [np.full((len(e.obs), 1), index, np.float32) for e in played]
        episodes += [to_buffer(e, spaces[1], {"snapshot": x}) for e, x in zip(played, label, strict=True)]

    write_minari(
        args.id,
        episodes,
        env=spec,
        spaces=spaces,
        storage="hdf5",
        metadata={
            "algorithm_name": args.algorithm,
            "author": args.author,
            "description": (
                f"Stochastic {args.algorithm} policies, snapshots {rungs} of a ladder of {len(ladder['log_std'])} "
                f"(a fraction mixes the weights of two neighbours), on {spec.id}, '{args.physics}' physics, MuJoCo "
                f"{mujoco.__version__}; seed {args.seed}, {args.num_envs} environments. Whole episodes only. "
                "Actions are those executed, clipped to [-1, 1]. Observations and rewards are float32."
            ),
            "requirements": [f"mujoco=={mujoco.__version__}", f"gymnasium=={gymnasium.__version__}"],
        },
    )
    data = load_dataset(args.id)
    stats = data.stats()
    score = normalized_score(spec.id, stats.return_mean)
    print(data)
    print(f"return {stats.return_mean:.1f} ± {stats.return_std:.1f}, {stats.return_min:.1f} to {stats.return_max:.1f}")
    print(f"D4RL-normalised {'none' if score is None else f'{score:.1f}'}; sha256 {data.sha256}")


if __name__ == "__main__":
    main()
