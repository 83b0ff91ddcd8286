"""The work of an evaluation: which cells there are, the settings that decide each one, and how it is computed."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megamask.evaluation import references
from megamask.evaluation.formats.rows import limit_train
from megamask.evaluation.outcome import Cell, CellKey, Mode, Outcome
from megamask.evaluation.read_tasks import TaskFiles, read_task
from megamask.evaluation.scores import task_score
from megamask.evaluation.settings import EvaluateConfig, FineTuningConfig, Reference
from megamask.evaluation.tasks import Task, TaskData
from megamask.runtime.versions import installed_version

if TYPE_CHECKING:
    from megamask.evaluation.encoder import EncoderFolder

WITHOUT_MODEL = "reference"
"""The label of the cells that need no encoder."""
MODELS = "models"
"""The folder of exported and random models within the output folder."""


@dataclass(frozen=True)
class Job:
    """What is computed at once: the cells of one task, in one mode, with one seed."""

    files: TaskFiles
    mode: Mode
    seed: int
    method: Mode
    """The mode in which a reference with random weights is evaluated; else ``mode``."""
    reference: Reference | Literal[""] = ""
    """`majority`, `bag_of_words`, `random_weights`, or empty."""
    texts: tuple[TaskFiles, ...] = ()
    """Tasks in whose training examples words are counted."""

    @property
    def name(self) -> str:
        """The name in logs: the task, what is computed, the seed."""
        what = " ".join(filter(None, (self.reference, self.method if self.method != "reference" else "")))
        return f"{self.files.task.name}, {what}{f', seed {self.seed}' if self.seed else ''}".replace("_", " ")


def plan_jobs(tasks: Sequence[TaskFiles], texts: Sequence[TaskFiles], config: EvaluateConfig) -> list[Job]:
    """All jobs of an evaluation of ``tasks``; ``texts`` are the tasks that have training examples."""
    jobs = []
    for files in tasks:
        kind = files.task.kind
        method: Mode = "zero_shot" if kind == "minimal_pairs" else "frozen" if config.frozen else "fine_tuned"
        seeds = [config.first_seed + i for i in range(config.seeds)] if method == "fine_tuned" else [0]
        if config.model:
            jobs += [Job(files, method, seed, method) for seed in seeds]
        if "majority" in config.references and kind in ("classification", "regression"):
            jobs.append(Job(files, "reference", 0, "reference", "majority"))
        counted = tuple(texts) if kind == "minimal_pairs" else ()
        if "bag_of_words" in config.references and (kind in ("classification", "regression") or counted):
            jobs.append(Job(files, "reference", 0, "reference", "bag_of_words", counted))
        if "random_weights" in config.references:
            jobs += [Job(files, "reference", seed or 1, method, "random_weights") for seed in seeds]
    return jobs


def job_keys(job: Job, label: str, config: EvaluateConfig) -> tuple[CellKey, ...]:
    """The cells that ``job`` may have; the first one is always there when the job is done."""
    model = WITHOUT_MODEL if job.method == "reference" else label
    prefix = ("random_weights", job.method) if job.reference == "random_weights" else ()
    variants = ("_".join(filter(None, (*prefix, variant))) for variant in _variants(job, config))
    return tuple(CellKey(model, job.files.task.name, job.mode, job.seed, variant) for variant in variants)


def cell_settings(task: Task, key: CellKey, config: EvaluateConfig) -> dict[str, Any]:
    """The settings of ``config`` that decide the result of the cell ``key``."""
    limits: dict[str, Any] = {"max_train": config.max_train}
    method = key.mode if key.mode != "reference" else key.variant
    if task.kind == "minimal_pairs":
        return {"max_pairs": config.max_pairs}
    if method == "majority":
        return limits
    if method == "bag_of_words":
        return limits | {"strengths": references.STRENGTHS}
    limits["max_length"] = config.max_length
    if "fine_tuned" in method:
        return limits | {"pooling": config.pooling, **asdict(config.fine_tuning)}
    return limits


@cache
def read_task_once(files: TaskFiles) -> TaskData:
    """The examples of a task, kept for the next job of the same task."""
    return read_task(files)


def compute_outcomes(job: Job, encoder: EncoderFolder | None, config: EvaluateConfig) -> dict[CellKey, Outcome]:
    """The outcome of each cell of ``job``."""
    data = limit_train(read_task_once(job.files), config.max_train)
    keys = job_keys(job, encoder.label if encoder else "", config)
    if job.method == "reference":
        return {keys[0]: _reference(job, data, config)}
    assert encoder is not None
    if job.reference == "random_weights":
        from megamask.evaluation.encoder import with_random_weights

        encoder = with_random_weights(encoder, config.output / MODELS, job.seed)
    outcomes = _encoder_outcomes(job.method, encoder, data, config, job.seed)
    named = zip(keys, _variants(job, config), strict=True)
    return {key: outcomes[variant] for key, variant in named if variant in outcomes}


def build_cell(
    key: CellKey, outcome: Outcome, job: Job, encoder: EncoderFolder | None, config: EvaluateConfig, seconds: float
) -> Cell:
    """The record of a computed cell."""
    data = limit_train(read_task_once(job.files), config.max_train)
    labels = (
        data.test.labels if data.task.kind in ("classification", "regression") else np.ones(len(outcome.predictions))
    )
    return Cell(
        key,
        "collapsed" if outcome.collapsed else "ok",
        outcome.collapsed,
        task_score(outcome.scores),
        dict(outcome.scores),
        tuple(float(value) for value in outcome.predictions),
        tuple(float(value) for value in labels),
        {name: float(value) for name, value in (dict(data.counts) | dict(outcome.metrics)).items()},
        cell_settings(data.task, key, config),
        dict(data.files),
        encoder.weights if encoder and job.method != "reference" else "",
        library_versions(),
        command_of(job, config),
        seconds,
        data.layout,
    )


def failed_cell(
    key: CellKey, reason: str, job: Job, encoder: EncoderFolder | None, config: EvaluateConfig, seconds: float
) -> Cell:
    """The record of a cell that could not be computed, and why."""
    settings = cell_settings(job.files.task, key, config)
    weights = encoder.weights if encoder and job.method != "reference" else ""
    versions, command = library_versions(), command_of(job, config)
    return Cell(key, "failed", reason, None, {}, (), (), {}, settings, {}, weights, versions, command, seconds)


def library_versions() -> dict[str, str]:
    """The versions that may change a result."""
    names = ("megamask", "torch", "transformers", "tokenizers", "scikit-learn", "scipy", "numpy")
    return {"python": platform.python_version()} | {name: installed_version(name) or "absent" for name in names}


def command_of(job: Job, config: EvaluateConfig) -> str:
    """A command that computes the cells of ``job``, and those references of ``config`` that belong to them."""
    shown = (job.reference,) if job.reference else ()
    one = replace(config, tasks=(job.files.task.name,), references=shown, workers=1, seeds=1, first_seed=1)
    if job.method == "fine_tuned":
        one = replace(one, first_seed=job.seed)
    if job.method == "reference":
        one = replace(one, model="", frozen=False, fine_tuning=FineTuningConfig(), pooling="first")
    if job.files.task.kind == "minimal_pairs":
        one = replace(
            one, frozen=False, max_length=128, max_train=None, pooling="first", fine_tuning=FineTuningConfig()
        )
    else:
        one = replace(one, max_pairs=None)
    return shlex.join(["megamask", "evaluate", *_flags(one)])


def _flags(settings: Any, prefix: str = "") -> list[str]:
    """The flags that differ from the defaults of a dataclass of settings."""
    words = []
    default = type(settings)()
    for name in (each.name for each in fields(settings)):
        value = getattr(settings, name)
        flag = f"--{prefix}{name}".replace("_", "-")
        if name == "fine_tuning":
            words += _flags(value, f"{name}.")
        elif value != getattr(default, name):
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            words += [flag, *map(str, values)]
    return words


def _variants(job: Job, config: EvaluateConfig) -> tuple[str, ...]:
    """The names of the outcomes of the method."""
    if job.method == "reference":
        return (job.reference,)
    if job.method == "zero_shot":
        return ("original", "within_word")
    if job.files.task.kind == "spans":
        return ("",)
    return ("first", "mean") if job.method == "frozen" else (config.pooling,)


def _reference(job: Job, data: TaskData, config: EvaluateConfig) -> Outcome:
    if job.reference == "majority":
        return references.majority_class(data)
    if data.task.kind != "minimal_pairs":
        return references.bag_of_words(data)
    texts = (text for files in job.texts for texts in read_task_once(files).train.texts for text in texts)
    return references.word_frequency(data, texts, config.max_pairs)


def _encoder_outcomes(
    method: Mode, encoder: EncoderFolder, data: TaskData, config: EvaluateConfig, seed: int
) -> Mapping[str, Outcome]:
    """The outcome of each variant. What needs torch is imported here."""
    if method == "zero_shot":
        from megamask.evaluation.minimal_pairs import score_pairs

        return score_pairs(encoder, data, config)
    if data.task.kind == "spans":
        from megamask.evaluation.question_answering import fine_tune_spans, frozen_spans

        return {
            "": frozen_spans(encoder, data, config) if config.frozen else fine_tune_spans(encoder, data, config, seed)
        }
    if method == "frozen":
        from megamask.evaluation.frozen_features import fit_frozen

        return fit_frozen(encoder, data, config)
    from megamask.evaluation.fine_tuning import fine_tune

    return {config.pooling: fine_tune(encoder, data, config, seed)}
