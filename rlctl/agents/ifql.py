"""IFQL: IDQL with a flow in the diffusion's place.

Source: Park et al. 2025, arXiv:2502.02538, where it is a baseline: the flow counterpart of arXiv:2304.10573.
Differs: actions come from an average over updates, as in `idql` (officially from the current flow).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rlctl.agents.idql import IDQL, ChosenByValueConfig
from rlctl.nets import FlowPolicy, Policy, QEnsemble, ValueNet
from rlctl.nets.field import xavier_
from rlctl.nets.mlp import Activation, Norm
from rlctl.types import Count, Widths


@dataclass(frozen=True)
class IFQLConfig(ChosenByValueConfig):
    """Defaults: those of FQL, expectile 0.9."""

    hidden: Widths = (512, 512, 512, 512)
    """Widths of the hidden layers of the velocity network (GELU)."""
    flow_steps: Count = 10
    """Euler steps from noise to action."""
    critic_hidden: Widths = (512, 512, 512, 512)
    """Widths of the hidden layers of critics and V."""
    critic_activation: Activation = "gelu"
    """Their activation."""
    layer_norm: Norm = "after"
    """Layer norm in critics and V: true before each activation, "after" it, or false."""
    expectile: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Which expectile of Q over the data's actions is V: 0.5 is their mean, towards 1 the best of them."""


class IFQL(IDQL):
    """The same with a flow."""

    Config = IFQLConfig

    def make_policy(self) -> Policy:
        """The policy that learns."""
        c = self.cfg
        assert isinstance(c, IFQLConfig)
        return FlowPolicy(self.spec.obs_dim, self.spec.act_dim, c.hidden, steps=c.flow_steps)

    def make_values(self) -> tuple[QEnsemble, ValueNet]:
        """The critics and V, which start Xavier-uniform like the flow."""
        q, v = super().make_values()
        xavier_(q)
        xavier_(v)
        return q, v
