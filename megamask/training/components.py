"""The objects of a run, as plain records."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property

from megamask.batch import PackedBatch
from megamask.checkpoint.run_folder import RunFolder
from megamask.config.phases import RunPhases, run_phases
from megamask.config.pretrain_config import PretrainConfig
from megamask.data.loader import Loader
from megamask.engine.engine import Engine
from megamask.health.stragglers import StragglerDetector
from megamask.metrics.logger import MetricsLogger
from megamask.model.shape import EncoderShape
from megamask.teacher.teacher import Teacher
from megamask.training.flop_counter import FlopCounter
from megamask.training.plateau import PlateauAlarm
from megamask.training.progress import Progress
from megamask.training.run_text import RunText
from megamask.training.step import Trainer


@dataclass(frozen=True)
class RunComponents:
    """Everything that the training loop uses."""

    config: PretrainConfig
    text: RunText
    shape: EncoderShape
    folder: RunFolder
    engine: Engine
    trainer: Trainer
    teacher: Teacher | None
    progress: Progress
    stragglers: StragglerDetector
    log: MetricsLogger
    plateau: PlateauAlarm
    flops: FlopCounter
    loader: Loader
    batches: Generator[PackedBatch, None, None]
    """This rank's packs, from the next step on."""

    @cached_property
    def phases(self) -> RunPhases:
        """The phases of the run."""
        return run_phases(self.config)
