"""What the timing of TRPO compares: the same work on the same rollout, to the same result."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

pytest.importorskip("sb3_contrib", reason="the extra 'sb3' is not installed")

SCRIPT = "speed/trpo"


def test_both_take_the_same_step_from_the_same_weights(script: ModuleType) -> None:
    """sb3-contrib as an oracle of our update: same conjugate gradient, line search and value targets.

    Its value minibatches come in another order, so of the value networks only the loss is compared.
    """
    agent, batch = script.collected()
    ours = script.ours(agent, batch)
    model, theirs = script.peer(agent, batch)
    before = agent.pi(batch.obs).detach()
    torch.testing.assert_close(
        torch.as_tensor(model.policy.get_distribution(batch.obs.flatten(0, 1)).distribution.mean.detach()),
        before.mean.flatten(0, 1),
    )
    for _ in range(2):  # again from the same start
        ours.restore()
        theirs.restore()
        metrics = ours.update()
        theirs.update()
        logged = model.logger.name_to_value
        assert float(metrics["policy/step_scale"]) == 1
        assert logged["train/is_line_search_success"] == 1
        mean_kl = float(metrics["policy/kl"]) / batch.action.shape[-1]  # the peer averages over dimensions
        assert logged["train/kl_divergence_loss"] == pytest.approx(mean_kl, rel=1e-3)
        assert logged["train/policy_objective"] == pytest.approx(-float(metrics["losses/policy"]), rel=1e-3)
        assert logged["train/value_loss"] == pytest.approx(float(metrics["losses/value"]), rel=0.1)
        with torch.no_grad():
            obs = batch.obs.flatten(0, 1)
            mine, peers = agent.pi(obs).mean, model.policy.get_distribution(obs).distribution.mean
        moved = float((mine - before.mean.flatten(0, 1)).square().mean())
        assert float((mine - peers).square().mean()) < 1e-4 * moved
