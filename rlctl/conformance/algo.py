"""What every algorithm must keep: it solves the probes, reads no tensor on the host, resumes bit for bit, acts
reproducibly. Each check takes the algorithm's name.
"""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlctl import agents, checkpoint, experiment
from rlctl.config import as_plain, build
from rlctl.conformance import runs
from rlctl.conformance.host_reads import NoHostReads, host_reads, own_classes
from rlctl.conformance.probes import STARTS, knows_values, solve, value_of, write_dataset
from rlctl.conformance.results import Skip, expect, fail
from rlctl.conformance.samples import batch_for, differing, differing_keys, snapshot, tiny
from rlctl.conformance.settings import ACT_DIM, OBS_DIM, SMALL, traits
from rlctl.errors import UsageError
from rlctl.types import Batch, Spec
from rlctl_envs.probes import PROBES

AlgoCheck = Callable[[str], None]


# ------------------------------------------------------------------------------------------------------------- config
def settings(name: str) -> None:
    """Its config is a frozen dataclass with defaults that can be built, written and read."""
    cls = agents.get(name)
    cfg = cls.Config()
    for field in dataclasses.fields(cls.Config):
        try:
            setattr(cfg, field.name, None)
        except dataclasses.FrozenInstanceError:
            continue
        fail(f"{cls.Config.__name__} can be changed after it was made: @dataclass(frozen=True)")
    expect(hasattr(cfg, "steps"), f"{cls.Config.__name__} has no field steps: subclass the config of your loop")
    made = build(cls.Config, as_plain(cfg), "the config")
    expect(as_plain(made) == as_plain(cfg), "its defaults, written and read back, are other ones")
    agents.make(name, Spec(OBS_DIM, ACT_DIM, getattr(cfg, "num_envs", 1)), cfg)


def config_errors(name: str) -> None:
    """A misspelt or impossible setting is refused in one line that names the key."""
    cls = agents.get(name)
    for values, part in (({"stepz": 5}, "steps"), ({"steps": "many"}, "steps"), ({"steps": 0}, "steps")):
        try:
            build(cls.Config, values, f"the config of {name}")
        except UsageError as e:
            expect(part in str(e) and "\n" not in str(e), f"the error for {values} is not one line on {part}: {e}")
        else:
            fail(f"{values} was accepted")


# ------------------------------------------------------------------------------------------------------------- update
def optimisers(name: str) -> None:
    """Every parameter is learned by one optimiser or frozen, and moves."""
    agent = tiny(name)
    owned = [id(p) for opt in agent.optimizers().values() for g in opt.param_groups for p in g["params"]]
    expect(bool(agent.optimizers()), "no optimiser found: keep them as attributes, or in a dict or list that is one")
    owned += [id(p) for p in agent.moved_by_hand()]
    names = {id(p): k for k, p in agent.named_parameters()}
    twice = [names.get(i, "a parameter of no attribute") for i in set(owned) if owned.count(i) > 1]
    expect(not twice, f"in two optimisers: {', '.join(twice)}")
    orphans = [k for k, p in agent.named_parameters() if p.requires_grad and id(p) not in owned]
    expect(not orphans, f"in no optimiser: {', '.join(orphans)}; freeze with requires_grad_(False) if that is meant")
    trained = {id(p) for p in agent.parameters() if p.requires_grad}
    strangers = [names.get(i, "a parameter that is no attribute of the agent") for i in owned if i not in trained]
    expect(not strangers, f"an optimiser holds {', '.join(strangers)}, which is frozen or not saved")
    before = snapshot(agent)
    for seed in range(4):
        agent.update(batch_for(agent, seed))
    moved = set(differing(agent, before))
    learned = {k for k, p in agent.named_parameters() if p.requires_grad and not k.startswith(traits(name).elsewhere)}
    idle = sorted(learned - moved)
    expect(not idle, f"four updates do not move {', '.join(idle)}")


