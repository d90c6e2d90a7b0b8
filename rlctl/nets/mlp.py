"""Multi-layer perceptrons and their initialisations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

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
    """`nn.Linear`, with a ReLU behind it if asked, through the faster kernels of this machine (`rlctl.ops.matmul`)."""

    def __init__(self, in_features: int, out_features: int, *, relu: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.relu = relu

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in] -> [..., out]`."""
        return linear(input, self.weight, self.bias, relu=self.relu)

    def extra_repr(self) -> str:
        """The sizes, and the activation if it is inside."""
        return super().extra_repr() + (", relu" if self.relu else "")


def mlp(
    in_dim: int,
    out_dim: int,
    hidden: Sequence[int],
    activation: Activation = "relu",
    *,
    layer_norm: bool = False,
    orthogonal: float | None = None,
) -> nn.Sequential:
    """`in_dim -> hidden... -> out_dim`, linear last layer.

    `layer_norm` puts a LayerNorm before each activation. Initialisation is PyTorch's default (uniform within
    1/sqrt(fan_in)); with `orthogonal=g` weights are orthogonal, gain sqrt(2) in hidden layers and `g` in the last, and
    biases are zero.
    """
    net = nn.Sequential()
    width = in_dim
    for k, h in enumerate(hidden):  # names, so that a state dict does not depend on what is fused
        fused = activation == "relu" and not layer_norm
        net.add_module(f"hidden{k}", Linear(width, h, relu=fused))
        if layer_norm:
            net.add_module(f"norm{k}", nn.LayerNorm(h))
        if not fused:
            net.add_module(f"act{k}", ACTIVATIONS[activation]())
        width = h
    net.add_module("out", Linear(width, out_dim))
    if orthogonal is not None:
        linears = [m for m in net if isinstance(m, nn.Linear)]
        for i, linear in enumerate(linears):
            nn.init.orthogonal_(linear.weight, orthogonal if i == len(linears) - 1 else 2**0.5)
            nn.init.zeros_(linear.bias)
    return net
