"""Spikes are detected at once and nothing else is; decisions survive a resume; rewinds skip packs."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.errors import NonFiniteError
from megamask.errors.setting_rules import settings_problems
from megamask.health.loss_spikes import Regime, SkippedPacks, SpikePolicy, StepDecision
from megamask.health.settings import SpikesConfig

REGIME = Regime(100.0)
WINDOW = 16


def noise(seed: int, steps: int) -> list[tuple[float, float]]:
    """Loss and norm of a run that nothing disturbs: a falling curve under noise, and norms with a long tail."""
    draw = random.Random(seed)
    curve = (10 / (1 + step / 50) ** 0.3 for step in range(steps))
    return [(loss + draw.gauss(0, 0.05), math.exp(draw.gauss(0, 0.2))) for loss in curve]


def decide(policy: SpikePolicy, step: int, loss: float, norm: float, regime: Regime = REGIME) -> StepDecision:
    """The decision about one step, as `take_step` asks for it."""
    if math.isfinite(loss) and math.isfinite(norm):
        return policy.decide(step, loss, norm, regime)
    return policy.drop_nonfinite(step, "somewhere")


def decisions(policy: SpikePolicy, run: list[tuple[float, float]], start: int = 0) -> list[tuple[bool, bool, str]]:
    """What happens to each step from ``start`` on; the error of a run that ends by one is the last sentence."""
    answers = []
    for step in range(start, len(run)):
        try:
            decision = decide(policy, step, *run[step])
        except NonFiniteError as error:
            return [*answers, (False, False, str(error))]
        answers.append((decision.moves, decision.rewinds, decision.sentence))
    return answers


def test_an_undisturbed_run_has_no_spikes() -> None:
    for seed in range(3):
        policy = SpikePolicy(SpikesConfig(policy="skip"))
        assert decisions(policy, noise(seed, 1000)) == [(True, False, "")] * 1000
        assert policy.spikes == policy.dropped == 0


@pytest.mark.parametrize("action", ["log", "skip", "rewind"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_spike_is_detected_in_its_own_step(action: str, which: int) -> None:
    detected = 0
    for seed in range(20):
        run = noise(seed, 300)
        at = random.Random(seed).randrange(64, 300)
        worse = list(run[at])
        worse[which] *= 6
        run[at] = (worse[0], worse[1])
        policy = SpikePolicy(SpikesConfig(policy=action))
        steps = [step for step, (*_, sentence) in enumerate(decisions(policy, run)) if sentence]
        detected += steps == [at]
        assert policy.dropped == (action != "log")
    assert detected == 20


def test_one_huge_value_hides_no_later_spike() -> None:
    run = noise(0, 200)
    run[100], run[110] = (run[100][0], 1e30), (run[110][0], 50.0)
    steps = [step for step, (*_, sentence) in enumerate(decisions(SpikePolicy(SpikesConfig()), run)) if sentence]
    assert steps == [100, 110]


def test_a_lasting_change_and_another_regime_are_accepted() -> None:
    run = [(loss + 3 * (step >= 500), norm) for step, (loss, norm) in enumerate(noise(0, 700))]
    moves = [moves for moves, *_ in decisions(SpikePolicy(SpikesConfig(policy="skip")), run)]
    assert all(moves[:500]) and not moves[500] and all(moves[550:])
    policy = SpikePolicy(SpikesConfig(policy="skip"))
    regimes = [Regime(100.0 + 50 * (step >= 500)) for step in range(700)]
    assert all(decide(policy, step, *run[step], regimes[step]).moves for step in range(700))


values = st.one_of(st.floats(1, 2), st.sampled_from([9.0, 50.0, math.nan, math.inf, -math.inf]))


@given(st.lists(st.tuples(values, values), min_size=40, max_size=60), st.integers(0, 40))
def test_a_resumed_policy_decides_as_an_uninterrupted_one(run: list[tuple[float, float]], stop: int) -> None:
    config = SpikesConfig("skip", sigma=2.0, window=WINDOW)
    whole = decisions(SpikePolicy(config), run)
    first = SpikePolicy(config)
    begin = decisions(first, run[:stop])
    if len(begin) == stop and len(whole) > stop:  # it had not ended by an error
        again = SpikePolicy(config, json.loads(json.dumps(first.state(), allow_nan=False)))
        assert begin + decisions(again, run, stop) == whole


def test_a_policy_without_its_state_decides_otherwise() -> None:
    run = [*noise(0, 100), (100.0, 1.0)]
    config = SpikesConfig("skip")
    first = SpikePolicy(config)
    decisions(first, run[:100])
    assert decisions(SpikePolicy(config, first.state()), run, 100) != decisions(SpikePolicy(config), run, 100)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_steps_are_dropped_up_to_a_bound(bad: float) -> None:
    config = SpikesConfig()
    run = [*noise(0, 200), *[(bad, 1.0)] * 9]
    answers = decisions(SpikePolicy(config), run)
    assert [moves for moves, *_ in answers[200:]] == [False] * config.max_nonfinite_in_row
    assert (
        "somewhere" in answers[-2][2]
        and "in a row" in answers[-1][2]
        and len(answers) == 200 + config.max_nonfinite_in_row
    )

    # every eighth: never two in a row, but ten in a hundred
    run = [(1.0, bad) if step % 8 == 0 else pair for step, pair in enumerate(noise(0, 200))]
    answers = decisions(SpikePolicy(config), run)
    assert len(answers) == 8 * (config.max_nonfinite_in_100 - 1) + 1 and "10 among the last 100" in answers[-1][2]
    # one in twenty goes on for ever
    run = [(1.0, bad) if step % 20 == 0 else pair for step, pair in enumerate(noise(0, 400))]
    policy = SpikePolicy(config)
    assert len(decisions(policy, run)) == 400
    assert policy.dropped == 20


def test_rewinds_are_counted_and_capped() -> None:
    run = [(loss if step % 40 or step < 40 else 99.0, norm) for step, (loss, norm) in enumerate(noise(0, 300))]
    config = SpikesConfig("rewind", sigma=12.0, window=WINDOW, max_rewinds=2)
    policy = SpikePolicy(config)
    states, rewinds, step = {}, 0, 0
    while step < 300:
        states[step] = json.loads(json.dumps(policy.state()))
        if decide(policy, step, *run[step]).rewinds:
            rewinds += 1
            to = step - 20
            policy, run[step] = policy.rewound(states[to], to, step), (1.0, 1.0)
            assert policy.rewinds == rewinds and policy.skipped_packs.shift(to) >= 21
            step = to
            continue
        step += 1
    assert rewinds == 2
    assert policy.dropped == policy.spikes == 7


moves = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 25)), max_size=6)


@given(moves)
def test_a_rewind_skips_the_packs_read_after_it(moves: list[tuple[int, int]]) -> None:
    """Against a list of what each step would read, which every rewind cuts and continues behind the last one read."""
    skipped_packs, reads, step = SkippedPacks(), list(range(1000)), 0
    for ahead, back in moves:
        step += ahead
        to = max(0, step - back)
        skipped_packs = skipped_packs.rewound(to, step)
        reads = reads[:to] + list(range(reads[step] + 1, reads[step] + 1001))
        step = to
        assert [number + skipped_packs.shift(number) for number in range(100)] == reads[:100]
        assert SkippedPacks(tuple(map(tuple, json.loads(json.dumps(skipped_packs.entries))))) == skipped_packs
    assert all(a < b for a, b in itertools.pairwise(number + skipped_packs.shift(number) for number in range(200)))


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (SpikesConfig(sigma=0.0), ["sigma"]),
        (SpikesConfig(sigma=math.nan, window=4), ["sigma", "window"]),
        (SpikesConfig("rewind", rewind_steps=0, max_rewinds=0), ["rewind_steps", "max_rewinds"]),
        (SpikesConfig("skip", rewind_steps=50), ["rewind_steps"]),
        (SpikesConfig(max_rewinds=1), ["max_rewinds"]),
        (
            SpikesConfig(max_nonfinite_in_row=0, max_nonfinite_in_100=101),
            ["max_nonfinite_in_row", "max_nonfinite_in_100"],
        ),
    ],
)
def test_every_problem_is_named(config: SpikesConfig, names: list[str]) -> None:
    problems = settings_problems(config, "spikes")
    assert [sentence.split("`")[1] for sentence in problems] == [f"spikes.{name}" for name in names]
    assert (
        settings_problems(SpikesConfig(), "spikes")
        == settings_problems(SpikesConfig("rewind", rewind_steps=50), "spikes")
        == []
    )
