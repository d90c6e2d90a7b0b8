"""Who computed this, with what: enough to tell two results apart a year later."""

from __future__ import annotations

import hashlib
import platform
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("rlctl", "torch", "numpy", "gymnasium", "mujoco", "dm_control", "minari", "safetensors")
PEERS = ("stable-baselines3", "sb3-contrib", "mujoco-warp", "warp-lang")
"""Libraries of baselines and of GPU simulation: recorded where they are installed."""


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that shape results (None: not installed)."""
    out: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*PACKAGES, *PEERS):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            if name in PACKAGES:
                out[name] = None
    return out


def git() -> dict[str, str | None]:
    """Commit of the source tree rlctl runs from, and a hash of its uncommitted changes (None: clean, or no git)."""
    here = Path(__file__).resolve().parent

    def ask(*args: str) -> str | None:
        try:
            out = subprocess.run(
                ["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return out.stdout

    top = ask("rev-parse", "--show-toplevel")
    # an installed package may lie inside somebody else's repository: that commit says nothing about us
    if top is None or here.parent != Path(top.strip()):
        return {"commit": None, "dirty": None}
    commit, diff = ask("rev-parse", "HEAD"), ask("diff", "HEAD")
    return {
        "commit": commit.strip() if commit else None,
        "dirty": hashlib.sha256(diff.encode()).hexdigest()[:12] if diff else None,
    }


def cpu_model() -> str:
    """The processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_vendor() -> str:
    """`AuthenticAMD`, `GenuineIntel`, ... as the processor names itself; empty where the system does not say."""
    return _cpuinfo("vendor_id")


def machine() -> dict[str, Any]:
    """Host, operating system, processor, cores, memory, GPU."""
    return {
        "host": socket.gethostname(),
        "os": platform.platform(),
        "cpu": cpu_model(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def command() -> list[str]:
    """The command line of this process."""
    name = Path(sys.argv[0]).name  # __main__.py: started as `python -m rlctl`
    return ["rlctl" if name == "__main__.py" else name, *sys.argv[1:]]


def provenance() -> dict[str, Any]:
    """All of the above."""
    return {
        "command": command(),
        "git": git(),
        "versions": versions(),
        "machine": machine(),
    }
