"""A simulated study, with known effects: predictions, curves and mask metrics without any training.

`python -m tests.unit.study.simulated FOLDER` writes its report.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from megamask.evaluation.outcome import Cell, CellKey, Mode, State
from megamask.evaluation.tasks import TASKS
from megamask.study.report import write_report
from megamask.study.resampled_scores import resampled_score
from megamask.study.results import Arm, CurvePoint, PretrainingRun, StudyResults

ARMS = (
    Arm("random", "Random masks", "baseline"),
    Arm("entropy", "Entropy of a probe", "method", {"entropy.source": "probe", "masking.score": "entropy"}),
    Arm("kd", "Distillation after start", "method", {"distill.weight.start": "0.5", "teacher": "random"}),
    Arm("adaptive", "Adaptive by token type", "control", {"masking.score": "token_type"}),
    Arm("rate-0.3", "Random masks, 30 %", "method", {"masking.ratio.start": "0.3"}),
    Arm("rate-0.5", "Random masks, 50 %", "method", {"masking.ratio.start": "0.5"}),
    Arm("random-again", "Random masks, other seeds", "check", {"seed": "other seeds: 100 is added"}),
    Arm("random-half", "Random masks, half the steps", "check", {"budget": "0.5 of the others'"}),
)
EFFECTS = {
    "entropy": -0.004,
    "kd": 0.03,
    "adaptive": 0.002,
    "rate-0.3": 0.006,
    "rate-0.5": -0.012,
    "random-half": -0.04,
}
"""Added to the probability of a right answer."""
LEVELS = {"sst2": 0.74, "subj": 0.87, "trec": 0.72, "qnli": 0.61, "qqp": 0.7, "snli": 0.55, "stsb": 0.5, "blimp": 0.62}
PARADIGMS = 67


def simulate_study(
    *,
    seed: int = 0,
    seeds: int = 6,
    arms: tuple[Arm, ...] = ARMS,
    effects: Mapping[str, float] = EFFECTS,
    examples: int = 300,
    tasks: tuple[str, ...] = tuple(LEVELS),
    budgets: tuple[str, ...] = ("tokens=1500000", "flops=2e+13"),
    noise: float = 0.006,
    question: str = "Which masks and targets help a small encoder at equal compute?",
) -> StudyResults:
    """A study whose right answers have the probability LEVELS + effects + noise of the seed, of the arm and seed."""
    rng = np.random.default_rng(seed)
    shared = {(task, number): rng.normal(0, 2 * noise) for task in tasks for number in range(1, seeds + 1)}
    difficulty = {task: rng.random(PARADIGMS * 10 if task == "blimp" else examples) for task in tasks}
    labels = {task: _labels(task, len(difficulty[task]), rng) for task in tasks}
    cells: dict[tuple[str, int, str], tuple[Cell, ...]] = {}
    runs: list[PretrainingRun] = []
    for budget in budgets:
        for arm in arms:
            for number in range(1, seeds + 1):
                made = []
                for task in tasks:
                    chance = LEVELS[task] + effects.get(arm.name, 0.0) + shared[task, number] + rng.normal(0, noise)
                    modes: list[tuple[Mode, str]] = [("zero_shot", "original"), ("zero_shot", "within_word")]
                    if task != "blimp":
                        modes = [("frozen", "first"), ("frozen", "mean")]
                        modes += [("fine_tuned", "first")] if task in ("sst2", "subj") else []
                    for mode, variant in modes:
                        key = CellKey(f"{arm.name}/seed-{number}", task, mode, 1, variant)
                        made.append(_cell(key, chance, difficulty[task], labels[task], rng))
                cells[arm.name, number, budget] = tuple(made)
                runs.append(_run(arm, number, budget, effects.get(arm.name, 0.0), rng))
    return StudyResults(
        name="Simulated study",
        question=question,
        arms=arms,
        seeds=tuple(range(1, seeds + 1)),
        budgets=budgets,
        mean_tasks=tuple(task for task in tasks if task != "blimp"),
        references=tuple(
            _reference(task, kind, labels[task]) for task in tasks for kind in ("majority", "bag_of_words")
        ),
        runs=tuple(runs),
        cells=cells,
        notes=("Local splits: CoLA, MRPC, RTE and QNLI are not the official ones of GLUE.",),
    )


def _labels(task: str, examples: int, rng: np.random.Generator) -> np.ndarray:
    if task == "blimp":
        return np.ones(examples)
    if TASKS[task].kind == "regression":
        return rng.uniform(0, 5, examples)
    return rng.integers(0, len(TASKS[task].labels), examples).astype(float)


def _cell(key: CellKey, chance: float, difficulty: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Cell:
    right = 0.7 * difficulty + 0.3 * rng.random(len(difficulty)) < np.clip(chance, 0.02, 0.98)
    metrics = {"truncated": 0.0}
    if key.mode == "fine_tuned":
        held_out = {f"held_out_score/{rate:g}": chance - 1e3 * abs(rate - 1e-4) for rate in (3e-5, 1e-4, 2e-4)}
        metrics |= {"learning_rate": 1e-4, **held_out}
    if key.task == "blimp":
        predictions = right.astype(float)
        by_paradigm = predictions.reshape(PARADIGMS, -1).mean(1)
        metrics |= {f"paradigm/paradigm_{number}": float(share) for number, share in enumerate(by_paradigm)}
    elif TASKS[key.task].kind == "regression":
        predictions = np.where(right, labels + rng.normal(0, 1, len(labels)), rng.uniform(0, 5, len(labels)))
    else:
        classes = len(TASKS[key.task].labels)
        predictions = np.where(right, labels, (labels + rng.integers(1, classes, len(labels))) % classes)
    return make_cell(key, predictions, labels, metrics=metrics)


def make_cell(
    key: CellKey,
    predictions: np.ndarray,
    labels: np.ndarray,
    state: State = "ok",
    reason: str = "",
    metrics: Mapping[str, float] | None = None,
) -> Cell:
    """A cell with the scores of its predictions."""
    ones = np.ones((len(labels), 1), dtype=np.float32)
    scores = {
        metric: float(resampled_score([metric], predictions[None], labels, ones)[0, 0])
        for metric in TASKS[key.task].metrics
    }
    failed = state == "failed"
    return Cell(
        key,
        state,
        reason,
        score=None if failed else float(np.mean(list(scores.values()))),
        scores={} if failed else scores,
        predictions=() if failed else tuple(predictions.tolist()),
        labels=tuple(labels.tolist()),
        metrics=metrics or {},
        settings={},
        data={},
        weights="",
        versions={},
        command=f"megamask evaluate --model runs/{key.model} --tasks {key.task} --seeds {key.seed}",
        seconds=1.0,
    )


def _reference(task: str, kind: str, labels: np.ndarray) -> Cell:
    values, counts = np.unique(labels, return_counts=True)
    predictions = np.full(len(labels), values[counts.argmax()])
    if kind == "bag_of_words":
        predictions = np.where(np.arange(len(labels)) % 3 > 0, labels, predictions)
    if task == "blimp":
        predictions = np.full(len(labels), 0.5 if kind == "majority" else 0.55)
    return make_cell(CellKey("reference", task, "reference", 0, kind), predictions, labels)


def _run(arm: Arm, seed: int, budget: str, effect: float, rng: np.random.Generator) -> PretrainingRun:
    tokens = 750_000 if arm.name == "random-half" else 1_500_000
    extra = {"entropy": 0.12, "kd": 0.34}.get(arm.name, 0.0)
    student = tokens * 1.2e7
    offset = rng.normal(0, 0.01)
    curve = []
    for step in range(0, 101, 10):
        done = step / 100
        loss = 4.3 + 4.7 * np.exp(-3.2 * done * tokens / 1_500_000) - 3 * effect * done + offset
        total = done * student * (1 + extra)
        curve.append(CurvePoint(step, int(done * tokens), total, done * 700 * (1 + extra), float(loss), 0.1))
    skew = {"entropy": 0.05, "adaptive": 0.03}.get(arm.name, 0.0)
    deciles = 0.1 + skew * np.linspace(-1, 1, 10)
    part = "teacher" if arm.name == "kd" else "scoring"
    return PretrainingRun(
        arm.name,
        seed,
        budget,
        state="finished",
        reason="",
        steps=100,
        tokens=tokens,
        flops={"student": student, "scoring": 0.0, "teacher": 0.0} | ({part: extra * student} if extra else {}),
        seconds=700 * (1 + extra),
        peak_memory=900 * 2**20,
        curve=tuple(curve),
        masks={"mask_ratio": 0.2} | {f"masks/decile_{n}": float(share) for n, share in enumerate(deciles, 1)},
        settings="0" * 58 + f"{zlib.crc32(arm.title.encode()) % 10**6:06d}",
        command=f"megamask pretrain --recipe {arm.name} --seed {seed} --output runs/{arm.name}/{budget}/seed-{seed}",
        provenance={"version of megamask": "0.1.0", "machine: processor": "none, the numbers are simulated"},
    )


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    example = simulate_study(budgets=("tokens=1500000",), examples=500)
    question = "An example of a report. No model was trained: every number comes from a random generator."
    write_report(replace(example, name="SIMULATED NUMBERS, NOT MEASUREMENTS", question=question), target)
