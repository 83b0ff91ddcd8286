"""Settings of the commands that read a run folder, `megamask inspect` and `megamask replay`, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class InspectConfig:
    """Report what a run folder contains, which checkpoints are intact, and what a resume would do.

    Changes nothing and takes no lock. The exit code is that of a resume that is refused, else 0.
    """

    run: Path
    """Folder of the run."""
    verify: bool = True
    """Read every byte and compare its hash; without it, compare sizes only."""
    json: bool = False
    """Print the report as JSON."""


@dataclass(frozen=True)
class ReplayConfig:
    """Repeat a step of a run and compare its metrics with the run's log, bit for bit.

    The replay starts in a temporary folder from the newest intact checkpoint before the metrics of the step; the run
    folder is only read. A difference means that a machine computed wrongly, or computes differently: metrics are the
    same only on the hardware, with the libraries and with the number of ranks of the run. For a run of several ranks,
    start as many on one node: `torchrun --nproc-per-node 8 -m megamask replay ...`. Time: the steps since that
    checkpoint. Disk: no checkpoint.

    Exit codes: 0 if all metrics are the same, 1 if one differs, else that of an error.
    """

    run: Path
    """Folder of the run."""
    step: int
    """Number of the step, from 1."""
    data: Path | tuple[Path, ...] | None = None
    """Folder of the shards, if they have moved."""
