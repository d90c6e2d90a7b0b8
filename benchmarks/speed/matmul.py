"""Matrix products: MKL, oneDNN and what `rlctl.ops.matmul` picks, in the shapes of a 256-256 and a 64-64 network.

    python benchmarks/speed/matmul.py

Microseconds per call of y = x W^T + b, forward, one thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved, write

from rlctl.ops import matmul as products

SHAPES = [(256, 256, 256), (256, 23, 256), (256, 256, 12), (64, 64, 64), (2048, 64, 64), (1, 256, 256)]


def rate(f: Callable[[], Any], seconds: float) -> float:
    f()
    start, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        for _ in range(20):
            f()
        calls += 20
    return calls / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    onednn = torch.ops.mkldnn._linear_pointwise
    result: dict[str, Any] = {}
    for b, i, o in SHAPES:
        x, w, bias = torch.randn(b, i), torch.randn(o, i), torch.randn(o)
        contenders = {
            "rlctl": lambda: rate(lambda: products.linear(x, w, bias), args.seconds),  # noqa: B023
            "oneDNN": lambda: rate(lambda: onednn(x, w, bias, "none", [], ""), args.seconds),  # noqa: B023
            "MKL": lambda: rate(lambda: torch.addmm(bias, x, w.t()), args.seconds),  # noqa: B023
        }
        result[f"{b} x {i} -> {o}"] = interleaved(contenders, args.rounds)
    for shape, r in result.items():
        print(shape, "  ".join(f"{n} {1e6 / v['median']:.1f} us" for n, v in r.items()))
    write("speed-matmul", {"unit": "calls/s", "enabled": products.ENABLED, "results": result}, args.out)


if __name__ == "__main__":
    main()
