"""Runs of a second each write hundreds of small files: without waiting for the disk, that is what they take."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests read back through the same kernel; the processes that the signal tests start do sync."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
