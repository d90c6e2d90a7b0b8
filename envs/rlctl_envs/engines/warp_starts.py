"""Starts that take simulation, made ahead of their use: one for each world."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rlctl_envs.engines.warp import WarpEngine
from rlctl_envs.engines.warp_graph import Capture, Part, Program
from rlctl_envs.tasks import Task

ROUNDS = 16
"""Draws for each world before it keeps the start it has. At least 0.73 of the suite's draws are free of contact: with
the worst of them one world in a thousand million keeps its start once."""
MAX_DRAWS = 1000
"""Draws before a reset gives up, as on the CPU."""
RUNAWAY = 1e10
"""A coordinate or velocity beyond this is a simulation that ran away; MuJoCo's own bound."""


class PreparedStarts:
    """The next start of every world: drawn, settled, free of contact, with all that its first observation reads.

    A graph has no room for that: settling takes hundreds of physics steps, redrawing an unknown number. So starts are
    made in the worlds themselves between two steps, once in `period` steps, and a restart copies rows. Each world then
    finds a start of its own that nobody has used, provided that episodes last `period` steps. A world that ends before
    its time, which in these tasks takes a divergence, may start from the same state twice. Either way every start has
    the task's own distribution.

    Nothing is read on the host but by `make_all`.

    Args:
        engine: made with `prepared`.
        task: says how starts settle and whether they must be clear.
        draw: gives start states [N, nq + nv] from the environment's random stream.
        period: steps of an episode.
        generators: of that stream.
    """

    def __init__(
        self,
        engine: WarpEngine,
        task: Task,
        draw: Callable[[], Tensor],
        period: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        self._engine, self._period = engine, period
        self._settle_steps, self._clear = task.settle_steps, task.clear_start
        n, size = engine.start.shape
        self._rows = torch.zeros(n, size, device=engine.device)
        self._warm = torch.zeros_like(engine.warm)
        self._missing = torch.ones(n, dtype=torch.bool, device=engine.device)
        self._lost = torch.zeros_like(engine.overflow)
        self.age = 0
        """Steps since starts were made."""
        put = Part("warp", engine.put_starts)
        look = Part("warp", engine.find_contacts if self._clear else lambda: None)
        self._begin = Program(engine, [Part("torch", lambda: self._all_to(draw())), put], generators)
        # one physics step is one graph, replayed: a graph of all of them would take long to build
        self._fall = Program(engine, [Part("warp", lambda: engine.advance(1))], [])
        self._end = Program(engine, [Part("warp", engine.read), look, Part("torch", self._choose)], [])
        self._finish = Program(
            engine,
            [
                Part("torch", lambda: self._all_to(self._rows)),
                put,
                Part("torch", self._warm_up),
                Part("warp", engine.forward),
                Part("torch", engine.keep_first),
            ],
            [],
        )

    def build(self, capture: Capture) -> None:
        """Capture. Runs everything, so the caller puts its state in order afterwards."""
        self._begin.build(capture)
        if self._settle_steps:
            self._fall.build(capture)
        self._end.build(capture)
        self._finish.build(capture)

    def draw_anew(self) -> None:
        """Capture the draw again, as it is: its generator has got a new state object."""
        mode = self._begin.mode
        self._begin.build("eager" if mode == "none" else mode)

    def make_all(self) -> None:
        """Make a start for every world, however many draws that takes; waits for the device.

        Raises RuntimeError after `MAX_DRAWS` draws.
        """
        with self._making():
            for _ in range(MAX_DRAWS):
                self._round()
                if not bool(self._missing.any()):
                    return
            world = int(self._missing.nonzero()[0])
            wanted = "without contact" if self._clear else "that stays finite"
            raise RuntimeError(f"no start {wanted} in {MAX_DRAWS} draws of environment {world}.")

    def make(self) -> None:
        """Make new starts; a world that gets none in `ROUNDS` draws keeps its own."""
        with self._making():
            for _ in range(ROUNDS if self._clear else 1):
                self._round()

    def tick(self) -> None:
        """Count a step of the environment; make new starts where it was the last of a period."""
        self.age += 1
        if self.age >= self._period:
            self.make()

    def state(self) -> dict[str, Tensor]:
        """The tensors that hold the starts: for checkpoints."""
        return {"start": self._rows} | {f"first.{name}": x for name, x in self._engine.first.items()}

    def put_back(self) -> None:
        """Take note that the tensors of `state` have been written."""
        self._engine.start.copy_(self._rows)

    @contextlib.contextmanager
    def _making(self) -> Iterator[None]:
        """Around rounds: lends the worlds, and hands over what has come of it."""
        engine = self._engine
        with engine.scope(), engine.borrowed():
            self._missing.fill_(True)
            self._lost.zero_()
            yield
            self._finish()  # what the first observations read
            self._lost.bitwise_or_(engine.overflow)
        engine.start.copy_(self._rows)
        engine.overflow.bitwise_or_(self._lost)  # where the next step will find it
        self.age = 0

    def _round(self) -> None:
        """Draw for every world; the missing ones take what is good."""
        self._begin()
        for _ in range(self._settle_steps):
            self._fall()
        self._lost.bitwise_or_(self._engine.overflow)
        self._end()

    def _all_to(self, starts: Tensor) -> None:
        """Have all worlds put into these states."""
        self._engine.mask.fill_(True)
        self._engine.start.copy_(starts)

    def _warm_up(self) -> None:
        """Let the solver begin where settling left it."""
        self._engine.warm.copy_(self._warm)

    def _choose(self) -> None:
        """Let the missing worlds take the states they are in, where those are good."""
        engine = self._engine
        good = self._missing & (engine.sim.state.abs() < RUNAWAY).all(-1)
        if self._clear:
            good &= ~engine.touching
        self._rows.copy_(torch.where(good[:, None], engine.sim.state, self._rows))
        self._warm.copy_(torch.where(good[:, None], engine.warm, self._warm))
        self._missing.logical_and_(~good)
