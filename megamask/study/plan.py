"""The plan of a study: arms, paired seeds, budgets, evaluations and axes. `plan_file.py` reads and checks it.

`plans/first.toml` is an example. A budget is `tokens=N`, `flops=N` or a time such as `time=30m`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict

from megamask.config.time_budget import parse_duration
from megamask.storage.dotted import flatten

EVALUATION = "evaluation."
"""The prefix of an axis over a setting of the evaluation."""
FORBID = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class PlannedArm:
    """One way to train."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    name: str
    recipe: str
    """As in `megamask pretrain --recipe`."""
    title: str = ""
    """Its name in the report; empty: ``name``."""
    role: Literal["baseline", "method", "control", "check"] = "method"
    set: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the recipe, by the names of the flags of `megamask pretrain`."""
    seed_offset: Annotated[int, Ge(0)] = 0
    """Added to each seed: an arm that repeats the baseline with other seeds must show no difference."""
    budget_share: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of each budget: an arm with half of the steps must be worse."""
    teacher: str = ""
    """The arm whose run, of the same seed and budget, is the teacher."""
    unpaired: tuple[str, ...] = ()
    """Settings that may differ from the baseline, although the initial weights or the text then differ too."""


@dataclass(frozen=True)
class Axis:
    """One more arm for each value of a setting."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    setting: str
    """`recipe`, `data` (folders of shards, or lists of folders of a mixture), a setting of `megamask pretrain`, or
    `evaluation.` and a setting of `megamask evaluate`, which repeats the evaluations instead."""
    values: tuple[Any, ...]
    arms: tuple[str, ...] = ()
    """The arms that it varies; empty: the baseline."""


@dataclass(frozen=True)
class PlannedEvaluation:
    """A call of `megamask evaluate` for each run."""

    name: str
    set: Mapping[str, Any]
    """Its settings that differ from the defaults, by their names."""


@dataclass(frozen=True)
class StudyPlan:
    """Everything that is fixed before the first run."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    name: str
    question: str
    seeds: tuple[int, ...]
    """Seeds of pretraining. Runs of one seed are paired: they start from the same weights if their shapes are equal,
    and read the same text in the same order."""
    budgets: tuple[str, ...]
    """`tokens=N`, padding included; `flops=N`, with scoring and teacher passes; or `time=90m`."""
    arm: tuple[PlannedArm, ...]
    """The first is the baseline."""
    evaluation: tuple[dict[str, Any], ...] = ()
    """`name`, and settings of `megamask evaluate`."""
    axis: tuple[Axis, ...] = ()
    text: str | tuple[str, ...] = ""
    """Folder of token shards, or folders of a mixture (perhaps FOLDER=SHARE); `--data` overrides it."""
    tasks_data: str = ""
    """Folder of the evaluation tasks; `--tasks-data` overrides it."""
    deepspeed: str = "zero1"
    """As in `megamask pretrain --deepspeed`; empty: no file, and fp32."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of all arms."""
    mean_tasks: tuple[str, ...] = ()
    """The tasks of the second primary endpoint, fixed in advance; the first is the macro average of BLiMP."""
    mean_mode: Literal["fine_tuned", "frozen"] = "frozen"
    """How the tasks of the mean are evaluated; other cells are secondary."""
    mean_variant: Literal["", "first", "mean"] = ""
    """Their variant where there are several: the pooling of frozen features, `first` or `mean`."""
    score_sd: Annotated[float, Gt(0)] = 0.6
    """Assumed standard deviation of a score over seeds, in points, from which `--dry-run` computes the smallest effect
    that the seeds can show."""
    tokens_per_second: Annotated[float, Gt(0)] | None = None
    """Measured speed of the baseline in one job, to estimate the time; None: no estimate before the first run."""
    notes: tuple[str, ...] = ()
    """What a reader must know to compare with public numbers."""

    @property
    def arms(self) -> tuple[PlannedArm, ...]:
        """All arms, those of the axes included."""
        plain = {arm.name: arm for arm in self.arm}
        more = (
            _varied(plain[name], axis.setting, value)
            for axis in self.axis
            if not axis.setting.startswith(EVALUATION)
            for name in axis.arms or (self.arm[0].name,)
            if name in plain
            for value in axis.values
        )
        return (*self.arm, *more)

    @property
    def evaluations(self) -> tuple[PlannedEvaluation, ...]:
        """All evaluations, those of the axes included."""
        planned = [
            PlannedEvaluation(str(each.get("name", "")), {k: v for k, v in flatten(each).items() if k != "name"})
            for each in self.evaluation
        ]
        for axis in self.axis:
            if axis.setting.startswith(EVALUATION):
                setting = axis.setting.removeprefix(EVALUATION)
                planned += [
                    PlannedEvaluation(f"{each.name}@{_label(setting, value)}", {**each.set, setting: value})
                    for each in planned
                    for value in axis.values
                    if each.set.get(setting) != value
                ]
        return tuple(planned)


def amount_of(budget: str) -> tuple[str, float]:
    """The kind of a checked budget, and its tokens, FLOPs or seconds."""
    kind, _, amount = budget.partition("=")
    return kind, float((parse_duration(amount) or 0.0) if kind == "time" else float(amount))


def plan_record(plan: StudyPlan) -> dict[str, Any]:
    """The plan as JSON can hold it."""
    return json.loads(json.dumps(dataclasses.asdict(plan)))


def _varied(arm: PlannedArm, setting: str, value: Any) -> PlannedArm:
    label = _label(setting, value)
    title = f"{arm.title or arm.name}, {setting} {_folder_names(value) if setting == 'data' else value}"
    role = "control" if arm.role == "baseline" else arm.role
    arm = replace(arm, name=f"{arm.name}@{label}", title=title, role=role, unpaired=(*arm.unpaired, setting))
    return replace(arm, recipe=str(value)) if setting == "recipe" else replace(arm, set={**arm.set, setting: value})


def _label(setting: str, value: Any) -> str:
    """What distinguishes a value of an axis, as part of a name."""
    return f"{setting}={re.sub(r'[^A-Za-z0-9._+-]+', '-', _folder_names(value) if setting == 'data' else str(value))}"


def _folder_names(data: Any) -> str:
    return "+".join(Path(str(word)).name for word in (data if isinstance(data, list | tuple) else [data]))
