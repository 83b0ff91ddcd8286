"""Metrics of a run in Weights & Biases, beside TensorBoard; the only module that imports wandb.

A run that resumes continues its W&B run. W&B ignores metrics of a step that it has already, which a resumed run repeats
with the same values. ``WANDB_MODE=offline`` needs no network; `wandb sync` uploads the run later.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamask.storage import atomic_write


class WandbRun:
    """An open W&B run. Every method may raise what wandb raises, of any type."""

    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any], resumes: bool):
        """Open the W&B run of the run in ``folder``: the one it has if it ``resumes``, else a new one."""
        import wandb  # an extra

        record = folder / "logs" / "wandb_run_id"
        if not (resumes and record.is_file()):
            atomic_write.write_atomic(record, secrets.token_hex(8))
        self._run = wandb.init(
            project=project, id=record.read_text().strip(), name=folder.resolve().name, dir=str(folder),
            config=dict(settings), resume="allow", settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
        self.place = f"offline, in {folder / 'wandb'}" if self._run.offline else str(self._run.url)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics of ``step``."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload or save what is left."""
        self._run.finish()
