"""Estimate the time left of a study from the times of its finished commands."""

from __future__ import annotations

from collections.abc import Iterable

from tqdm import tqdm

from megamask.config.phases import run_tokens
from megamask.config.time_budget import parse_duration
from megamask.study.jobs import PRETRAIN, CommandRecord, read_record
from megamask.study.planned_runs import PlannedRun


def planned_tokens(run: PlannedRun) -> int:
    """Tokens of a run by its plan, padding included."""
    return run_tokens(run.config)


def seconds_left(runs: Iterable[PlannedRun], slots: int, seconds_per_token: float | None = None) -> float | None:
    """Seconds until all ``runs`` are finished, with ``slots`` of them at a time; None if nothing was timed yet.

    The time per token is that of the finished runs of the same arm, else the mean of all finished runs, else
    ``seconds_per_token``. An evaluation takes the mean time of the same evaluation of other runs; before one is
    finished it is left out.
    """
    runs = list(runs)
    records = [(run, read_record(run)) for run in runs]
    speeds: dict[str, list[float]] = {}
    evaluations: dict[str, list[float]] = {}
    for run, record in records:
        for step, done in record.items():
            if done.state == "finished" and step != PRETRAIN:
                evaluations.setdefault(step, []).append(done.seconds)
            elif done.state == "finished" and not run.config.time_budget:
                for name in (run.arm.name, ""):
                    speeds.setdefault(name, []).append(done.seconds / planned_tokens(run))
    total = 0.0
    for run, record in records:
        if not _is_finished(record, PRETRAIN):
            known = speeds.get(run.arm.name) or speeds.get("")
            rate = sum(known) / len(known) if known else seconds_per_token
            if run.config.time_budget:
                total += parse_duration(run.config.time_budget) or 0.0
            elif rate is None:
                return None
            else:
                total += rate * planned_tokens(run)
        for each in run.evaluations:
            times = evaluations.get(each.name)
            if times and not _is_finished(record, each.name):
                total += sum(times) / len(times)
    return total / slots


def describe_left(runs: Iterable[PlannedRun], slots: int) -> str:
    """The time left as words."""
    runs = list(runs)
    seconds = seconds_left(runs, slots)
    if seconds is None:
        return "time left unknown"
    return f"about {tqdm.format_interval(seconds)} left{untimed_part(runs)}"


def untimed_part(runs: Iterable[PlannedRun]) -> str:
    """The end of a sentence about `seconds_left`: whether it leaves evaluations of ``runs`` out."""
    runs = list(runs)
    names = {each.name for run in runs for each in run.evaluations}
    timed = {step for record in map(read_record, runs) for step in record if _is_finished(record, step)}
    return ", without evaluations that were not timed yet" if names - timed else ""


def _is_finished(record: dict[str, CommandRecord], step: str) -> bool:
    return step in record and record[step].state == "finished"
