"""From files and flags to typed, frozen config dataclasses; every mistake is one line that names the nearest key."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import itertools
import json
import textwrap
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from rlctl.errors import UsageError

C = TypeVar("C")


def build(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """`cls(**values)` with types checked and converted; `where` names the section in error messages."""
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UsageError(unknown_key(key, fields, where))
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as e:
        first = e.errors()[0]
        path = ".".join(str(p) for p in first["loc"])
        raise UsageError(f"{where}: {path}={first['input']!r} is not allowed: {first['msg'].lower()}") from e


def unknown_key(key: str, allowed: set[str], where: str) -> str:
    """The message for a key that `where` does not have."""
    close = get_close_matches(key, sorted(allowed), n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(sorted(allowed))}"
    return f"{where} has no key '{key}': {hint}"


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """`["lr=3e-4", "run.keep=5"]` to a nested dict; values are read as YAML (numbers, true/false, null, [64, 64])."""
    out: dict[str, Any] = {}
    for item in items:
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise UsageError(f"--set takes key=value, got '{item}'")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise UsageError(f"--set {key}: cannot read the value '{text}'") from e
        node = out
        *path, leaf = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UsageError(f"--set {key}: '{part}' is already set to a single value")
        node[leaf] = number(value)
    return out


def number(value: Any) -> Any:
    """YAML 1.1 reads `3e-4` as a string; everyone who writes it means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """`number` for every value of a nested mapping: what a file holds, as a command line would read it."""
    return {k: numbers(v) if isinstance(v, Mapping) else number(v) for k, v in values.items()}


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts, later layers win key by key."""
    out: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = out.get(key)
            out[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return out


def as_plain(cfg: Any) -> dict[str, Any]:
    """A config dataclass as JSON- and YAML-able values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(cfg)))
    return plain


def fingerprint(values: Mapping[str, Any]) -> str:
    """Eight hex digits of the resolved config (seed and paths left out by the caller): the grouping key of runs."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def field_docs(cls: type[Any]) -> dict[str, str]:
    """The string that follows each field of a dataclass, base classes included: the field's meaning."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # defined in a session without a source file
            continue
        assert isinstance(tree.body[0], ast.ClassDef)
        body = tree.body[0].body
        for field, text in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                docs[field.target.id] = " ".join(text.value.value.split())
    return docs
