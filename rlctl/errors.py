"""What can go wrong in a way that a user or a job scheduler must tell apart. `exit_code` is the command's."""

from __future__ import annotations

from pathlib import Path


class RlctlError(Exception):
    """Base of the errors the command line prints as one line."""

    exit_code = 1


class UsageError(RlctlError, ValueError):
    """The request cannot be carried out as written: the message says what came, what is allowed, what to do."""

    exit_code = 2


class Diverged(RlctlError):
    """A loss or a parameter is no longer finite."""

    exit_code = 3


class Interrupted(RlctlError):
    """SIGINT or SIGTERM: a checkpoint is written, the run can be resumed."""

    exit_code = 75

    def __init__(self, folder: Path | None) -> None:
        super().__init__(
            "interrupted" if folder is None else f"interrupted; checkpoint written, go on with: rlctl resume {folder}"
        )


class DiskFull(RlctlError):
    """There is no room for what a run has to write. What it wrote before is whole."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"no space left on the disk of {folder}: free some, then go on with: rlctl resume {folder}")
