"""Units, scores, schedules, objectives, corruptions and teachers combine: every pair of choices, in few small runs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.system.combinations import APART, FACTORS, Case, chosen, covering, named_by
from tests.system.commands import metrics, train
from tests.system.families import initial_weights_of

STEPS = 3
IMPORTED = ("roberta", "distilbert", "electra", "albert")
STARTS = {"from random weights": {}} | {f"from {name}": {"init": name} for name in IMPORTED}
CHOICES = FACTORS | {"start": STARTS}


@pytest.mark.parametrize("case", covering(CHOICES, never=APART), ids=named_by)
def test_choices_combine(case: Case, tagged: Path, finished: Path, folder: Path, tmp_path: Path) -> None:
    settings = chosen(case, CHOICES)
    if "init" in settings:
        settings["init"] = initial_weights_of(str(settings["init"]), tagged, folder)
    if "distill.weight.start" in settings:
        settings["teacher.path"] = finished
    words = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    ended = train(tagged, tmp_path / "run", *words, steps=STEPS, packs__per_step=1)
    assert ended.code == 0, ended.err
    assert len(metrics(tmp_path / "run", "train/loss")) == STEPS


@pytest.mark.parametrize(("size", "never"), [(1, ()), (2, ()), (2, [("uniform", "linear"), ("token", "mlm")])])
def test_the_cases_hold_every_choice_or_pair(size: int, never: list[tuple[str, str]]) -> None:
    cases = covering(FACTORS, size, never)
    for factors in itertools.combinations(FACTORS, size):
        wanted = set(itertools.product(*(FACTORS[factor] for factor in factors))) - set(never)
        assert {tuple(case[factor] for factor in factors) for case in cases} == wanted
