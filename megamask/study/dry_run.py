"""Predict the cost of a study, and the smallest effect that it can show, before it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from tqdm import tqdm

from megamask.config.pretrain_config import PretrainConfig
from megamask.config.sources import data_folders
from megamask.model.shape import EncoderShape
from megamask.study.plan import StudyPlan
from megamask.study.planned_cost import Texts, mean_step_flops, pack_flops
from megamask.study.planned_runs import PlannedRun
from megamask.study.statistics import detectable_effect, expected_half_width, smallest_sign_flip_p
from megamask.study.time_left import planned_tokens, seconds_left, untimed_part

PARTS = ("student", "logits", "scoring", "teacher")


def describe_study(
    plan: StudyPlan, runs: Sequence[PlannedRun], chosen: Sequence[PlannedRun], left: Sequence[PlannedRun], slots: int
) -> str:
    """The runs of a plan, their cost, and the smallest effect that the seeds can show, as a text.

    ``chosen`` are the runs of this call, and ``left`` those of them that are not finished.
    """
    numbers = {run.name: number for number, run in enumerate(runs)}
    lines = [f"{plan.name}: {plan.question}", ""]
    lines += _cost_table(chosen, numbers)
    lines += ["", *_totals(plan, chosen, left, slots), "", *power_lines(len(plan.seeds), plan.score_sd)]
    return "\n".join(lines)


def _cost_table(chosen: Sequence[PlannedRun], numbers: dict[str, int]) -> list[str]:
    texts = Texts()
    rows = [("arm", "budget", "numbers", "steps", "tokens", *(f"{part} FLOPs" for part in PARTS), "of the baseline")]
    base: dict[str, float] = {}
    first = {(run.budget, run.arm.name): number for number, run in reversed([*enumerate(chosen)])}
    by_arm = sorted(chosen, key=lambda run: first[run.budget, run.arm.name])
    for (budget, arm), group in groupby(by_arm, key=lambda run: (run.budget, run.arm.name)):
        some = list(group)
        run = some[0]
        flops = run_flops(run, texts)
        total = flops["student"] + flops["scoring"] + flops["teacher"]
        base.setdefault(budget, total)
        steps, tokens = f"{run.config.steps:,}", f"{planned_tokens(run):,}"
        if run.config.time_budget:
            steps = tokens = f"in {run.config.time_budget}"
            shown = ["by the clock"] * len(PARTS) + [""]
        else:
            shown = [f"{flops[part]:.2e}" for part in PARTS] + [f"{total / base[budget]:.2f}"]
        indices = ", ".join(str(numbers[each.name]) for each in some)
        rows.append((arm, budget, indices, steps, tokens, *shown))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def run_flops(run: PlannedRun, texts: Texts) -> dict[str, float]:
    """FLOPs of a whole run by part; `logits` is the part of `student` in its head."""
    config = run.config
    shards = texts.open(data_folders(config.data)[0])
    by_part = mean_step_flops(config, pack_flops(config, shards), texts.squares_of_run(config))
    return {name: value * config.steps for name, value in by_part.items()}


def _totals(plan: StudyPlan, chosen: Sequence[PlannedRun], left: Sequence[PlannedRun], slots: int) -> list[str]:
    tokens = sum(planned_tokens(run) for run in chosen if not run.config.time_budget)
    rate = 1 / plan.tokens_per_second if plan.tokens_per_second else None
    seconds = seconds_left(left, slots, rate)
    calls = sum(len(run.evaluations) for run in chosen)
    time = "unknown: set `tokens_per_second` in the plan, or repeat `--dry-run` after the first run"
    if seconds is not None:
        time = f"{tqdm.format_interval(seconds)} with {slots} at a time{untimed_part(left)}"
    disk, done = sum(_disk(run) for run in left), len(chosen) - len(left)
    return [
        f"{len(chosen)} runs of {tokens:,} tokens in all, and {calls} evaluations",
        *([f"done: {done} of these runs; time and disk are those of the others"] if done else []),
        f"time: {time}",
        f"disk: {disk / 1e9:.2f} GB of checkpoints and models",
        "FLOPs: `logits` is part of `student`. A teacher is assumed to be as large as the student; its own training "
        "counts only if it is a run of the study.",
    ]


def _disk(run: PlannedRun) -> float:
    """Bytes of the checkpoints that a run keeps, and of one exported model."""
    config = run.config
    shards = Texts().open(data_folders(config.data)[0])
    weights = count_weights(config, config.model.shape(shards.token_ids))
    return weights * 4.0 * (3 * (config.checkpoint.keep + 1) + 1)


def count_weights(config: PretrainConfig, shape: EncoderShape) -> int:
    """The weights of an encoder with its head, without norms, biases and a decoder."""
    layer = (
        4 * shape.hidden_size**2 + (3 if shape.preset == "modern" else 2) * shape.hidden_size * shape.intermediate_size
    )
    layers = shape.num_layers + (config.objective.decoder.layers if config.objective.kind == "mae_lm" else 0)
    return layers * layer + shape.hidden_size * (shape.vocab_size + shape.hidden_size)


def power_lines(seeds: int, sd: float) -> list[str]:
    """The smallest difference that ``seeds`` paired seeds can show, for a standard deviation of ``sd`` points per arm.

    A measured difference must exceed the half width of its 95 % t interval: unpaired, and paired with a correlation of
    0.5 and 0.8 between the scores of two arms. A true difference of this size is shown by half of all studies only, so
    the one that 80 % of them show is named too.
    """
    if seeds < 2:
        return ["With one seed no interval can be computed. Use at least 3 seeds, better 6."]
    lines = [f"smallest difference that {seeds} seeds can show, if the standard deviation of a score is {sd:g} points:"]
    lines.append(f"  unpaired: measured {expected_half_width(seeds, sd, paired=False):.2f} points")
    for correlation in (0.5, 0.8):
        measured = expected_half_width(seeds, sd, correlation)
        true = detectable_effect(seeds, sd * math.sqrt(2 * (1 - correlation)))
        lines.append(
            f"  paired, correlation {correlation:g}: measured {measured:.2f} points; "
            f"true {true:.2f} points, in 80 % of studies"
        )
    smallest = smallest_sign_flip_p(seeds)
    lines.append(f"smallest two-sided p of an exact sign-flip test: {smallest:.3g}")
    if smallest > 0.05:
        lines.append("  Fewer than 6 seeds cannot reach p < 0.05 without assumptions about the distribution.")
    if seeds < 3:
        lines.append("  Fewer than 3 seeds: the report never calls an arm better.")
    return lines
