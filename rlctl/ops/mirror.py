"""Mirror-descent policy steps: what the log-densities of the new and the old policy weigh, and Tsallis logarithms."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

MirrorForm = Literal["exact", "linearised"]


def mirror_weights(kl_coef: float, alpha: float, form: MirrorForm, tsallis_q: float = 1.0) -> tuple[float, float]:
    """(on log pi, on log pi_k) in the loss E_{a~pi}[on_pi log pi + on_k log pi_k - Q] of one soft mirror-descent step.

    The step maximises E_{a~pi}[Q] + alpha H(pi) - c D(pi, pi_k), where c = `kl_coef` and D is the Bregman divergence of
    the negative entropy (the KL at `tsallis_q` = 1). `exact` gives (alpha + c, -c q). `linearised` replaces the entropy
    by its tangent at pi_k, which gives (c, (alpha - c) q). Both are SAC's (alpha, 0) where pi_k drops out: at c = 0 in
    the exact form, at c = alpha in the linearised one.

    Repeated with a fixed Q, the exact form contracts log pi towards Q / alpha by c / (alpha + c) per step, the
    linearised form by |1 - alpha / c|: it needs c > alpha / 2.
    Source: Tomar et al. 2020, arXiv:2005.09814; the factor q is the derivative of p log_{2-q} p.
    """
    if form == "exact":
        return alpha + kl_coef, -kl_coef * tsallis_q
    return kl_coef, (alpha - kl_coef) * tsallis_q


def tsallis_log(logp: Tensor, q: float) -> Tensor:
    """log_{2-q} p = (p^(q-1) - 1) / (q - 1) of a density p given by its logarithm; q in [1, 2], log p itself at q = 1.

    Source: Lee et al. 2019, arXiv:1902.00137 (Tsallis entropy in reinforcement learning).
    """
    return logp if q == 1 else ((q - 1) * logp).expm1() / (q - 1)
