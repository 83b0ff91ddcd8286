"""The dry run: the smallest effect beside scipy and the exact test, costs, and the time left."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.study.dry_run import count_weights, describe_study, power_lines
from megamask.study.jobs import CommandRecord
from megamask.study.plan import StudyPlan
from megamask.study.planned_cost import Texts
from megamask.study.planned_runs import plan_runs
from megamask.study.statistics import detectable_effect, expected_half_width
from megamask.study.time_left import planned_tokens, seconds_left


@pytest.mark.parametrize("seeds", [3, 6, 10])
def test_half_widths_are_those_of_scipy(seeds: int) -> None:
    draws = np.random.default_rng(seeds)
    ours, theirs = draws.normal(size=(2, seeds))
    interval = stats.ttest_1samp(ours - theirs, 0).confidence_interval(0.95)
    spread = float((ours - theirs).std(ddof=1))
    assert expected_half_width(seeds, spread, correlation=0.5) == pytest.approx((interval.high - interval.low) / 2)
    interval = stats.ttest_ind(ours, theirs).confidence_interval(0.95)
    spread = float(np.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / 2))
    assert expected_half_width(seeds, spread, paired=False) == pytest.approx((interval.high - interval.low) / 2)


@pytest.mark.parametrize("seeds", [2, 3, 5, 6])
def test_the_smallest_p_is_that_of_all_sign_flips(seeds: int) -> None:
    differences = np.arange(1, seeds + 1)
    sums = [abs(np.dot(signs, differences)) for signs in product([1, -1], repeat=seeds)]
    smallest = np.mean(np.array(sums) >= differences.sum())
    text = "\n".join(power_lines(seeds, 0.6))
    assert f"sign-flip test: {smallest:.3g}" in text
    assert ("cannot reach p < 0.05" in text) == (smallest > 0.05)


def test_the_true_difference_that_most_studies_show_is_named() -> None:
    (line,) = (line for line in power_lines(6, 0.6) if "correlation 0.5" in line)
    assert f"true {detectable_effect(6, 0.6, power=0.8):.2f} points, in 80 % of studies" in line


def test_one_seed_shows_nothing() -> None:
    assert "no interval can be computed" in power_lines(1, 0.6)[0]


def test_the_description_names_costs_and_runs(plan: StudyPlan, text: Path, tmp_path: Path) -> None:
    plan = replace(plan, tokens_per_second=1000.0)
    runs = plan_runs(plan, tmp_path, text)
    shown = describe_study(plan, runs, runs, runs, 2)
    assert "4 runs of 163,840 tokens in all, and 4 evaluations" in shown
    assert "01:21 with 2 at a time" in shown
    assert "done:" not in shown
    half = describe_study(plan, runs, runs, runs[2:], 2)
    assert "4 runs of 163,840 tokens in all" in half and "done: 2 of these runs" in half
    assert "00:40 with 2 at a time, without evaluations that were not timed yet" in half
    assert "00:00 with 2 at a time\n" in describe_study(plan, runs, runs, [], 2)
    assert [line.split()[2:4] for line in shown.splitlines()[3:5]] == [["0,", "2"], ["1,", "3"]]


def test_weights_are_counted_as_the_model_has_them(plan: StudyPlan, text: Path, tmp_path: Path) -> None:
    config = plan_runs(plan, tmp_path, text)[0].config
    shape = config.model.shape(Texts().open(text).token_ids)
    encoder = Encoder(shape, config.model)
    matrices = sum(p.numel() for p in encoder.parameters() if p.ndim == 2)
    matrices += sum(p.numel() for p in MaskedLMHead(encoder, config.model).parameters() if p.ndim == 2)
    tied = shape.vocab_size * shape.hidden_size
    assert count_weights(config, shape) in (matrices, matrices - tied)


def test_time_left_follows_what_was_measured(plan: StudyPlan, text: Path, tmp_path: Path) -> None:
    runs = plan_runs(plan, tmp_path, text)
    assert seconds_left(runs, 1) is None
    assert seconds_left(runs, 2, 0.01) == pytest.approx(0.01 * sum(map(planned_tokens, runs)) / 2)
    done = {name: asdict(CommandRecord("finished", seconds=s)) for name, s in (("pretrain", 100.0), ("frozen", 10.0))}
    runs[0].record.parent.mkdir(parents=True)
    runs[0].record.write_text(json.dumps(done))
    assert seconds_left(runs, 1) == pytest.approx(3 * 110)
    runs[1].record.parent.mkdir(parents=True)
    runs[1].record.write_text(json.dumps({"pretrain": asdict(CommandRecord("finished", seconds=200.0))}))
    assert seconds_left(runs, 1) == pytest.approx(10 + 110 + 210)  # each arm by its own runs
