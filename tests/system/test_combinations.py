"""Units, scores, schedules, objectives, corruptions and teachers combine: every pair of choices, in few small runs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.system.commands import metrics, train

STEPS = 3
ENTROPY = {"masking.score": "entropy", "masking.explore.start": 0.5, "masking.explore.end": 0.2}
DECAY = {"masking.ratio.start": 0.4, "masking.ratio.end": 0.2}
TAUGHT = {"distill.weight.start": 0.5, "teacher.precision": "fp32"}
FACTORS: dict[str, dict[str, dict[str, object]]] = {
    "unit": {unit: {"masking.unit": unit} for unit in ("token", "word", "span")},
    "score": {
        "uniform": {},
        "part of speech": {"masking.score": "part_of_speech"},
        "frequency": ENTROPY | {"entropy.source": "frequency"},
        "probe": ENTROPY | {"entropy.source": "probe", "entropy.measure": "margin"},
        "exact": ENTROPY | {"entropy.source": "exact", "entropy.signal": "clean"},
        "masked": ENTROPY | {"entropy.source": "exact", "entropy.passes": 2, "masking.entropy.strategy": "middle"},
    },
    "schedule": {
        "constant": {},
        "linear": {"masking.ratio.kind": "linear"} | DECAY,
        "cosine": {"masking.ratio.kind": "cosine"} | DECAY,
        "with the rate": {"masking.ratio.kind": "step", "masking.ratio.at": "warmup"} | DECAY,
    },
    "objective": {
        "mlm": {},
        "3ml": {"objective.kind": "three_ml", "objective.depth": 1},
        "3ml, own vector": {"objective.kind": "three_ml", "objective.depth": 1, "objective.mask-vector": "own"},
        "mae-lm": {"objective.kind": "mae_lm", "objective.decoder.layers": 1},
        "cross": {"objective.kind": "mae_lm", "objective.decoder.layers": 1, "objective.decoder.attention": "cross"},
    },
    "corruption": {
        "all masks": {},
        "80/10/10": {"masking.corruption.mask": 0.8, "masking.corruption.random": 0.1, "masking.corruption.keep": 0.1},
    },
    "teacher": {"none": {}, "targets": TAUGHT, "everywhere": TAUGHT | {"distill.positions": "all"}},
}
Case = tuple[str, ...]


def covering() -> list[Case]:
    """Cases that hold every pair of choices of two factors at least once; each the best of all for what is left."""
    every = list(itertools.product(*FACTORS.values()))

    def pairs(case: Case) -> set[tuple]:
        return set(itertools.combinations(enumerate(case), 2))

    left, found = set().union(*(pairs(case) for case in every)), []
    while left:
        best = max(every, key=lambda case: len(pairs(case) & left))
        found.append(best)
        left -= pairs(best)
    return found


@pytest.mark.parametrize("case", covering(), ids=" + ".join)
def test_choices_combine(case: Case, tagged: Path, finished: Path, tmp_path: Path) -> None:
    settings: dict[str, object] = {}
    for choices, chosen in zip(FACTORS.values(), case, strict=True):
        settings |= choices[chosen]
    if "distill.weight.start" in settings:
        settings["teacher.path"] = finished
    words = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    ended = train(tagged, tmp_path / "run", *words, steps=STEPS, packs__per_step=1)
    assert ended.code == 0, ended.err
    assert len(metrics(tmp_path / "run", "train/loss")) == STEPS


def test_the_cases_hold_every_pair() -> None:
    cases = covering()
    for (one, choices), (two, others) in itertools.combinations(enumerate(FACTORS.values()), 2):
        assert {(case[one], case[two]) for case in cases} == set(itertools.product(choices, others))