def metrics(name: str) -> None:
    """An update returns finite 0-dim tensors named like TensorBoard tags, and counts itself."""
    agent = tiny(name)
    seen: set[str] = set()
    for seed in range(4):
        for key, value in agent.update(batch_for(agent, seed)).items():
            expect(isinstance(value, Tensor) and value.shape == (), f"{key} is no 0-dim tensor")
            expect(not value.requires_grad, f"{key} still hangs on the graph: detach it")
            expect(bool(value.isfinite()), f"{key} is {float(value)}")
            expect("/" in key, f"{key} is not a tag like losses/critic")
            seen.add(key)
    expect(any(k.startswith("losses/") for k in seen), f"no losses/... among {', '.join(sorted(seen)) or 'no metrics'}")
    left = [k for k, p in agent.named_parameters() if p.grad is not None]
    expect(not left, f"gradients are left in {', '.join(left)}: take steps with rlctl.ops.minimize")
    n = agent.counters.get("updates")
    expect(n == 4, f"counters['updates'] is {n} after 4 updates: update() adds 1 to it")


def side_effects(name: str) -> None:
    """An update changes neither its batch nor the global random generator."""
    agent = tiny(name)
    batch = batch_for(agent)
    before = {k: v.clone() for k, v in batch.tensors().items()}
    state = torch.get_rng_state()
    agent.update(batch)
    agent.act(torch.zeros(2, OBS_DIM), explore=True)
    expect(torch.equal(torch.get_rng_state(), state), "it drew from torch's global generator: use self.rng['sample']")
    changed = [k for k, v in batch.tensors().items() if not torch.equal(v, before[k])]
    expect(not changed, f"it wrote into {', '.join(changed)} of the batch")


def no_host_reads(name: str) -> None:
    """An update reads no tensor on the host, so that it can be captured."""
    cls = agents.get(name)
    if cls.host_reads:
        raise Skip(f"it says that it must: {cls.host_reads}")
    agent = tiny(name)
    batches = [batch_for(agent, seed) for seed in range(6)]
    with NoHostReads():  # type: ignore[no-untyped-call]
        for batch in batches:
            agent.update(batch)
    for own in own_classes(cls):
        try:
            source = inspect.getsource(own)
        except (OSError, TypeError):  # defined in a session without a source file
            continue
        found = list(host_reads(source))
        expect(not found, f"in the source of {own.__name__}: {'; '.join(found)}")


def _learned(name: str, change: Callable[[Batch], Batch], **overrides: Any) -> dict[str, Tensor]:
    """The agent after three updates from batches that `change` went over."""
    agent = tiny(name, **overrides)
    for seed in range(3):
        agent.update(change(batch_for(agent, seed)))
    return snapshot(agent)


def termination(name: str) -> None:
    """Nothing beyond a termination counts: with every step terminated, the successors may be anything."""

    def ended(b: Batch, scale: float) -> Batch:
        return b._replace(next_obs=scale * b.next_obs, terminated=torch.ones_like(b.terminated))

    alone = dict(traits(name).backup_alone)
    found = differing_keys(
        _learned(name, partial(ended, scale=1.0), **alone), _learned(name, partial(ended, scale=-7.0), **alone)
    )
    expect(not found, f"successors of terminated steps changed {', '.join(found[:4])}: mask with ~terminated")


def truncation(name: str) -> None:
    """The true successor of a truncated step counts: a time limit is not an end."""
    if traits(name).learns != "values":
        raise Skip("it learns no values")

    def cut(b: Batch, scale: float) -> Batch:
        no, yes = torch.zeros_like(b.terminated), torch.ones_like(b.truncated)
        return b._replace(next_obs=scale * b.next_obs, terminated=no, truncated=yes)

    found = differing_keys(_learned(name, partial(cut, scale=1.0)), _learned(name, partial(cut, scale=-7.0)))
    expect(bool(found), "successors of truncated steps make no difference: mask with ~terminated, never with ~done")


def cuts(name: str) -> None:
    """Where episodes were cut makes no difference to an update from replayed single steps."""
    if agents.get(name).regime == "on_policy":
        raise Skip("on-policy advantages are cut at truncations")
    found = differing_keys(_learned(name, lambda b: b), _learned(name, lambda b: b._replace(truncated=~b.truncated)))
    expect(not found, f"the flag `truncated` changed {', '.join(found[:4])}")


