"""What a study has measured: the runs, the cells of their evaluation, and the plan's facts that a report needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megamask.evaluation.outcome import Cell, Mode

RunKey = tuple[str, int, str]
"""Arm, seed of the plan, budget."""
RunState = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class CurvePoint:
    """A validation of a run, under the uniform mask that all runs share."""

    step: int
    tokens: int
    flops: float
    seconds: float
    """Time of training."""
    loss: float
    """Nats per masked token."""
    accuracy: float


@dataclass(frozen=True)
class PretrainingRun:
    """One pretraining run of a study."""

    arm: str
    seed: int
    budget: str
    """As the plan names it, such as `tokens=1500000`."""
    state: RunState
    reason: str
    """Why it failed; empty otherwise."""
    steps: int
    tokens: int
    flops: Mapping[str, float]
    """FLOPs by part: `student` (forward and backward), `scoring` (passes that find entropies), `teacher`."""
    seconds: float
    peak_memory: int
    """Peak memory of the largest process, in bytes."""
    curve: tuple[CurvePoint, ...]
    masks: Mapping[str, float]
    """Means over the run of the mask metrics in its log: realised rate, share of each decile of frequency, ..."""
    settings: str
    """SHA-256 of the settings without the seed: equal for all seeds of an arm."""
    command: str
    """A command that repeats the run."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Versions, machine, commit, and the text: its hash, and how it was prepared."""

    @property
    def key(self) -> RunKey:
        """What identifies the run within its study."""
        return self.arm, self.seed, self.budget


@dataclass(frozen=True)
class Arm:
    """An arm as the report names it."""

    name: str
    title: str
    role: Literal["baseline", "method", "control", "check"]
    """check: an arm that tests the harness: other seeds of the baseline, or half of its steps."""
    changes: Mapping[str, str] = field(default_factory=dict)
    """Settings in which it differs from the baseline."""


@dataclass(frozen=True)
class StudyResults:
    """Everything that a report needs."""

    name: str
    question: str
    arms: tuple[Arm, ...]
    """The baseline is the first."""
    seeds: tuple[int, ...]
    budgets: tuple[str, ...]
    mean_tasks: tuple[str, ...]
    """The tasks of the second primary endpoint, the mean; the first is the macro average of BLiMP."""
    references: tuple[Cell, ...]
    """Cells without a pretrained model."""
    runs: tuple[PretrainingRun, ...]
    cells: Mapping[RunKey, tuple[Cell, ...]]
    mean_mode: Mode | None = None
    """How the tasks of the mean are evaluated; None: as in the first evaluation that covers them all."""
    mean_variant: str | None = None
    """Their variant, such as the pooling of frozen features; None or empty: that of the first such evaluation, and
    mean pooling."""
    notes: tuple[str, ...] = ()
    """What a reader must know to compare with public numbers."""
    plan_hash: str = ""
    """SHA-256 of the plan."""
