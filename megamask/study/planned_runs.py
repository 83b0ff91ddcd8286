"""Every pretraining run of a plan, with its whole configuration and its command, checked before the first run starts.

Runs of one seed start from the same weights if their shapes are equal, and read the same text in the same packs. An arm
that breaks this rule is refused, unless it names the setting in `unpaired` or an axis varies it. Masking rates may
differ, also those of phases.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megamask.config import ineffective_settings, recipes
from megamask.config.checks import check_config, late_settings
from megamask.config.overrides import override_settings
from megamask.config.phase_flags import phase_word
from megamask.config.phases import reading_phases
from megamask.config.pretrain_config import PretrainConfig, as_dict, resolve_phases
from megamask.config.sizes_of_init import decided_by_init
from megamask.config.sources import data_folders, data_problems
from megamask.data.mixed_sources import joined_fingerprint, one_tokenizer_problems
from megamask.errors import ConfigError, DataError, MegamaskError, must, raise_all, unknown
from megamask.storage.dotted import flatten, is_under, names_in
from megamask.storage.old_setting_names import ADDED
from megamask.study.plan import PlannedArm, PlannedEvaluation, StudyPlan, amount_of
from megamask.study.planned_cost import MOST_STEPS, Texts, folders_of_words, planned_folders, steps_of_budget
from megamask.study.results import RunKey

PAIRED = ("packs", "phases", "mixture", "model", "init", "init_layers", "validation", "data")
"""Settings that must equal those of the baseline, so that runs of one seed are paired and curves comparable."""
REFERENCES = ("majority", "bag_of_words", "random_weights")
"""Scores without a pretrained encoder, as in `megamask evaluate --references`."""


@dataclass(frozen=True)
class PlannedRun:
    """One pretraining run, and the paths of its results."""

    arm: PlannedArm
    budget: str
    seed: int
    """The seed in the plan; the run's own seed is larger by `seed_offset` of the arm."""
    config: PretrainConfig
    values: tuple[tuple[str, Any], ...]
    """The settings that its command names, in order."""
    folder: Path
    """Folder of the study."""
    text: str
    """Fingerprint of the text."""
    deepspeed: str
    evaluations: tuple[PlannedEvaluation, ...]
    references: bool = False
    """Whether its evaluations compute the references too: the first run of the plan does."""

    @property
    def key(self) -> RunKey:
        """What identifies the run within its study."""
        return self.arm.name, self.seed, self.budget

    @property
    def teacher_key(self) -> RunKey | None:
        """The key of the run whose model is the teacher of this one; None without such a teacher."""
        return (self.arm.teacher, self.seed, self.budget) if self.arm.teacher else None

    @property
    def name(self) -> str:
        """ARM/BUDGET/seed-N."""
        return f"{self.arm.name}/{self.budget}/seed-{self.seed}"

    @property
    def run_folder(self) -> Path:
        """The output folder of `megamask pretrain`."""
        return self.folder / "runs" / self.name

    @property
    def record(self) -> Path:
        """The file that records which commands have ended."""
        return self.folder / "jobs" / f"{self.name}.json"

    def log(self, step: str) -> Path:
        """The file for the output of a command of this run."""
        return self.folder / "jobs" / self.name / f"{step}.log"

    def cells(self, evaluation: PlannedEvaluation) -> Path:
        """The output folder of `megamask evaluate`."""
        return self.folder / "cells" / self.name / evaluation.name

    def is_meant(self, patterns: Iterable[str]) -> bool:
        """Whether one of ``patterns`` names this run: ARM, ARM/seed-N, or the whole name."""
        short = f"{self.arm.name}/seed-{self.seed}"
        return any(pattern.removesuffix("/") in (self.arm.name, short, self.name) for pattern in patterns)

    @cached_property
    def settings(self) -> str:
        """SHA-256 of the text and the settings, without the seed and without paths.

        A setting that a later version adds does not change it, so earlier results still count.
        """
        values = flatten(as_dict(self.config))
        kept = {
            name: value
            for name, value in values.items()
            if not is_under(name, ("seed", "output", "data", "teacher.path"))
            and not (name in ADDED and ADDED[name] == value)
        }
        return hashlib.sha256(json.dumps([kept, self.deepspeed, self.text], sort_keys=True).encode()).hexdigest()

    def pretrain_arguments(self) -> list[str]:
        """The flags of `megamask pretrain`."""
        words = ["--recipe", self.arm.recipe]
        if self.deepspeed:
            words += ["--deepspeed", self.deepspeed]
        for name, value in self.values:
            words += as_flag(name, value)
        return words

    def evaluate_arguments(self, evaluation: PlannedEvaluation, tasks_data: str) -> list[str]:
        """The flags of `megamask evaluate`."""
        words = ["--model", str(self.run_folder), "--output", str(self.cells(evaluation))]
        words += as_flag("references", REFERENCES if self.references else ())
        if tasks_data:
            words += ["--data", tasks_data]
        for name, value in evaluation.set.items():
            words += as_flag(name, value)
        return words


