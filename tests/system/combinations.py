"""The choices of a run that must go together, and few cases that hold every pair of them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

Case = dict[str, str]

ENTROPY = {"masking.score": "entropy", "masking.random_share.start": 0.5, "masking.random_share.end": 0.2}
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
        "token type": {"masking.score": "token_type", "masking.token-type.every": 2},
        "corrected": ENTROPY | {"entropy.source": "probe", "masking.correction": 1.0, "masking.max-weight": 3.0},
        "moving temperature": ENTROPY
        | {"entropy.source": "frequency", "masking.entropy.effective-sample-size": 0.8, "masking.correction": 0.5},
        "masked": ENTROPY | {"entropy.source": "exact", "entropy.num_passes": 2, "masking.entropy.strategy": "middle"},
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
        "80/10/10": {},
        "all masks": {
            "masking.corruption.mask": 1.0,
            "masking.corruption.random": 0.0,
            "masking.corruption.unchanged": 0.0,
        },
    },
    "teacher": {"none": {}, "targets": TAUGHT, "everywhere": TAUGHT | {"distill.positions": "all"}},
}
"""What can be chosen, and the settings by which it is chosen."""
APART = [("span", "corrected"), ("span", "moving temperature")]
"""What is refused: the probabilities of spans are only approximate."""


def covering(
    factors: Mapping[str, Iterable[str]], size: int = 2, never: Collection[tuple[str, str]] = ()
) -> list[Case]:
    """Cases that hold every ``size`` choices of different factors together at least once.

    Each begins with what is left and is filled up with the choices that leave least, else those used least; of several
    beginnings the best is taken. Names of choices are distinct; pairs in ``never``, in the order of the factors, stay
    apart.
    """
    choices = {factor: list(names) for factor, names in factors.items()}

    def apart(case: Case) -> bool:
        named = [case[factor] for factor in choices if factor in case]
        return any(pair in never for pair in itertools.combinations(named, 2))

    def sets(case: Case) -> set[tuple]:
        values = [(factor, case[factor]) for factor in choices if factor in case]
        return set(itertools.combinations(values, size))

    def worth(case: Case) -> int:
        return sum(each in left for each in sets(case))

    def filled(case: Case) -> Case:
        for factor, names in choices.items():
            if factor not in case:
                fitting = [case | {factor: name} for name in names if not apart(case | {factor: name})]
                case = max(fitting, key=lambda case: (worth(case), -used[case[factor]]))
        return case

    every = (
        zip(factors, names, strict=True)
        for factors in itertools.combinations(choices, size)
        for names in itertools.product(*(choices[factor] for factor in factors))
    )
    left = dict.fromkeys(cases for cases in map(tuple, every) if not apart(dict(cases)))
    cases: list[Case] = []
    used: Counter[str] = Counter()
    while left:
        best = max(map(filled, map(dict, list(left)[:20])), key=worth)
        cases.append({factor: best[factor] for factor in choices})
        used.update(best.values())
        left = {one: None for one in left if one not in sets(best)}
    return cases


def chosen(case: Case, factors: Mapping[str, Mapping[str, Mapping[str, object]]]) -> dict[str, object]:
    """The settings of a case."""
    settings: dict[str, object] = {}
    for factor, name in case.items():
        settings |= factors[factor][name]
    return settings


def named_by(case: Case) -> str:
    return " + ".join(case.values())
