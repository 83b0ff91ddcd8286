"""The judge of steps: spikes are seen at once and nothing else is; what it decides survives a resume; the ledger."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.errors import NonFiniteError
from megamask.health.loss_spikes import SkippedPacks, SpikePolicy, SpikesConfig

ASKED = (100.0, 1.0, 0.0)
WINDOW = 16


def noise(seed: int, steps: int) -> list[tuple[float, float]]:
    """Loss and norm of a run that nothing disturbs: a falling curve under noise, and norms with a long tail."""
    draw = random.Random(seed)
    curve = (10 / (1 + step / 50) ** 0.3 for step in range(steps))
    return [(loss + draw.gauss(0, 0.05), math.exp(draw.gauss(0, 0.2))) for loss in curve]


def judged(judge: SpikePolicy, run: list[tuple[float, float]], start: int = 0) -> list[tuple[bool, bool, str]]:
    """What becomes of each step from ``start`` on; a run that ends by an error says so last."""
    found = []
    for step in range(start, len(run)):
        try:
            verdict = judge(step, *run[step], ASKED, lambda: "somewhere")
        except NonFiniteError as error:
            return [*found, (False, False, str(error))]
        found.append((verdict.moves, verdict.rewinds, verdict.sentence))
    return found


def test_an_undisturbed_run_has_no_spikes() -> None:
    for seed in range(3):
        judge = SpikePolicy(SpikesConfig(policy="skip"))
        assert judged(judge, noise(seed, 1000)) == [(True, False, "")] * 1000
        assert judge.spikes == judge.dropped == 0


@pytest.mark.parametrize("policy", ["log", "skip", "rewind"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_spike_is_seen_in_its_own_step(policy: str, which: int) -> None:
    seen = 0
    for seed in range(20):
        run = noise(seed, 300)
        at = random.Random(seed).randrange(64, 300)
        worse = list(run[at])
        worse[which] *= 6
        run[at] = (worse[0], worse[1])
        judge = SpikePolicy(SpikesConfig(policy=policy))
        told = [step for step, (*_, sentence) in enumerate(judged(judge, run)) if sentence]
        seen += told == [at]
        assert judge.dropped == (policy != "log")
    assert seen == 20


def test_one_huge_value_hides_no_later_spike() -> None:
    run = noise(0, 200)
    run[100], run[110] = (run[100][0], 1e30), (run[110][0], 50.0)
    told = [step for step, (*_, sentence) in enumerate(judged(SpikePolicy(SpikesConfig()), run)) if sentence]
    assert told == [100, 110]


def test_a_lasting_change_is_accepted_and_what_the_run_asks_for_is_no_spike() -> None:
    run = [(loss + 3 * (step >= 500), norm) for step, (loss, norm) in enumerate(noise(0, 700))]
    moves = [moves for moves, *_ in judged(SpikePolicy(SpikesConfig(policy="skip")), run)]
    assert all(moves[:500]) and not moves[500] and all(moves[550:])
    judge = SpikePolicy(SpikesConfig(policy="skip"))
    verdicts = [judge(step, *run[step], (100.0 + 50 * (step >= 500),), lambda: "") for step in range(700)]
    assert all(verdict.moves for verdict in verdicts)


values = st.one_of(st.floats(1, 2), st.sampled_from([9.0, 50.0, math.nan, math.inf, -math.inf]))


@given(st.lists(st.tuples(values, values), min_size=40, max_size=60), st.integers(0, 40))
def test_a_resumed_judge_decides_what_it_would_have(run: list[tuple[float, float]], stop: int) -> None:
    config = SpikesConfig("skip", sigma=2.0, window=WINDOW)
    whole = judged(SpikePolicy(config), run)
    first = SpikePolicy(config)
    begin = judged(first, run[:stop])
    if len(begin) == stop and len(whole) > stop:  # it had not ended by an error
        again = SpikePolicy(config, json.loads(json.dumps(first.state(), allow_nan=False)))
        assert begin + judged(again, run, stop) == whole


def test_a_judge_that_forgets_would_decide_otherwise() -> None:
    run = [*noise(0, 100), (100.0, 1.0)]
    config = SpikesConfig("skip")
    first = SpikePolicy(config)
    judged(first, run[:100])
    assert judged(SpikePolicy(config, first.state()), run, 100) != judged(SpikePolicy(config), run, 100)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_steps_that_are_no_numbers_are_dropped_up_to_a_bound(bad: float) -> None:
    config = SpikesConfig()
    run = [*noise(0, 200), *[(bad, 1.0)] * 9]
    found = judged(SpikePolicy(config), run)
    assert [moves for moves, *_ in found[200:]] == [False] * config.max_nonfinite_in_row
    assert (
        "somewhere" in found[-2][2] and "in a row" in found[-1][2] and len(found) == 200 + config.max_nonfinite_in_row
    )

    # every eighth: never two in a row, but ten in a hundred
    run = [(1.0, bad) if step % 8 == 0 else pair for step, pair in enumerate(noise(0, 200))]
    found = judged(SpikePolicy(config), run)
    assert len(found) == 8 * (config.max_nonfinite_in_100 - 1) + 1 and "10 among the last 100" in found[-1][2]
    # one in twenty goes on for ever
    run = [(1.0, bad) if step % 20 == 0 else pair for step, pair in enumerate(noise(0, 400))]
    judge = SpikePolicy(config)
    assert len(judged(judge, run)) == 400
    assert judge.dropped == 20


def test_rewinds_are_counted_and_capped() -> None:
    run = [(loss if step % 40 or step < 40 else 99.0, norm) for step, (loss, norm) in enumerate(noise(0, 300))]
    config = SpikesConfig("rewind", sigma=12.0, window=WINDOW, max_rewinds=2)
    judge = SpikePolicy(config)
    states, rewinds, step = {}, 0, 0
    while step < 300:
        states[step] = json.loads(json.dumps(judge.state()))
        verdict = judge(step, *run[step], ASKED, lambda: "")
        if verdict.rewinds:
            rewinds += 1
            to = step - 20
            judge, run[step] = judge.rewound(states[to], to, step), (1.0, 1.0)
            assert judge.rewinds == rewinds and judge.ledger.shift(to) >= 21
            step = to
            continue
        step += 1
    assert rewinds == 2
    assert judge.dropped == judge.spikes == 7


moves = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 25)), max_size=6)


@given(moves)
def test_a_ledger_leaves_out_what_was_read_between(moves: list[tuple[int, int]]) -> None:
    """Against a list of what each step would read, which every rewind cuts and continues behind the last one read."""
    ledger, reads, step = SkippedPacks(), list(range(1000)), 0
    for ahead, back in moves:
        step += ahead
        to = max(0, step - back)
        ledger = ledger.rewound(to, step)
        reads = reads[:to] + list(range(reads[step] + 1, reads[step] + 1001))
        step = to
        assert [number + ledger.shift(number) for number in range(100)] == reads[:100]
        assert SkippedPacks(tuple(map(tuple, json.loads(json.dumps(ledger.entries))))) == ledger
    assert all(a < b for a, b in itertools.pairwise(number + ledger.shift(number) for number in range(200)))


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
    found = config.problems("spikes")
    assert [sentence.split("`")[1] for sentence in found] == [f"spikes.{name}" for name in names]
    assert SpikesConfig().problems("spikes") == SpikesConfig("rewind", rewind_steps=50).problems("spikes") == []
