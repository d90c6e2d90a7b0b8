"""What is searched: `KEY=KIND:...` on a command line, `KEY: {KIND: [...]}` in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from rlctl.config import number
from rlctl.errors import UsageError

if TYPE_CHECKING:
    from optuna.trial import Trial

RANGES = ("float", "log", "int", "logint")
KINDS = (*RANGES, "choice")


@dataclass(frozen=True)
class Param:
    """A setting and the values it may take."""

    key: str
    """As in `--set`, e.g. lr, agent.hidden, run.threads."""
    kind: str
    """float, log (a float whose logarithm is uniform), int, logint, choice."""
    values: tuple[Any, ...]
    """(low, high), or the choices."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"{self.key}: no kind '{self.kind}', allowed are {', '.join(KINDS)}")
        if self.kind == "choice":
            if len(self.values) < 2:
                raise UsageError(f"{self.key}: a choice is among two values at least, got {list(self.values)}")
            return
        if len(self.values) != 2 or not all(_is_number(v) for v in self.values):
            raise UsageError(f"{self.key}: {self.kind} takes two numbers, LOW and HIGH, got {list(self.values)}")
        low, high = self.values
        if not low < high:
            raise UsageError(f"{self.key}: LOW must be below HIGH, got {low} and {high}")
        if self.kind.startswith("log") and low <= 0:
            raise UsageError(f"{self.key}: a logarithmic range lies above 0, got {low}")
        if self.kind.endswith("int") and not all(float(v).is_integer() for v in self.values):
            raise UsageError(f"{self.key}: {self.kind} takes whole numbers, got {low} and {high}")

    def suggest(self, trial: Trial) -> Any:
        """A value for this trial."""
        if self.kind == "choice":  # as text: Optuna takes no lists
            return json.loads(trial.suggest_categorical(self.key, [json.dumps(v) for v in self.values]))
        low, high = self.values
        log = self.kind.startswith("log")
        if self.kind.endswith("int"):
            return trial.suggest_int(self.key, int(low), int(high), log=log)
        return trial.suggest_float(self.key, low, high, log=log)

    def extremes(self) -> tuple[Any, ...]:
        """Values that show whether the setting exists and may be what it is asked to be."""
        return tuple(int(v) for v in self.values) if self.kind.endswith("int") else self.values

    def plain(self) -> dict[str, Any]:
        """As a file has it."""
        return {self.kind: list(self.values)}


def parse_param(text: str) -> Param:
    """`lr=log:1e-5:1e-2`, `epochs=int:3:20`, `hidden=choice:[[64, 64], [256, 256]]`; UsageError says what is wrong."""
    key, _, rest = text.partition("=")
    kind, _, values = rest.partition(":")
    if not key or not values:
        raise UsageError(
            f"--param takes KEY=KIND:LOW:HIGH or KEY=choice:[A, B, ...], e.g. lr=log:1e-5:1e-2; got '{text}'"
        )
    if kind == "choice":
        try:
            choices = yaml.safe_load(values)
        except yaml.YAMLError:
            choices = None
        if not isinstance(choices, list):
            raise UsageError(f"{key}: choices are a list such as [0.9, 0.99], got '{values}'")
        return Param(key, kind, tuple(number(c) for c in choices))
    return Param(key, kind, tuple(number(yaml.safe_load(v)) for v in values.split(":")))


def read_params(section: Any) -> tuple[Param, ...]:
    """The section `params` of a file: {lr: {log: [1e-5, 1e-2]}, hidden: {choice: [[64, 64], [256, 256]]}}."""
    if not isinstance(section, Mapping):
        raise UsageError(f"the section params is a mapping KEY: {{KIND: [LOW, HIGH]}}, got {section!r}")
    out = []
    for key, spec in section.items():
        if not isinstance(spec, Mapping) or len(spec) != 1:
            raise UsageError(f"params.{key} is one KIND: [...], e.g. {{log: [1.0e-5, 1.0e-2]}}, got {spec!r}")
        ((kind, values),) = spec.items()
        if not isinstance(values, list):
            raise UsageError(f"params.{key}.{kind} is a list, got {values!r}")
        out.append(Param(str(key), str(kind), tuple(number(v) for v in values)))
    return tuple(out)


def _is_number(v: Any) -> bool:
    return isinstance(v, int | float) and not isinstance(v, bool)