def as_flag(name: str, value: Any) -> list[str]:
    """The words of a command line that give the setting ``name`` its ``value``."""
    if isinstance(value, bool):
        section, _, last = name.rpartition(".")
        return [f"--{name}" if value else f"--{section}{'.' if section else ''}no-{last}"]
    if isinstance(value, (list, tuple)):
        return [f"--{name}", *(phase_word(each) if isinstance(each, Mapping) else str(each) for each in value)]
    return [f"--{name}", str(value)]


def plan_runs(plan: StudyPlan, folder: Path, text: Path | Sequence[str]) -> list[PlannedRun]:
    """Every run of the plan in the order of execution: seed by seed, so that a stop leaves whole pairs.

    Raises ConfigError or DataError with every problem of the arms, budgets and texts.
    """
    shards, causes = Texts(), dict[str, dict[str, None]]()
    firsts: dict[tuple[str, str], PlannedRun] = {}
    deepspeed = Path(plan.deepspeed) if plan.deepspeed else None
    for budget in plan.budgets:
        for arm in plan.arms:
            try:
                run = _plan_run(plan, arm, budget, folder, text, shards)
                check_config(run.config, deepspeed, world=1)
            except MegamaskError as error:
                for problem in error.problems:
                    causes.setdefault(problem, {})[arm.name] = None
            else:
                firsts[arm.name, budget] = run
    baseline = plan.arm[0].name
    for (name, budget), run in firsts.items():
        if (baseline, budget) in firsts and name != baseline:
            for problem in pairing_problems(run, firsts[baseline, budget]):
                causes.setdefault(problem, {})[name] = None
        for problem in _equal_runs(run, firsts.values()):
            causes.setdefault(problem, {})[name] = None
    known = names_in(as_dict(PretrainConfig()))
    for arm in plan.arm:
        for name in arm.unpaired:
            if name not in known:
                causes.setdefault(unknown(name, known, "`unpaired`"), {})[arm.name] = None
    raise_all(ConfigError, [f"{_of_arms(list(arms), plan)}: {problem}" for problem, arms in causes.items()])
    runs = [
        _with_seed(firsts[arm.name, budget], seed)
        for seed in plan.seeds
        for budget in plan.budgets
        for arm in plan.arms
    ]
    return [replace(runs[0], references=True), *runs[1:]]


def pairing_problems(run: PlannedRun, baseline: PlannedRun) -> list[str]:
    """Sentences for settings that break the pairing of a run with that of the baseline."""
    of_run, of_baseline = (flatten(as_dict(each.config)) for each in (run, baseline))
    allowed = (*run.arm.unpaired, *baseline.arm.unpaired)
    if reading_phases(run.config) == reading_phases(baseline.config):
        allowed += ("phases",)
    return [
        f"`{name}` is {of_run.get(name)!r}, but {of_baseline.get(name)!r} for the baseline {baseline.arm.name}, so "
        "their runs are not paired. Make them equal, or name it in `unpaired`."
        for name in sorted(of_run.keys() | of_baseline.keys())
        if is_under(name, PAIRED) and not is_under(name, allowed) and of_run.get(name) != of_baseline.get(name)
    ]


def _equal_runs(run: PlannedRun, runs: Iterable[PlannedRun]) -> Iterable[str]:
    """A sentence if an arm before that of ``run`` has equal runs, so that nothing would be compared."""
    if run.arm.role == "check":
        return
    for other in runs:
        if other is run:
            return
        if (other.settings, other.budget, other.arm.seed_offset, other.arm.teacher) == (
            run.settings,
            run.budget,
            run.arm.seed_offset,
            run.arm.teacher,
        ):
            yield (
                f"its settings and seeds are those of the arm {other.arm.name}, so their runs would be equal. Change a "
                "setting, remove the arm or the value of an axis, or give it the role 'check' to repeat the runs."
            )
            return