def rewards_unseen(name: str) -> None:
    """Who is excused from finding values has no use for rewards."""
    if traits(name).learns == "values":
        raise Skip("it learns from rewards")
    found = differing_keys(_learned(name, lambda b: b), _learned(name, lambda b: b._replace(reward=-7.0 * b.reward)))
    expect(not found, f"rewards changed {', '.join(found[:4])}")


# --------------------------------------------------------------------------------------------------------- checkpoint
def save_load(name: str) -> None:
    """A restored agent goes on bit for bit: weights, optimisers, random generators, counters."""
    original = tiny(name, seed=0)
    for seed in range(3):
        original.update(batch_for(original, seed))
        original.act(torch.zeros(4, OBS_DIM), explore=True)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        root = Path(folder)
        checkpoint.save(root, "step_000000003", original, {}, checkpoint.Snapshot({"n": 3}), keep=1)
        restored = tiny(name, seed=1)  # other weights, other generators, fresh optimisers
        expect(bool(differing(restored, snapshot(original))), "another seed gives the same weights")
        snap = checkpoint.load(root / "step_000000003", restored)
    expect(snap.state == {"n": 3}, "the state of the run came back changed")
    expect(restored.counters == original.counters, f"counters {restored.counters}, saved {original.counters}")
    obs = torch.randn(4, OBS_DIM, generator=torch.Generator().manual_seed(9))
    for seed in range(10, 14):
        lost = differing(restored, snapshot(original))
        expect(not lost, f"{', '.join(lost[:4])} differ {seed - 10} updates after loading: state outside of the agent?")
        for explore in (False, True):
            same = torch.equal(original.act(obs, explore)[0], restored.act(obs, explore)[0])
            expect(same, f"act(explore={explore}) differs {seed - 10} updates after loading")
        batch = batch_for(original, seed)
        ours, theirs = original.update(batch), restored.update(batch)
        expect(ours.keys() == theirs.keys(), "the metrics have other names after loading")
        bad = [k for k in ours if not torch.equal(ours[k], theirs[k])]
        expect(not bad, f"metrics differ after loading: {', '.join(bad)}")
    expect(not differing(restored, snapshot(original)), "weights differ after loading and learning on")


def weights_alone(name: str) -> None:
    """Its parameters and buffers are enough to act: what it normalises by is one of them."""
    original, other = tiny(name, seed=0), tiny(name, seed=1)
    for seed in range(2):
        original.update(batch_for(original, seed))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_agent(Path(folder) / "best", original, {"score": 1})
        checkpoint.load_agent(Path(folder) / "best", other)
    obs = torch.randn(4, OBS_DIM, generator=torch.Generator().manual_seed(9))
    same = torch.equal(original.act(obs, explore=False)[0], other.act(obs, explore=False)[0])
    expect(same, "an agent with the same weights acts otherwise: register what it needs as a parameter or buffer")


