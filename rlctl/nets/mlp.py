"""Multi-layer perceptrons and their initialisations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from rlctl.ops.dense import FusedActivation, dense
from rlctl.ops.matmul import linear

Activation = Literal["relu", "tanh", "elu", "silu", "gelu", "mish"]
Norm = bool | Literal["after"]
"""LayerNorm in hidden layers: none, before the activation, or after it."""
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
}


ACTIVATION_TYPES: dict[FusedActivation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


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
        if self.fused is None or not self._as_built(ACTIVATION_TYPES[self.fused]):
            return self.by_layers(input)
        return dense(input, [p for m in self if isinstance(m, Linear) for p in (m.weight, m.bias)], self.fused)

    def by_layers(self, input: Tensor) -> Tensor:
        """`forward` as one autograd node per layer: cheaper where a second derivative follows (no second forward)."""
        return super().forward(input)  # type: ignore[no-untyped-call]

    def dropped(self, input: Tensor, p: float, generator: torch.Generator) -> Tensor:
        """The same with dropout: each hidden unit is zero with probability `p`, the others are scaled by 1 / (1 - p).

        Masks come from `generator`, never from the global one; who calls this decides, not `train()` and `eval()`.
        """
        for layer in list(self)[:-1]:
            input = layer(input)
            if not isinstance(layer, nn.Linear | nn.LayerNorm):  # an activation: the end of a hidden layer
                kept = torch.rand(input.shape, generator=generator, dtype=input.dtype, device=input.device) >= p
                input = input * kept / (1 - p)
        return self[-1](input)

    def _as_built(self, activation: type[nn.Module]) -> bool:
        """Whether the layers are still those of `mlp`, without hooks: else they run one by one."""
        layers = list(self._modules.values())
        return len(layers) % 2 == 1 and all(
            type(m) is (activation if i % 2 else Linear) and not m._forward_hooks and not m._forward_pre_hooks
            for i, m in enumerate(layers)
            if m is not None
        )

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
    layer_norm: Norm = False,
    orthogonal: float | None = None,
    small_last: float | None = None,
    last_variance: float | None = None,
) -> MLP:
    """`in_dim -> hidden... -> out_dim`, linear last layer.

    `layer_norm` puts a LayerNorm before each activation ("after": after it). Initialisation is PyTorch's default
    (uniform within 1/sqrt(fan_in)); with `orthogonal=g` weights are orthogonal, gain sqrt(2) in hidden layers and `g`
    in the last, and biases are zero; with `small_last=u` all of the last layer is uniform within +-u and hidden biases
    are 0.1; with `last_variance=v` the last layer's weights are uniform with variance v / fan_in, its biases zero.
    """
    net = MLP()
    width = in_dim
    for k, h in enumerate(hidden):
        net.add_module(f"hidden{k}", Linear(width, h))
        if layer_norm is True:
            net.add_module(f"norm{k}", nn.LayerNorm(h))
        net.add_module(f"act{k}", ACTIVATIONS[activation]())
        if layer_norm == "after":
            net.add_module(f"norm{k}", nn.LayerNorm(h))
        width = h
    net.add_module("out", Linear(width, out_dim))
    if orthogonal is not None:
        linears = [m for m in net if isinstance(m, nn.Linear)]
        for i, linear in enumerate(linears):
            nn.init.orthogonal_(linear.weight, orthogonal if i == len(linears) - 1 else 2**0.5)
            nn.init.zeros_(linear.bias)
    if small_last is not None:
        linears = [m for m in net if isinstance(m, nn.Linear)]
        for m in linears[:-1]:
            nn.init.constant_(m.bias, 0.1)
        nn.init.uniform_(linears[-1].weight, -small_last, small_last)
        nn.init.uniform_(linears[-1].bias, -small_last, small_last)
    if last_variance is not None:
        last = net[-1]
        assert isinstance(last, nn.Linear)
        bound = (3 * last_variance / last.in_features) ** 0.5
        nn.init.uniform_(last.weight, -bound, bound)
        nn.init.zeros_(last.bias)
    if not layer_norm and (activation == "relu" or activation == "tanh"):
        net.fused = activation
    return net