def _of_arms(names: Sequence[str], plan: StudyPlan) -> str:
    """The arms that a problem concerns, as the beginning of its sentence."""
    if len(names) == 1:
        return f"arm {names[0]}"
    return f"all {len(names)} arms" if len(names) == len(plan.arms) else f"arms {', '.join(names)}"


def select_runs(runs: Sequence[PlannedRun], only: Sequence[str]) -> list[PlannedRun]:
    """The runs that ``only`` names, or all. ConfigError for a pattern that names none."""
    numbers = {str(number) for number in range(len(runs))}
    problems = []
    for pattern in only:
        if pattern not in numbers and not any(run.is_meant([pattern]) for run in runs):
            names = [run.name for run in runs] + [run.arm.name for run in runs]
            rule = f"name an arm, ARM/seed-N, ARM/BUDGET/seed-N or a number below {len(runs)}"
            problems.append(must("only", rule, pattern, "" if pattern.isdecimal() else unknown(pattern, names)))
    raise_all(ConfigError, problems)
    return [run for number, run in enumerate(runs) if not only or str(number) in only or run.is_meant(only)]


def _plan_run(
    plan: StudyPlan, arm: PlannedArm, budget: str, folder: Path, text: Path | Sequence[str], texts: Texts
) -> PlannedRun:
    own = {**plan.set, **arm.set}
    folders = planned_folders(own.pop("data", text))
    if not folders:
        raise ConfigError("`text` is missing in the plan. Name folders of token shards there, or with --data.")
    if any(is_under(name, ["mixture"]) for name in own):  # they override shares in `data`
        folders = [str(folder) for folder in folders_of_words(folders)]
    values: dict[str, Any] = {"data": folders[0] if len(folders) == 1 else folders, "export": False, **own}
    if arm.teacher:
        values["teacher.path"] = str(folder / "runs" / arm.teacher)
    config, typed = _resolve(arm, values), dict(values)
    raise_all(ConfigError, data_problems(config.data, config.mixture))
    shards = [texts.open(each) for each in data_folders(config.data)]
    raise_all(DataError, one_tokenizer_problems(shards))
    kind, amount = amount_of(budget)
    amount *= arm.budget_share
    if kind == "time":
        typed |= {"steps": MOST_STEPS, "time_budget": f"{amount:g}s"}
    else:
        typed["steps"] = steps_of_budget(config, kind, amount, texts)
    config = _resolve(arm, typed)
    return PlannedRun(
        arm,
        budget,
        -1,
        config,
        tuple(typed.items()),
        folder,
        joined_fingerprint(shards),
        plan.deepspeed,
        plan.evaluations,
    )


def _with_seed(run: PlannedRun, seed: int) -> PlannedRun:
    run = replace(run, seed=seed)
    more: dict[str, Any] = {"seed": seed + run.arm.seed_offset, "output": str(run.run_folder)}
    config = replace(run.config, seed=more["seed"], output=run.run_folder)
    if run.arm.teacher:
        more["teacher.path"] = str(run.folder / "runs" / run.arm.teacher / run.budget / f"seed-{seed}")
        config = replace(config, teacher=replace(config.teacher, path=more["teacher.path"]))
    return replace(run, config=config, values=tuple(dict(run.values, **more).items()))


def _resolve(arm: PlannedArm, values: Mapping[str, Any]) -> PretrainConfig:
    """The configuration that the command line of a run gives; ConfigError as `megamask pretrain` raises it."""
    try:
        recipe = recipes.find_recipe(arm.recipe)
    except ConfigError as error:
        try:  # the names of settings are the same in all recipes
            override_settings(PretrainConfig(), _nested(values), "the plan")
        except ConfigError as more:
            raise ConfigError(*error.problems, *more.problems) from None
        raise
    config = override_settings(recipe, _nested(values), "the plan")
    config, _ = ineffective_settings.leave_out(config, set(values), arm.recipe)
    without_effect = late_settings(config) | decided_by_init(config)
    raise_all(ConfigError, [sentence for name, sentence in without_effect.items() if name in values])
    return resolve_phases(config)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"model.depth": 2} -> {"model": {"depth": 2}}."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        inside = tree
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[last] = value
    return tree
