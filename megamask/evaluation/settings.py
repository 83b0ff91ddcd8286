"""The settings of `megamask evaluate`; without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megamask.errors.setting_rules import Count, Positive, Share

Pooling = Literal["first", "mean"]


@dataclass(frozen=True)
class FineTuningConfig:
    """One recipe for all tasks; the last weights are reported."""

    learning_rate: Positive | None = None
    """Peak; None: the best of `learning_rates` on a tenth of the training examples that is held out for this."""
    learning_rates: tuple[float, ...] = (3e-5, 5e-5, 1e-4, 2e-4)
    """What is tried if none is given, with a seed of its own."""
    batch_size: Count | None = None
    """None: 32, or 16 for a task with fewer than 4,000 training examples."""
    epochs: Count | None = None
    """None: 10 for a task with fewer than 10,000 training examples, else 3."""
    min_updates: Count = 600
    """Fewer updates than this are extended to it."""
    dropout: Share = 0.1
    """Before the classifier, and in the encoder where it has dropout."""
    weight_decay: Share = 0.01
    """Of AdamW."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate an encoder on benchmark tasks, offline."""

    model: str = ""
    """A run folder of megamask, one of its checkpoints, an exported model, or any encoder of transformers."""
    output: Path = Path("evaluation")
    """One JSON file for each cell of the table, and the table."""
    tasks: tuple[str, ...] = ()
    """Names of tasks; none: all whose files are in `data`."""
    data: Path | None = None
    """The folder of the tasks: GLUE's own folders of .tsv files, or JSON lines. None: the `nyu-mll/glue` data set, if
    the network or the cache has it."""
    frozen: bool = False
    """Train a linear model on the features of the frozen encoder instead of fine-tuning all weights."""
    seeds: Count = 1
    """Fine-tuning runs of each task, with the seeds 1, 2, ..."""
    pooling: Pooling = "first"
    """The vector of a text: that of the first token, or the mean over its tokens."""
    max_length: Count = 128
    """Tokens of a text or a pair; longer ones are truncated and counted. Spans: 384, in overlapping windows."""
    max_train: Count | None = None
    """Training examples of each task at most, drawn once with a fixed seed; None: all."""
    max_pairs: Count | None = None
    """Minimal pairs of each paradigm at most; None: all."""
    workers: Count = 1
    """Cells that are computed side by side, each in a process of its own with an equal share of the cores."""
    fine_tuning: FineTuningConfig = field(default_factory=FineTuningConfig)
