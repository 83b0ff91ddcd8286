"""The configuration of a whole run, and which of its settings may change on resume.

Each section is a frozen dataclass in the `settings.py` of the package that uses it. `checks` finds the problems of a
configuration, `overrides` reads settings from files. Nothing here builds objects.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt

from megamask.config.phase_flags import Phase
from megamask.config.settings import CheckpointConfig, LogConfig, MixtureConfig, PacksConfig, ValidationConfig
from megamask.config.sources import split_shares
from megamask.engine.settings import OptimizerConfig
from megamask.entropy.settings import EntropyConfig
from megamask.errors import ConfigError, must, raise_all, unknown
from megamask.errors.setting_rules import Count, OnlyFor
from megamask.health.settings import SpikesConfig, WatchdogConfig
from megamask.masking.settings import MaskingConfig
from megamask.model.shape import ModelConfig
from megamask.objectives.settings import ObjectiveConfig
from megamask.storage.dotted import flatten, is_under, names_in
from megamask.storage.old_setting_names import renamed_problems
from megamask.teacher.settings import DistillConfig, TeacherConfig

MAY_DIFFER_ON_RESUME = frozenset(
    {"data", "verify", "output", "init", "log", "watchdog", "checkpoint", "validation", "export", "recipe", "deepspeed"}
    | {"spikes", "teacher.path", "teacher.deepspeed", "teacher.packs_per_pass", "teacher.precision"}
)
"""Settings that may change on resume. None of them affects training, except that DeepSpeed files change rounding, and
that a run may continue with another spike policy. Data and teacher are identified by hash instead of path."""
CHANGEABLE = frozenset(
    {"steps", "time_budget", "phases", "mixture", "masking.ratio", "masking.random_share"}
    | {"distill.weight", "distill.temperature"}
    | {
        f"optimizer.{part}"
        for part in ("lr", "muon_lr_scale", "beta1", "beta2", "eps", "weight_decay", "max_grad_norm")
    }
)
"""Settings that `--change` may change on resume: the size of updates, masks, and how often each source of a mixture is
read, but not the sources or the shape of the weights."""
RECORDED = frozenset({"deepspeed", "text"})
"""What config.json of a run records beside its settings: the content of its DeepSpeed file, the hash of its text."""


@dataclass(frozen=True)
class PretrainConfig:
    """A whole pretraining run."""

    data: Path | tuple[Path, ...] | None = None
    """Folder of token shards, as `megamask prepare` writes it. None: English text found on this machine. Several
    folders with one tokenizer are a mixture: with shares, such as shards/wiki=0.7 shards/books=0.3, or without, by size
    (`mixture.alpha`)."""
    verify: bool = True
    """Verify the sha256 of every shard before the run starts. This reads each shard once."""
    output: Path = Path("runs/tiny")
    """Folder of the run: configuration, logs, checkpoints, exported model."""
    steps: Count = 400
    """Optimizer steps of the whole run; with `time_budget`, an upper bound."""
    time_budget: str | None = None
    """Time of training, such as 90m or 24h (s, m, h, d). Every schedule follows the share of the time that is used, or
    of the steps that are done, whichever is larger, and the run ends when either is used up. Restarts continue the same
    budget, and time in a queue does not count. The run depends on a clock, so it cannot be repeated bit for bit."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 1
    """Seed of the initial weights, the order of the text, the masks and dropout."""
    init: Path | None = None
    """Folder of initial weights, as `megamask import` writes it, or of a run, whose newest checkpoint is used. It also
    decides the preset and the size of the encoder. None: random weights."""
    init_layers: Annotated[tuple[int, ...] | None, OnlyFor("init")] = None
    """Layers of `init` to start from, counted from 0, such as 0 2 4 6 8 10 for half of a teacher's layers (as in
    DistilBERT). None: all."""
    export: bool = True
    """Whether to export the finished model for transformers to OUTPUT/export."""
    phases: tuple[Phase, ...] = ()
    """The first parts of the run, each with its own longest sequence, packs per step, masking rate or shares, such as
    until=0.9,length=128 (names: until or steps, length, per_step, mask_ratio, shares, alpha). After them, the other
    settings apply."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    packs: PacksConfig = field(default_factory=PacksConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)


def changeable(config: PretrainConfig) -> dict[str, object]:
    """The settings that a launch may change on purpose, by their full names."""
    return {name: value for name, value in flatten(as_dict(config)).items() if _may_change(name)}


def _may_change(name: str) -> bool:
    return is_under(name, CHANGEABLE)


def check_change(config: PretrainConfig, names: Sequence[str]) -> None:
    """ConfigError for each of ``names``, settings or sections, that is unknown or may not change on resume."""
    known, problems = names_in(as_dict(config)), []
    for name in names:
        if name not in known:
            problems += renamed_problems([name]) or [unknown(name, filter(_may_change, known), "`change`")]
        elif not _may_change(name):
            rule = f"name settings that may change on resume ({', '.join(sorted(CHANGEABLE))})"
            problems.append(must("change", rule, name, "To change another one, start a new run with `init`."))
    raise_all(ConfigError, problems)


def resolve_phases(config: PretrainConfig) -> PretrainConfig:
    """``config`` with numbers where schedules turn at a phase of the learning rate, and with the shares in `data`."""
    rate, masking, distill = config.optimizer.lr, config.masking, config.distill
    masking = replace(masking, ratio=masking.ratio.resolved(rate), random_share=masking.random_share.resolved(rate))
    data, mixture = split_shares(config.data, config.mixture)
    distill = replace(distill, weight=distill.weight.resolved(rate))
    return replace(config, data=data, mixture=mixture, masking=masking, distill=distill)


def as_dict(config: PretrainConfig) -> dict[str, Any]:
    """The configuration as JSON can represent it; `override_settings` is the inverse. A phase has what it names."""
    tree = dataclasses.asdict(config)
    phases = [{name: value for name, value in phase.items() if value is not None} for phase in tree["phases"]]
    return json.loads(json.dumps(tree | {"phases": phases}, default=str))
