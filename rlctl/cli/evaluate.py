"""`rlctl eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlctl.cli.video import Checkpoint


def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="The directory of the run.", metavar="RUN_DIR")],
    episodes: Annotated[int, typer.Option(min=1, help="Episodes to run.")] = 100,
    stochastic: Annotated[
        bool, typer.Option("--stochastic", help="Sample actions instead of taking the deterministic one.")
    ] = False,
    checkpoint: Checkpoint = "latest",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the evaluation episodes.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, every return included.")] = False,
) -> None:
    """Evaluate a trained agent in fresh environments, with frozen normalisers.

    A normalised score is given where training was: for agents that learned from a dataset, on D4RL's scale. That of an
    online task is `rlctl report`'s, which says on what scale.
    """
    import rlctl_envs
    from rlctl import experiment
    from rlctl.cli.output import print_json
    from rlctl.data.reference import run_score, score_text
    from rlctl.evaluate import evaluate as run_episodes

    agent, settings = experiment.load_agent(run_dir, checkpoint)
    record = experiment.read_json(run_dir / "run.json")
    env_id, options = experiment.evaluated_in(run_dir, settings)
    env = rlctl_envs.make(env_id, min(episodes, 100), seed=seed, device=agent.spec.device, **options)
    result = run_episodes(agent, env, episodes, seed=seed, stochastic=stochastic)
    env.close()
    assert result is not None
    score = run_score(env_id, result.mean, on_data=settings.data is not None)
    dataset = record.get("dataset") or {}
    # the best of many evaluations is chosen by luck too: say by how many episodes
    used = (record.get("final") or {}).get("eval_episodes_used_total") if checkpoint == "best" else None
    if json_:
        print_json(
            {
                "run": str(run_dir),
                "algo": settings.algo,
                "env": env_id,
                "checkpoint": checkpoint,
                "eval_episodes_used": used,
                "episodes": episodes,
                "deterministic": not stochastic,
                "seed": seed,
                "return_mean": result.mean,
                "return_std": result.std,
                "normalized_score": score,
                **{k: dataset[k] for k in ("dataset", "dataset_version", "benchmark") if k in dataset},
                "returns": result.returns,
                "lengths": result.lengths,
            }
        )
        return
    kind = "sampled" if stochastic else "deterministic"
    trained_on = f"; trained on {dataset['dataset']}" if dataset else ""
    normalized = "" if score is None else f", {score_text(env_id, score)}"
    print(f"{settings.algo} on {env_id}: {result.mean:.1f} ± {result.std:.1f} over {episodes} episodes", end=" ")
    chosen = "" if used is None else f"; the best checkpoint by {used:,} episodes in training"
    length = sum(result.lengths) / len(result.lengths)
    print(f"({kind} actions{normalized}; mean length {length:.0f}{trained_on}{chosen})")
