"""The plan of a study: arms, paired seeds, budgets, evaluations and axes, read from a TOML file and checked.

`plans/first.toml` is an example. A budget is `tokens=N`, `flops=N` or a time such as `time=30m`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict, TypeAdapter, ValidationError

from megamask.config.time_budget import parse_duration
from megamask.errors import ConfigError, must, raise_all, unknown
from megamask.errors.setting_rules import field_problem, settings_problems
from megamask.evaluation.settings import EvaluateConfig
from megamask.evaluation.tasks import TASKS
from megamask.storage.dotted import flatten
from megamask.storage.strict_json import BadRecord
from megamask.storage.strict_toml import read_toml

PLANS = Path(__file__).parent / "plans"
"""The plans that megamask ships."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+@,-]{0,99}")
"""Names become folders."""
OF_THE_STUDY = ("seed", "steps", "time_budget", "output", "data", "export", "teacher.path")
"""Settings that the study decides."""
OF_EVALUATE = ("model", "output", "data", "workers", "references", "list_tasks")
"""Settings of `megamask evaluate` that the study decides."""
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


def find_plan(name: str) -> StudyPlan:
    """The plan in the file ``name``, or the shipped one of that name. ConfigError with every problem of its form."""
    path = Path(name)
    if path.suffix != ".toml" and not path.is_file():
        shipped = shipped_plans()
        if name not in shipped:
            raise ConfigError(unknown(name, shipped, "the plans that megamask ships, and is not a file"))
        path = shipped[name]
    return read_plan(path)


def shipped_plans() -> dict[str, Path]:
    """The files of the shipped plans, by name."""
    return {path.stem: path for path in sorted(PLANS.glob("*.toml"))}


def read_plan(path: Path) -> StudyPlan:
    """The plan at ``path``. ConfigError with every unknown key, wrong type and rule that it breaks."""
    try:
        content = read_toml(path)
    except OSError as error:
        cure = f" For the plan that megamask ships, name `{path.stem}`." if path.stem in shipped_plans() else ""
        raise ConfigError(f"`{path}` cannot be read: {error.strerror}.{cure}") from None
    except BadRecord as error:
        raise ConfigError(f"`{path}` is not TOML: {error}.") from None
    try:
        plan = _schema().validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise ConfigError(*(_form_problem(each, str(path)) for each in error.errors(include_url=False))) from None
    plan = replace(plan, set=flatten(plan.set), arm=tuple(replace(arm, set=flatten(arm.set)) for arm in plan.arm))
    raise_all(ConfigError, plan_problems(plan))
    return plan


def plan_problems(plan: StudyPlan) -> list[str]:
    """Sentences for what is wrong with a plan before its recipes are looked at."""
    problems = _name_problems(plan) + _axis_problems(plan)
    if not plan.seeds or len(set(plan.seeds)) < len(plan.seeds) or min(plan.seeds) < 0 or max(plan.seeds) >= 2**62:
        problems.append(must("seeds", "name different whole numbers in [0, 2**62)", list(plan.seeds)))
    for budget in plan.budgets:
        kind, _, amount = budget.partition("=")
        if kind not in ("tokens", "flops", "time") or not (
            parse_duration(amount) if kind == "time" else _positive(amount)
        ):
            problems.append(must("budgets", "name tokens=N, flops=N or a time such as time=90m", budget))
    problems += [
        must("budgets", "name each budget once", budget) for budget, count in Counter(plan.budgets).items() if count > 1
    ]
    if not plan.budgets:
        problems.append(must("budgets", "name at least one budget", "empty"))
    for name, values in {"set": plan.set, **{f"arm {arm.name}: set": arm.set for arm in plan.arm}}.items():
        taken = sorted(set(values) & set(OF_THE_STUDY))
        problems += [f"`{name}` names `{each}`, which the study decides for every run. Remove it." for each in taken]
    for arm in plan.arm:
        if arm.seed_offset and (same := sorted({seed + arm.seed_offset for seed in plan.seeds} & set(plan.seeds))):
            rule = f"lead to other seeds than those of the plan, which have {', '.join(map(str, same))} too"
            problems.append(must(f"arm {arm.name}: seed_offset", rule, arm.seed_offset, "Use a larger one."))
        before = [other.name for other in plan.arm[: plan.arm.index(arm)]]
        if arm.teacher and arm.teacher not in before:
            problems.append(must(f"arm {arm.name}: teacher", "name an arm before it", arm.teacher))
    return problems + _evaluation_problems(plan)


def amount_of(budget: str) -> tuple[str, float]:
    """The kind of a checked budget, and its tokens, FLOPs or seconds."""
    kind, _, amount = budget.partition("=")
    return kind, float((parse_duration(amount) or 0.0) if kind == "time" else float(amount))


def plan_record(plan: StudyPlan) -> dict[str, Any]:
    """The plan as JSON can hold it."""
    return json.loads(json.dumps(dataclasses.asdict(plan)))


