"""Behaviour cloning with a flow policy: imitates every mode of the data instead of their mean.

Source: Park et al. 2025, arXiv:2502.02538, the flow's loss alone (flow matching: arXiv:2210.02747).
Differs: nothing known of the loss. Actions come from an average over updates, as in `diffusion-bc`; so does the choice
of zero noise as the deterministic action, with what is said there of data with several modes and with noise.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlctl.agents.diffusion_bc import CloningConfig, DiffusionBC
from rlctl.nets import FlowPolicy, Policy
from rlctl.ops.flow import Method
from rlctl.types import Count, Widths


@dataclass(frozen=True)
class FlowBCConfig(CloningConfig):
    """Defaults: the flow of FQL."""

    hidden: Widths = (512, 512, 512, 512)
    """Widths of the hidden layers of the velocity network (GELU)."""
    flow_steps: Count = 10
    """Steps K from noise to action."""
    method: Method = "euler"
    """How a step is made: euler, or midpoint (two evaluations)."""


class FlowBC(DiffusionBC):
    """The same with a flow."""

    Config = FlowBCConfig

    def make_policy(self) -> Policy:
        """The policy that learns."""
        c = self.cfg
        assert isinstance(c, FlowBCConfig)
        return FlowPolicy(self.spec.obs_dim, self.spec.act_dim, c.hidden, steps=c.flow_steps, method=c.method)
