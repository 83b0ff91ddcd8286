"""Relations of the predicted step time: volumes, limits, and what must never be faster than what."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.bench.scale import GPUS, STAGES, Links, ScaledRun, Stage, StepSeconds, scale_table

RUN = ScaledRun(StepSeconds(0.02, 0.04, 0.004, 0.001), 110_000_000)
LINKS = Links(inside=300e9, between=30e9)
runs = st.builds(
    ScaledRun,
    st.builds(StepSeconds, *[st.floats(1e-4, 1.0)] * 4),
    st.integers(10**6, 10**10),
    accumulate=st.integers(1, 8),
    overlap=st.floats(0, 1),
    all_reduces=st.booleans(),
)
stages = st.sampled_from(STAGES)
ranks = st.sampled_from(GPUS)


def sent(run: ScaledRun, stage: Stage) -> float:
    """Bytes of a rank of many."""
    return run.gradients_sent(stage) + run.weights_sent(stage)


@given(runs, stages)
def test_one_gpu_sends_nothing(run: ScaledRun, stage: Stage) -> None:
    one = run.seconds
    alone = run.accumulate * (one.forward + one.backward) + one.optimizer + one.rest
    assert run.step_seconds(stage, 1, LINKS) == pytest.approx(alone)
    assert run.efficiency(stage, 1, LINKS) == 1


def test_stage_3_moves_half_as_much_again_as_stage_1() -> None:
    paper = replace(RUN, all_reduces=False)
    assert sent(paper, 3) == 1.5 * sent(paper, 1) and sent(paper, 1) == sent(paper, 2)
    assert sent(paper, 1) == sent(replace(paper, bytes_at_0=2), 0)
    assert sent(RUN, 1) == sent(RUN, 3)


@given(runs)
def test_stages_0_and_1_send_once_a_step_and_the_others_in_every_micro_step(run: ScaledRun) -> None:
    once = replace(run, accumulate=1)
    assert [sent(run, stage) == sent(once, stage) for stage in (0, 1)] == [True, True]
    assert run.gradients_sent(2) == run.accumulate * once.gradients_sent(2)
    assert sent(run, 3) == run.accumulate * sent(once, 3)


@given(runs, stages, ranks, st.floats(0.05, 1))
def test_fewer_tokens_on_a_gpu_are_less_efficient(run: ScaledRun, stage: Stage, gpus: int, share: float) -> None:
    # the optimizer and the rest do not shrink with the tokens, so without them
    run = replace(run, seconds=replace(run.seconds, optimizer=0.0, rest=0.0))
    fewer = replace(run, seconds=run.seconds.scaled(share))
    assert fewer.efficiency(stage, gpus, LINKS) <= run.efficiency(stage, gpus, LINKS) * (1 + 1e-9)


@given(runs, stages, st.sampled_from(GPUS[1:]))
def test_overlap_faster_links_and_less_to_send_are_never_slower(run: ScaledRun, stage: Stage, gpus: int) -> None:
    taken = run.step_seconds(stage, gpus, LINKS)
    for better in (replace(run, overlap=1.0), replace(run, all_reduces=False)):
        assert better.step_seconds(stage, gpus, LINKS) <= taken * (1 + 1e-9)
    faster = Links(inside=600e9, between=60e9, latency=LINKS.latency / 2)
    assert run.step_seconds(stage, gpus, faster) <= taken * (1 + 1e-9)


@given(runs, stages)
def test_with_infinite_links_only_compute_is_left(run: ScaledRun, stage: Stage) -> None:
    one, links = run.seconds, Links(1e30, 1e30, latency=0.0)
    optimizer = one.optimizer / (64 if stage else 1)
    passes = run.accumulate * (one.forward + one.backward)
    assert run.step_seconds(stage, 64, links) == pytest.approx(passes + optimizer + one.rest)


@given(runs, stages)
def test_the_slowest_link_of_the_ring_counts(run: ScaledRun, stage: Stage) -> None:
    slow = replace(LINKS, between=1e9)
    assert run.step_seconds(stage, 8, slow) == run.step_seconds(stage, 8, LINKS)
    assert run.step_seconds(stage, 16, slow) >= run.step_seconds(stage, 16, LINKS)
    fast = replace(LINKS, between=1e15)
    assert run.step_seconds(stage, 16, fast) == run.step_seconds(stage, 16, replace(LINKS, between=LINKS.inside))


def test_a_rate_gives_a_third_to_the_forward_pass() -> None:
    found = StepSeconds.from_rate(6e12, 3e14)
    assert found.forward + found.backward == pytest.approx(6e12 / 3e14) and found.backward == 2 * found.forward


def test_the_table_has_a_line_for_each_number_of_gpus() -> None:
    head, rule, *lines = scale_table(RUN, LINKS)
    assert [int(line.split("|")[1]) for line in lines] == list(GPUS)
    assert {line.count("|") for line in (head, rule, *lines)} == {len(STAGES) + 2}
    assert lines[0].count("100%") == len(STAGES)
