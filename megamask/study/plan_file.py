"""Read the plan of a study from a TOML file, and report everything that is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megamask.config.time_budget import parse_duration
from megamask.errors import ConfigError, must, raise_all, unknown
from megamask.errors.setting_rules import field_problem, settings_problems
from megamask.evaluation.settings import EvaluateConfig
from megamask.evaluation.tasks import TASKS
from megamask.storage.dotted import flatten
from megamask.storage.strict_json import BadRecord
from megamask.storage.strict_toml import read_toml
from megamask.study.plan import Axis, PlannedArm, PlannedEvaluation, StudyPlan

PLANS = Path(__file__).parent / "plans"
"""The plans that megamask ships."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+@,-]{0,99}")
"""Names become folders."""
OF_THE_STUDY = ("seed", "steps", "time_budget", "output", "data", "export", "teacher.path")
"""Settings that the study decides."""
OF_EVALUATE = ("model", "output", "data", "workers", "references", "list_tasks")
"""Settings of `megamask evaluate` that the study decides."""


def find_plan(name: str) -> StudyPlan:
    """The plan in the file ``name``, or the shipped one of that name. ConfigError with every problem of its form."""
    return read_plan(plan_path(name))


def plan_path(name: str) -> Path:
    """The file ``name``, or that of the shipped plan of that name; ConfigError for another name."""
    path = Path(name)
    if path.suffix != ".toml" and not path.is_file():
        shipped = shipped_plans()
        if name not in shipped:
            raise ConfigError(unknown(name, shipped, "the plans that megamask ships, and is not a file"))
        path = shipped[name]
    return path


def shipped_plans() -> dict[str, Path]:
    """The files of the shipped plans, by name."""
    return {path.stem: path for path in sorted(PLANS.glob("*.toml"))}


def read_plan(path: Path) -> StudyPlan:
    """The plan at ``path``. ConfigError with every unknown key, wrong type and rule that it breaks."""
    plan = unchecked_plan(path)
    raise_all(ConfigError, plan_problems(plan))
    return plan


def unchecked_plan(path: Path) -> StudyPlan:
    """The plan at ``path``, for `plan_problems`. ConfigError with every unknown key and wrong type."""
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
    return replace(plan, set=flatten(plan.set), arm=tuple(replace(arm, set=flatten(arm.set)) for arm in plan.arm))


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
    problems += [
        f"`axis` names the setting `{axis.setting}`, which the study decides for every run. Remove it."
        for axis in plan.axis
        if axis.setting in OF_THE_STUDY and axis.setting != "data"
    ]
    problems += [
        must("axis recipe: values", "be names of recipes", value)
        for axis in plan.axis
        if axis.setting == "recipe"
        for value in axis.values
        if not isinstance(value, str)
    ]
    return problems


def _evaluation_problems(plan: StudyPlan) -> list[str]:
    problems = []
    known = {name for name in flatten(dataclasses.asdict(EvaluateConfig()))} - set(OF_EVALUATE)
    for each in plan.evaluations:
        place = f"evaluation {each.name}"
        problems += [
            f"`{place}` names `{name}`, which the study decides for every run. Remove it."
            if name in OF_EVALUATE
            else unknown(name, known, f"`{place}`")
            for name in each.set
            if name not in known
        ]
        known_part = {name: value for name, value in each.set.items() if name in known}
        problems += [f"{place}: {line}" for line in _settings_problems(replace(each, set=known_part))]
    evaluated = [task for each in plan.evaluations for task in tasks_of(each)]
    problems += [
        must("mean_tasks", "name tasks of an evaluation, other than blimp", task)
        for task in plan.mean_tasks
        if task not in evaluated or task == "blimp"
    ]
    return problems


def tasks_of(evaluation: PlannedEvaluation) -> Sequence[str]:
    """The tasks that an evaluation names; all of them if it names none, or something other than a list of names."""
    tasks = evaluation.set.get("tasks")
    is_list = isinstance(tasks, list | tuple) and all(isinstance(task, str) for task in tasks)
    return tasks if tasks and is_list else tuple(TASKS)


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
