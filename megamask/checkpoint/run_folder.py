"""The paths of a run."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from megamask.errors import CheckpointError
from megamask.storage import atomic_write

STEP_NAME = re.compile(r"step-(0|[1-9]\d*)")


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run. ``launch`` names this launch; it is empty for a process that only reads."""

    path: Path
    launch: str = ""

    def __post_init__(self):
        object.__setattr__(self, "path", Path(self.path).absolute())

    config = property(lambda self: self.path / "config.json")
    environment = property(lambda self: self.path / "environment.json")
    text = property(lambda self: self.path / "text.json")
    lock = property(lambda self: self.path / "run.lock")
    logs = property(lambda self: self.path / "logs")
    tensorboard = property(lambda self: self.path / "tensorboard")
    checkpoints = property(lambda self: self.path / "checkpoints")
    latest = property(lambda self: self.path / "latest")
    export = property(lambda self: self.path / "export")

    def check(self) -> None:
        """CheckpointError if the folder holds no run."""
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a folder.")
        if not self.checkpoints.is_dir() and not self.config.exists():
            raise CheckpointError(f"{self.path} holds no run: neither {self.config.name} nor {self.checkpoints.name}/.")

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint at ``step``."""
        return self.checkpoints / f"step-{step}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint folder, valid or not, newest first."""
        if not self.checkpoints.is_dir():
            return []
        matches = (STEP_NAME.fullmatch(name) for name in os.listdir(self.checkpoints))
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def rename_unused(self, folder: Path, why: str) -> Path:
        """Rename a checkpoint that must not be used. Its data stays and its old name becomes free."""
        number = 0
        while (new_path := folder.with_name(f".{why}-{folder.name}-{self.launch}-{number}")).exists():
            number += 1
        atomic_write.rename(folder, new_path)
        atomic_write.sync(new_path.parent)
        return new_path
