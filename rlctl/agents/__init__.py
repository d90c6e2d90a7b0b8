"""The algorithms, one file each, and the register that finds them by name.

A name is one of ours (`ppo`), one that an installed package offers through the entry-point group `rlctl.algos`, or a
class in a file of your own, as `package.module:Class`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from rlctl.errors import UsageError
from rlctl.seeding import fresh_weights
from rlctl.types import Agent, Spec


@dataclass(frozen=True)
class Entry:
    """A registered algorithm."""

    name: str
    target: str
    """`module:Class`."""
    paper: str
    summary: str


ENTRIES = {
    e.name: e
    for e in (
        Entry("ppo", "rlctl.agents.ppo:PPO", "arXiv:1707.06347", "clipped-ratio policy gradient"),
        Entry("trpo", "rlctl.agents.trpo:TRPO", "arXiv:1502.05477", "natural-gradient step inside a KL ball"),
        Entry(
            "mdpo", "rlctl.agents.mdpo:MDPO", "arXiv:2005.09814", "mirror descent: surrogate minus a growing KL term"
        ),
        Entry("spo", "rlctl.agents.spo:SPO", "arXiv:2401.16025", "quadratic penalty on the ratio instead of a clip"),
        Entry("fixpo", "rlctl.agents.fixpo:FixPO", "arXiv:2312.05405", "KL penalty and repair: a bound on every state"),
        Entry("pmoe-ppo", "rlctl.agents.pmoe_ppo:PMOEPPO", "arXiv:2104.09122", "PPO on a Gaussian mixture, gated"),
        Entry("sac", "rlctl.agents.sac:SAC", "arXiv:1812.05905", "maximum-entropy actor-critic, learned temperature"),
        Entry("mdpo-off", "rlctl.agents.mdpo_off:MDPOOff", "arXiv:2005.09814", "mirror descent on a soft actor-critic"),
        Entry("pmoe-sac", "rlctl.agents.pmoe_sac:PMOESAC", "arXiv:2104.09122", "SAC with a gated Gaussian mixture"),
        Entry("rlpd", "rlctl.agents.rlpd:RLPD", "arXiv:2302.02948", "SAC beside a dataset: ensemble, many updates"),
        Entry("expo", "rlctl.agents.expo:EXPO", "arXiv:2507.07986", "best of generative draws and their small edits"),
        Entry("gorl", "rlctl.agents.gorl:GoRL", "arXiv:2512.02581", "PPO on codes; a generative decoder, refitted"),
        Entry("gorl-sac", "rlctl.agents.gorl_sac:GoRLSAC", "arXiv:2512.02581", "SAC on codes; the decoder refitted"),
        Entry("td3", "rlctl.agents.td3:TD3", "arXiv:1802.09477", "deterministic actor, twin delayed critics"),
        Entry("bc", "rlctl.agents.bc:BC", "Pomerleau 1988", "behaviour cloning, of all or of the best episodes"),
        Entry("td3bc", "rlctl.agents.td3bc:TD3BC", "arXiv:2106.06860", "offline TD3 with a behaviour-cloning term"),
        Entry("prdc", "rlctl.agents.prdc:PRDC", "arXiv:2306.06569", "offline TD3 drawn to the nearest data point"),
        Entry("a2pr", "rlctl.agents.a2pr:A2PR", "arXiv:2405.19909", "TD3+BC on the better of data and VAE actions"),
        Entry("iql", "rlctl.agents.iql:IQL", "arXiv:2110.06169", "expectile values, advantage-weighted cloning"),
        Entry("cql", "rlctl.agents.cql:CQL", "arXiv:2006.04779", "soft actor-critic with conservative critics"),
        Entry("cal-ql", "rlctl.agents.cal_ql:CalQL", "arXiv:2303.05479", "CQL, floored by the data's own returns"),
        Entry("awac", "rlctl.agents.awac:AWAC", "arXiv:2006.09359", "actor-critic with an advantage-weighted policy"),
        Entry("edac", "rlctl.agents.edac:EDAC", "arXiv:2110.01548", "many diverse critics, the smallest counts"),
        Entry("rebrac", "rlctl.agents.rebrac:ReBRAC", "arXiv:2305.09836", "TD3+BC that clones in its critics too"),
        Entry("famo2o-iql", "rlctl.agents.famo2o_iql:FamO2OIQL", "arXiv:2310.17966", "IQL at a beta for every state"),
        Entry("famo2o-cql", "rlctl.agents.famo2o_cql:FamO2OCQL", "arXiv:2310.17966", "CQL at a beta for every state"),
        Entry("cdsa", "rlctl.agents.cdsa:CDSA", "arXiv:2406.07541", "score steps on the actions of a trained agent"),
        Entry(
            "odice", "rlctl.agents.odice:ODICE", "arXiv:2402.00348", "DICE by orthogonal gradients, weighted cloning"
        ),
        Entry(
            "diffusion-bc", "rlctl.agents.diffusion_bc:DiffusionBC", "arXiv:2208.06193", "cloning by a diffusion policy"
        ),
        Entry("flow-bc", "rlctl.agents.flow_bc:FlowBC", "arXiv:2502.02538", "cloning by a flow policy"),
        Entry(
            "diffusion-ql",
            "rlctl.agents.diffusion_ql:DiffusionQL",
            "arXiv:2208.06193",
            "diffusion policy, gradients of Q through its chain",
        ),
        Entry("fql", "rlctl.agents.fql:FQL", "arXiv:2502.02538", "one-step policy, distilled from a flow, climbing Q"),
        Entry("idql", "rlctl.agents.idql:IDQL", "arXiv:2304.10573", "IQL's values choose among a diffusion's draws"),
        Entry("ifql", "rlctl.agents.ifql:IFQL", "arXiv:2502.02538", "IQL's values choose among a flow's draws"),
        Entry("dppo", "rlctl.agents.dppo:DPPO", "arXiv:2409.00588", "PPO on a diffusion's denoising steps"),
        Entry("pa-rl", "rlctl.agents.pa_rl:PARL", "arXiv:2412.06685", "imitates actions that critics have improved"),
        Entry("odice-il", "rlctl.agents.odice_il:ODICEIL", "arXiv:2402.00348", "ODICE that imitates one trajectory"),
    )
}

BASELINES = {
    e.name: e
    for e in (
        Entry("sb3:ppo", "rlctl.agents.sb3:SB3PPO", "arXiv:1707.06347", "PPO of Stable-Baselines3"),
        Entry("sb3:sac", "rlctl.agents.sb3:SB3SAC", "arXiv:1812.05905", "SAC of Stable-Baselines3"),
        Entry("sb3:td3", "rlctl.agents.sb3:SB3TD3", "arXiv:1802.09477", "TD3 of Stable-Baselines3"),
        Entry("sb3:trpo", "rlctl.agents.sb3:SB3TRPO", "arXiv:1502.05477", "TRPO of sb3-contrib"),
        Entry("sb3:tqc", "rlctl.agents.sb3:SB3TQC", "arXiv:2005.04269", "TQC of sb3-contrib"),
    )
}
"""Learners of other libraries on our tasks, to compare with (extra `sb3`)."""


def names() -> list[str]:
    """Every algorithm that can be named: ours, then those of installed packages."""
    return [*ENTRIES, *sorted(_plugins())]


def get(name: str) -> type[Agent]:
    """The agent class called `name`; UsageError with the nearest match if there is none."""
    if (entry := ENTRIES.get(name) or BASELINES.get(name)) is not None:
        return _load(entry.target, name)
    if ":" in name and not name.startswith("sb3:"):
        return _load(name, name)
    plugins = _plugins()
    if name in plugins:
        return _load(plugins[name], name)
    known = [*names(), *BASELINES]
    close = get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'? `rlctl algos` lists all" if close else f"known are {', '.join(known)}"
    raise UsageError(f"unknown algorithm '{name}': {hint}; an agent of your own is package.module:Class")


def make(name: str | type[Agent], spec: Spec, cfg: Any = None) -> Agent:
    """Build an agent on `spec.device`; its weights depend on `spec.seed` alone (the global generator is left as is)."""
    cls = get(name) if isinstance(name, str) else name
    with fresh_weights(spec.seed, "init", spec.device):
        return cls(spec, cfg)


def _plugins() -> dict[str, str]:
    return {e.name: e.value for e in entry_points(group="rlctl.algos")}


def _load(target: str, asked: str) -> type[Agent]:
    module_name, _, class_name = target.partition(":")
    if (cwd := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, cwd)  # a user's file lies where the user stands
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is None or not (module_name == e.name or module_name.startswith(e.name + ".")):
            raise  # the user's module exists, and something it imports does not
        raise UsageError(f"no module '{module_name}' for '{asked}': looked in {cwd} and the installed packages") from e
    cls = getattr(module, class_name, None)
    if cls is None:
        found = [n for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, Agent) and c is not Agent]
        raise UsageError(f"no class '{class_name}' in {module_name}; it has {', '.join(found) or 'no agents'}")
    if not (inspect.isclass(cls) and issubclass(cls, Agent)):
        raise UsageError(f"'{asked}' is not an rlctl.Agent subclass")
    if not (is_dataclass(getattr(cls, "Config", None)) and hasattr(cls, "regime")):
        raise UsageError(f"'{asked}' needs the class attributes `regime` and `Config` (a frozen dataclass)")
    return cls
