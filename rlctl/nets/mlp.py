"""Multi-layer perceptrons and their initialisations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from rlctl.ops.dense import FusedActivation, dense
from rlctl.ops.matmul import linear

Activation = Literal["relu", "tanh", "elu", "silu", "gelu"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


class Linear(nn.Linear):
    """`nn.Linear` through the faster kernels of this machine (`rlctl.ops.matmul`)."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in] -> [..., out]`."""
        return linear(input, self.weight, self.bias)


class MLP(nn.Sequential):
    """`nn.Sequential` of the layers `mlp` builds, run through `rlctl.ops.dense` where that knows the activation."""

    fused: FusedActivation | None = None
    """The activation of every hidden layer, where all layers are affine: the network then runs as a whole."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in] -> [..., out]`."""
        if self.fused is None:
            return super().forward(input)  # type: ignore[no-untyped-call]
        return dense(input, [p for m in self if isinstance(m, Linear) for p in (m.weight, m.bias)], self.fused)

    def features(self, input: Tensor) -> Tensor:
        """What the last layer sees, `[..., in] -> [..., width of the last hidden layer]`: `net[-1]` goes on from it."""
        for layer in list(self)[:-1]:
            input = layer(input)
        return input


def mlp(
    in_dim: int,
    out_dim: int,
    hidden: Sequence[int],
    activation: Activation = "relu",
    *,
    layer_norm: bool = False,
    orthogonal: float | None = None,
) -> MLP:
    """`in_dim -> hidden... -> out_dim`, linear last layer.

    `layer_norm` puts a LayerNorm before each activation. Initialisation is PyTorch's default (uniform within
    1/sqrt(fan_in)); with `orthogonal=g` weights are orthogonal, gain sqrt(2) in hidden layers and `g` in the last, and
    biases are zero.
    """
    net = MLP()
    width = in_dim
    for k, h in enumerate(hidden):
        net.add_module(f"hidden{k}", Linear(width, h))
        if layer_norm:
            net.add_module(f"norm{k}", nn.LayerNorm(h))
        net.add_module(f"act{k}", ACTIVATIONS[activation]())
        width = h
    net.add_module("out", Linear(width, out_dim))
    if orthogonal is not None:
        linears = [m for m in net if isinstance(m, nn.Linear)]
        for i, linear in enumerate(linears):
            nn.init.orthogonal_(linear.weight, orthogonal if i == len(linears) - 1 else 2**0.5)
            nn.init.zeros_(linear.bias)
    if not layer_norm and (activation == "relu" or activation == "tanh"):
        net.fused = activation
    return net
