"""A program of warp and torch steps over fixed memory, run as one CUDA graph, as several, or step by step."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
import warp as wp

from rlctl_envs import cuda_graphs
from rlctl_envs.engines.warp import WarpEngine

Capture: TypeAlias = Literal["auto", "graph", "split", "eager"]
"""graph: everything in one CUDA graph. split: each run of warp steps is one graph, and on CUDA each run of torch steps.
eager: no graph. auto: the first of these that works; on the CPU, where torch has no graphs, split."""

WARM_UP = 2
"""Runs before a capture: the first compiles kernels and creates handles, which a capture must not see."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A step of the program. It reads nothing on the host and always uses the same memory."""

    kind: Literal["torch", "warp"]
    run: Callable[[], None]


class Program:
    """Parts run in order, captured as `mode` says. Call it to run them once.

    `build` runs the parts `WARM_UP` times for real, so the caller puts its state in order afterwards.
    """

    def __init__(self, engine: WarpEngine, parts: Sequence[Part], generators: Sequence[torch.Generator]) -> None:
        self._engine, self._parts, self._generators = engine, list(parts), list(generators)
        self._pieces: list[Callable[[], None]] = []
        self._kept: list[Any] = []  # graphs and streams live as long as the program
        self.mode: Literal["none", "graph", "split", "eager"] = "none"
        self.reason = ""
        """Why this mode, in words."""
        self.stumbled = False
        """Whether a capture failed on the way. Other programs that have these generators are then to be built again."""

    def build(self, wanted: Capture = "auto") -> None:
        """Choose the mode and capture. A mode that is named is insisted on; "auto" falls back and logs why.

        Raises ValueError for a mode that does not exist or that this device does not have, RuntimeError where the
        capture that was insisted on fails.
        """
        if wanted not in get_args(Capture):
            raise ValueError(f"capture is {wanted!r}; it is one of {', '.join(get_args(Capture))}.")
        cuda = self._engine.device.type == "cuda"
        if wanted == "graph" and not cuda:
            raise ValueError("capture='graph' needs a CUDA device: torch has no graphs on the CPU; use 'auto'.")
        if wanted != "eager":
            self._warm_up()
        why = "as asked"
        if wanted == "auto":
            why = "" if cuda else "torch has no graphs on the CPU"
            wanted = "graph" if cuda else "split"
            if cuda and (obstacle := _no_single_graph(self._engine)):
                wanted, why = "split", obstacle
                _log.warning("environment step in several graphs instead of one: %s", why)
            attempts: tuple[Capture, ...] = ("graph", "split") if wanted == "graph" else ("split",)
            for attempt in attempts:
                try:
                    self._capture(attempt)
                except Exception as e:  # whatever the driver, torch or warp object to: the next mode does without
                    self.stumbled = True
                    why = f"{attempt} capture failed: {type(e).__name__}: {e}"
                    _log.warning("environment step: %s", why)
                else:
                    self.reason = why or "the whole step is one CUDA graph"
                    _log.info("environment step captured as %s: %s", attempt, self.reason)
                    return
            wanted = "eager"
        self._capture(wanted)
        self.reason = why

    def run_eagerly(self) -> None:
        """Run all parts once without any graph, whatever the mode; to measure what capturing gains."""
        self._run_parts()

    def __call__(self) -> None:
        """Run all parts once."""
        if self.mode == "graph":
            self._pieces[0]()
            return
        with self._engine.scope():
            for piece in self._pieces:
                piece()

    def _warm_up(self) -> None:
        if self._engine.device.type != "cuda":
            self._run_parts(WARM_UP)
            return
        # a capture wants a stream of its own; warming up there lets the allocator find its memory
        device = self._engine.device
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._run_parts(WARM_UP)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        self._kept.append(stream)

    def _run_parts(self, times: int = 1) -> None:
        with self._engine.scope():
            for _ in range(times):
                for part in self._parts:
                    part.run()

    def _capture(self, mode: Capture) -> None:
        if mode == "graph":
            self._pieces = [self._one_graph()]
        elif mode == "split":
            self._pieces = self._several_graphs()
        else:
            self._pieces = [part.run for part in self._parts]
        self.mode = mode  # type: ignore[assignment]

    def _one_graph(self) -> Callable[[], None]:
        """Everything in a CUDA graph that torch opens and warp joins."""
        device = self._engine.device
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        joined = wp.stream_from_torch(stream)
        with wp.ScopedStream(joined), cuda_graphs.capture(device, self._generators, stream) as graph:
            # Where the solver loops, warp ends the capture and begins it again; CUDA gives it the same id, by which
            # torch's allocator knows it.
            wp.capture_begin(stream=joined, force_module_load=False, external=True)
            try:
                for part in self._parts:
                    part.run()
            finally:
                held = wp.capture_end(stream=joined)
        self._kept += [stream, joined, graph, held]
        return graph.replay

    def _several_graphs(self) -> list[Callable[[], None]]:
        """Each run of parts of one kind as one graph; torch's parts stay eager on the CPU."""
        pieces: list[Callable[[], None]] = []
        runs: list[list[Part]] = []
        for part in self._parts:
            if runs and runs[-1][0].kind == part.kind:
                runs[-1].append(part)
            else:
                runs.append([part])
        for run in runs:
            if run[0].kind == "warp":
                pieces.append(self._warp_piece(run))
            elif self._engine.device.type == "cuda":
                pieces.append(self._torch_piece(run))
            else:
                pieces += [part.run for part in run]
        return pieces

    def _warp_piece(self, run: list[Part]) -> Callable[[], None]:
        with contextlib.ExitStack() as on:
            stream = None  # on the CPU there are none
            if self._engine.device.type == "cuda":
                # one of its own: the default stream, on which resets run, cannot be captured
                own = torch.cuda.Stream(self._engine.device)  # type: ignore[no-untyped-call]
                stream = wp.stream_from_torch(own)
                on.enter_context(torch.cuda.stream(own))
                on.enter_context(wp.ScopedStream(stream))
                self._kept += [own, stream]
            else:
                on.enter_context(self._engine.scope())
            capture = on.enter_context(wp.ScopedCapture(stream=stream, force_module_load=False))
            for part in run:
                part.run()
        self._kept.append(capture)

        def launch() -> None:
            wp.capture_launch(capture.graph)

        return launch

    def _torch_piece(self, run: list[Part]) -> Callable[[], None]:
        device = self._engine.device
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with cuda_graphs.capture(device, self._generators, stream) as graph:
            for part in run:
                part.run()
        self._kept += [graph, stream]
        return graph.replay


def _no_single_graph(engine: WarpEngine) -> str:
    """What keeps warp from joining torch's capture here; empty if nothing is known to."""
    if not wp.is_conditional_graph_supported():
        return "the solver's loops need conditional graph nodes, which come with CUDA driver 12.4"
    if not wp.is_mempool_enabled(wp.get_device(str(engine.device))):
        return "the integrator allocates while it is captured, which needs warp's memory pool"
    return ""