def _name_problems(plan: StudyPlan) -> list[str]:
    names = {"name": [plan.name], "arm": [arm.name for arm in plan.arms]}
    names["evaluation"] = [each.name for each in plan.evaluations]
    problems = [
        must(f"{kind}: name" if kind != "name" else kind, "be 1 to 100 letters, digits and . _ = + @ , -", name)
        for kind, values in names.items()
        for name in values
        if not NAME.fullmatch(name)
    ]
    for kind, values in names.items():
        twice = sorted(name for name, count in Counter(values).items() if count > 1)
        problems += [must(f"{kind}: name", "be different for each", name) for name in twice]
    if not plan.arm:
        return [*problems, must("arm", "name at least one arm", "empty")]
    roles = [arm.role for arm in plan.arm]
    if roles[0] != "baseline" or roles.count("baseline") > 1:
        problems.append(must("arm: role", "be 'baseline' for the first arm and for no other", ", ".join(roles)))
    return problems


def _axis_problems(plan: StudyPlan) -> list[str]:
    arms = [arm.name for arm in plan.arm]
    problems = [
        unknown(name, arms, f"`axis {axis.setting}: arms`")
        for axis in plan.axis
        for name in axis.arms
        if name not in arms
    ]
    problems += [
        must(f"axis {axis.setting}: values", "name at least one value", "empty")
        for axis in plan.axis
        if not axis.values
    ]
    return problems


def _evaluation_problems(plan: StudyPlan) -> list[str]:
    problems = []
    known = {name for name in flatten(dataclasses.asdict(EvaluateConfig()))} - set(OF_EVALUATE)
    for each in plan.evaluations:
        strange = [name for name in each.set if name not in known]
        problems += [unknown(name, known, f"`evaluation {each.name}`") for name in strange]
        problems += [] if strange else [f"evaluation {each.name}: {line}" for line in _settings_problems(each)]
        tasks = each.set.get("tasks", ())
        problems += [
            unknown(str(task), TASKS, f"`evaluation {each.name}: tasks`") for task in tasks if task not in TASKS
        ]
    evaluated = [task for each in plan.evaluations for task in each.set.get("tasks", TASKS)]
    problems += [
        must("mean_tasks", "name tasks of an evaluation, other than blimp", task)
        for task in plan.mean_tasks
        if task not in evaluated or task == "blimp"
    ]
    return problems


def _settings_problems(evaluation: PlannedEvaluation) -> list[str]:
    """What `megamask evaluate` would say about the settings of an evaluation."""
    settings: dict[str, Any] = {"model": "a run"}
    for name, value in evaluation.set.items():
        section, _, last = name.rpartition(".")
        (settings.setdefault(section, {}) if section else settings)[last] = value
    try:
        return settings_problems(_evaluate_schema().validate_json(json.dumps(settings), strict=True))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        return [field_problem(EvaluateConfig, each, ".".join(map(str, each["loc"]))) for each in problems]


def _varied(arm: PlannedArm, setting: str, value: Any) -> PlannedArm:
    label = _label(setting, value)
    title = f"{arm.title or arm.name}, {setting} {_folder_names(value) if setting == 'data' else value}"
    role = "control" if arm.role == "baseline" else arm.role
    arm = replace(arm, name=f"{arm.name}@{label}", title=title, role=role, unpaired=(*arm.unpaired, setting))
    return replace(arm, recipe=value) if setting == "recipe" else replace(arm, set={**arm.set, setting: value})


def _label(setting: str, value: Any) -> str:
    """What distinguishes a value of an axis, as part of a name."""
    return f"{setting}={re.sub(r'[^A-Za-z0-9._+-]+', '-', _folder_names(value) if setting == 'data' else str(value))}"


def _folder_names(data: Any) -> str:
    return "+".join(Path(str(word)).name for word in (data if isinstance(data, list | tuple) else [data]))


def _form_problem(error: Any, source: str) -> str:
    if error["type"] == "unexpected_keyword_argument":
        name = ".".join(map(str, error["loc"]))
        kind = {"arm": PlannedArm, "axis": Axis}.get(str(error["loc"][0]), StudyPlan)
        return unknown(name, [each.name for each in dataclasses.fields(kind)], f"`{source}`")  # type: ignore[arg-type]
    if error["type"] == "missing":
        return f"`{'.'.join(map(str, error['loc']))}` is missing in `{source}`."
    name = ".".join(map(str, error["loc"]))
    if error["msg"].startswith("Input should "):
        return must(f"{name}` in `{source}", error["msg"].removeprefix("Input should "), error["input"])
    return f"`{name}` in `{source}`: {error['msg']}, but is {error['input']!r}."


def _positive(amount: str) -> bool:
    try:
        return 0 < float(amount) < float("inf")
    except ValueError:
        return False


@cache
def _evaluate_schema() -> TypeAdapter:
    return TypeAdapter(EvaluateConfig)


@cache
def _schema() -> TypeAdapter:
    return TypeAdapter(StudyPlan)