def exact_resume(name: str) -> None:
    """A run that was interrupted and resumed ends bit for bit like one that never was."""
    cls = agents.get(name)
    if traits(name).wraps:
        raise Skip("it corrects a trained run, which it would have to be given")
    known = {f.name for f in dataclasses.fields(cls.Config)}
    layer = {k: v for k, v in (SMALL | dict(traits(name).tiny)).items() if k in known}
    # ticks at which it is stopped; the data end an off-policy run's warm-up between the first two
    sizes: dict[str, tuple[dict[str, Any], list[int]]] = {
        "on_policy": ({"steps": 6 * layer.get("num_envs", 1) * layer.get("horizon", 1)}, [2, 1, 2]),
        "off_policy": ({"steps": 200, "learning_starts": 40}, [5, 11, 7]),
        "offline": ({"steps": 40}, [3, 15, 1]),
    }
    length, pieces = sizes[cls.regime]
    layer |= {k: v for k, v in length.items() if k in known}
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        root = Path(folder)
        data = write_dataset(root / "data.npz") if "data" in cls.sources() else None
        periods = {"eval_every": max(layer["steps"] // 4, 1), "log_every": max(layer["steps"] // 7, 1)}
        s = runs.settings(name, "probe:both", data, **layer, run=periods)
        try:
            experiment.train(s, root / "whole", quiet=True)
            stopped = runs.train_in_pieces(s, root / "pieces", pieces)
        finally:
            torch.set_num_threads(threads)
        expect(stopped > 0, "the run ended before it could be interrupted")
        runs.assert_same(root / "whole", root / "pieces")


# ---------------------------------------------------------------------------------------------------------------- act
def act(name: str) -> None:
    """act() gives [N, A] float32 actions and extras with a row for each."""
    for explore in (False, True):
        for n in (1, 5):
            action, extra = tiny(name).act(torch.randn(n, OBS_DIM, generator=_generator()), explore)
            expect(
                action.shape == (n, ACT_DIM),
                f"explore={explore}: actions of shape {tuple(action.shape)}, wanted {(n, ACT_DIM)}",
            )
            expect(action.dtype == torch.float32, f"explore={explore}: actions are {action.dtype}")
            expect(isinstance(extra, dict), f"explore={explore}: extra is {type(extra).__name__}, wanted a dict")
            bad = [k for k, x in extra.items() if len(x) != n]
            expect(not bad, f"explore={explore}: extra {', '.join(bad)} does not have a row per observation")


def random_streams(name: str) -> None:
    """Exploration draws from the agent's own generator alone; the deterministic action draws nothing."""
    obs = torch.randn(5, OBS_DIM, generator=_generator())
    draws = []
    for global_seed in (1, 2):
        agent = tiny(name)
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            draws.append([agent.act(obs, explore)[0] for explore in (True, False, True, False)])
    for a, b in zip(*draws, strict=True):
        expect(torch.equal(a, b), "actions depend on torch's global generator: use self.rng['action']")
    first, mode, second, mode_again = draws[0]
    expect(torch.equal(mode, mode_again), "the deterministic action is not the same twice")
    expect(not torch.equal(first, second), "explore=True gives the same action twice")
    expect(not torch.equal(first, mode), "explore=True gives the deterministic action")
    agent = tiny(name)
    before = {k: g.get_state() for k, g in agent.rng.items()}
    agent.act(torch.zeros(3, OBS_DIM), explore=False)
    drawn = [k for k, g in agent.rng.items() if not torch.equal(g.get_state(), before[k])]
    expect(not drawn, f"the deterministic action drew from {', '.join(drawn)}")
    agent, twin = tiny(name), tiny(name)
    lent = []
    for _ in range(2):
        with agent.borrowed_rng(7):
            lent.append(agent.act(obs, explore=True)[0])
    expect(torch.equal(*lent), "borrowed generators with one seed give two results")
    same = torch.equal(agent.act(obs, explore=True)[0], twin.act(obs, explore=True)[0])
    expect(same, "an evaluation (borrowed_rng) changes what training draws afterwards")


def rows_apart(name: str) -> None:
    """Each observation is acted on by itself, whatever else is in the batch."""
    agent = tiny(name)
    obs = torch.randn(5, OBS_DIM, generator=_generator())
    together = agent.act(obs, explore=False)[0].detach()
    alone = torch.cat([agent.act(row[None], explore=False)[0] for row in obs]).detach()
    gap = float((together - alone).abs().max())
    expect(gap <= 1.3e-6 + 1e-5 * float(alone.abs().max()), f"actions change by {gap:.2g} with the other rows")


def predict(name: str) -> None:
    """predict() gives numpy actions within [-1, 1], of one observation or many."""
    agent = tiny(name)
    rng = np.random.default_rng(0)
    one, many = rng.normal(size=OBS_DIM), rng.normal(size=(5, OBS_DIM))  # float64, as numpy gives them
    action, state = agent.predict(one)
    expect(state is None, "predict() returned a state")
    expect(isinstance(action, np.ndarray) and action.shape == (ACT_DIM,), "one observation [O] gives one action [A]")
    expect(action.dtype == np.float32, f"actions are {action.dtype}, wanted float32")
    actions, _ = agent.predict(many)
    expect(actions.shape == (5, ACT_DIM), f"five observations give {actions.shape}")
    expect(np.array_equal(actions, agent.predict(many)[0]), "the deterministic prediction is not the same twice")
    wanted = agent.act(torch.from_numpy(many).float(), explore=False)[0].clamp(-1, 1).detach().numpy()
    expect(np.array_equal(actions, wanted), "predict() is not act(explore=False), clipped")
    noisy = [agent.predict(np.tile(one, (200, 1)), deterministic=False)[0] for _ in range(2)]
    expect(not np.array_equal(noisy[0], noisy[1]), "deterministic=False gives the same actions twice")
    expect(all(np.abs(x).max() <= 1 for x in noisy), "actions outside [-1, 1]")


def seeds(name: str) -> None:
    """One seed gives one result; another gives other weights."""
    states = []
    for seed, global_seed in ((3, 1), (3, 2), (4, 1)):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            agent = tiny(name, seed=seed)
            start = snapshot(agent)
            for k in range(5):
                agent.update(batch_for(agent, k))
        states.append((start, snapshot(agent)))
    same, again, other = states
    for when, k in (("at the start", 0), ("after five updates", 1)):
        found = differing_keys(same[k], again[k])
        expect(not found, f"{when} {', '.join(found[:4])} depend on more than the seed")
        weights = {n for n, x in same[0].items() if n.endswith("weight") and x.dim() > 1}  # a LayerNorm starts at 1
        fixed = weights - set(differing_keys(same[k], other[k]))
        expect(not fixed, f"{when} {', '.join(sorted(fixed)[:4])} do not depend on the seed")


# ------------------------------------------------------------------------------------------------------------- probes
def probe(name: str, which: str) -> None:
    """Learns the known value and best action of a probe environment."""
    learns = traits(name).learns
    if learns == "neither":
        raise Skip("it learns neither values nor actions by itself")
    if learns == "actions" and which not in ("action", "both"):
        raise Skip("it copies actions, and none matters here")
    agent, env = solve(name, which)
    obs = torch.tensor(STARTS.get(which, [[0.0]]))
    if learns == "values" and knows_values(agent):
        value, known = value_of(agent, obs) / traits(name).reward_scale, env.value(obs, agent.cfg.gamma)
        tolerance = 0.1 if which in ("action", "both") else 0.04 * max(float(known.abs().max()), 1.0)
        _close("values", value, known, tolerance)
    elif which not in ("action", "both"):
        raise Skip("it keeps no value (`v` or `q`), and no action matters here")
    if which in ("action", "both"):
        # 0.2 off costs 0.04; blind or wrong-signed actors are 0.4 off. Who is shown the action comes nearer.
        action, _ = agent.act(obs, explore=False)
        tolerance = 0.2 if learns == "values" else 0.05
        _close("actions", action.detach().flatten(), env.optimal_action(obs).flatten(), tolerance)


def _close(what: str, got: Tensor, known: Tensor, tolerance: float) -> None:
    shown, wanted = (", ".join(f"{x:.3f}" for x in t.tolist()) for t in (got, known))
    near = bool(((got - known).abs() <= tolerance).all())
    expect(
        near, f"{what} {shown}; known {wanted} (within {tolerance:g}). Other settings may be needed: --set KEY=VALUE"
    )


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _of_probe(which: str) -> AlgoCheck:
    def check(name: str) -> None:
        probe(name, which)

    check.__doc__ = f"Solves probe:{which} ({PROBES[which].summary})."
    return check


CHECKS: Mapping[str, AlgoCheck] = {
    "settings": settings,
    "config-errors": config_errors,
    "act": act,
    "random-streams": random_streams,
    "rows-apart": rows_apart,
    "predict": predict,
    "optimisers": optimisers,
    "metrics": metrics,
    "side-effects": side_effects,
    "host-reads": no_host_reads,
    "termination": termination,
    "truncation": truncation,
    "cuts": cuts,
    "rewards-unseen": rewards_unseen,
    "seeds": seeds,
    "save-load": save_load,
    "weights-alone": weights_alone,
    "exact-resume": exact_resume,
    **{f"probe-{which}": _of_probe(which) for which in PROBES},
}
"""Every check by name, the quick ones first."""
