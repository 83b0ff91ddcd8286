"""Runs that are stopped in one ZeRO stage on one number of ranks and go on in another on another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamask.engine import ds_file
from megamask.errors import REQUEUE
from tests.processes.conftest import RunRanks
from tests.system.cells import ENGINES, SIZES, STEPS, Cell, Text, arguments, place
from tests.system.commands import flags, training
from tests.system.launches import differences, kept, record

HALF, PER_STEP = 3, 4
BOUND = 1e-6
"""How far apart, as a share of the loss, two orders of the same sums in fp32 may lie."""
SETTINGS: dict[str, object] = {
    "masking.unit": "word",
    "masking.ratio.kind": "linear",
    "masking.ratio.start": 0.4,
    "masking.ratio.end": 0.2,
    "optimizer.lr.peak": 1e-2,
}
Said = list[dict[str, Any]]


@dataclass(frozen=True)
class Place:
    """An engine by its name in `ENGINES`, and how many ranks."""

    engine: str
    world: int

    @property
    def stage(self) -> int:
        return ENGINES[self.engine].get("zero_optimization", {}).get("stage", 0)

    @property
    def precision(self) -> str:
        return ds_file.precision(ENGINES[self.engine])

    def __str__(self) -> str:
        return f"{self.engine} x {self.world}"


@dataclass
class Jobs:
    """Launches that the same few processes make one after another."""

    text: Text
    folder: Path
    jobs: list[dict] = field(default_factory=list)

    def add(self, name: str, at: Place, **more: object) -> int:
        """One more launch, of the run in the folder ``name``; returns its number."""
        zero = self.folder / f"{len(self.jobs)}.json"
        zero.write_text(json.dumps(ENGINES[at.engine]))
        settings = flags(SETTINGS | SIZES | {"validation.every": 99})
        words = [*training(self.text.data, self.folder / name), *settings, "--deepspeed", str(zero)]
        self.jobs.append({"world": at.world, "arguments": words, **more})
        return len(self.jobs) - 1

    def run(self, run_ranks: RunRanks, timeout: float = 600) -> list[Said]:
        """What each rank said of each launch."""
        world = max(job["world"] for job in self.jobs)
        results = run_ranks(world, "launch_worker:serve", jobs=self.jobs, timeout=timeout)
        return [[rank[number] for rank in results[: job["world"]]] for number, job in enumerate(self.jobs)]


@dataclass(frozen=True)
class Twice:
    """A cell's run on two ranks: never stopped, and stopped and gone on with."""

    cell: Cell
    folder: Path
    jobs: tuple[int, int, int]

    @classmethod
    def added(cls, cell: Cell, jobs: Jobs) -> Twice:
        """Launches for both runs."""
        folder = jobs.folder / str(len(jobs.jobs))
        folder.mkdir()
        words = [arguments(cell, jobs.text, folder / name) for name in ("whole", "stopped")]
        stop = place(cell, jobs.text, words[0])
        where: dict[str, Any] = {"world": 2}
        for more in ({"arguments": words[0]}, {"arguments": words[1], "stop": stop}, {"arguments": words[1]}):
            jobs.jobs.append(where | more)
        last = len(jobs.jobs)
        return cls(cell, folder, (last - 3, last - 2, last - 1))

    def differences(self, results: list[Said]) -> list[str]:
        """What differs between the two."""
        for number, code in zip(self.jobs, (0, REQUEUE, 0), strict=True):
            for rank in results[number]:
                assert rank["code"] == code, f"{self.cell}: {rank['err']}"
        whole, half, rest = (in_order(results[number]) for number in self.jobs)
        problems = differences(record(self.folder / "stopped", STEPS), record(self.folder / "whole", STEPS))
        return problems + ["packs and plans"] * (half + rest != whole)


def in_order(results: Said) -> list[list]:
    """The micro-steps of all ranks in the order in which one would take them."""
    return [pack for together in zip(*(rank["packs"] for rank in results), strict=True) for pack in together]


def figures(run: Path, name: str) -> dict[int, float]:
    lines = (json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def apart(actual: Mapping[int, float], expected: Mapping[int, float]) -> float:
    """The largest difference of any step of ``actual`` as a share."""
    return max(abs(actual[step] - expected[step]) / expected[step] for step in actual)


@dataclass(frozen=True)
class Outcome:
    """What differs after a run has moved: names of tensors at once; packs and plans, rates and ratios; the loss."""

    tensors: list[str]
    packs: int
    rates: list[str]
    loss: float

    @property
    def exact(self) -> bool:
        return not self.tensors and not self.packs and not self.rates and self.loss <= BOUND


def outcome(results: Said, run: Path, whole: Said, reference: Path) -> Outcome:
    """The run that has moved against ``whole``, the one that stayed where it was."""
    for rank in results:
        assert rank["code"] == 0, rank["err"]
    there = {name: value for name, value in kept(run, HALF).items() if "/" in name}
    tensors = sorted({name for rank in results for name in there if rank["began"].get(name) != there[name]})
    expected = in_order(whole)[HALF * PER_STEP :]
    packs = sum(a != b for a, b in zip(in_order(results), expected, strict=True))
    numbers = [number for number, *_ in expected]
    assert numbers == list(range(HALF * PER_STEP, STEPS * PER_STEP))
    rates = [name for name in ("lr", "mask_ratio") if figures(run, name) != figures(reference, name)]
    return Outcome(tensors, packs, rates, apart(figures(run, "train/loss"), figures(reference, "train/loss")))


def line(source: Place, target: Place) -> str:
    """What the run logs about its move."""
    here, there = (f"{p.world} rank{'s' * (p.world > 1)}, ZeRO {p.stage}, {p.precision}" for p in (target, source))
    return f"Resumed at {here}; the checkpoint was written by {there}."


def moved(
    run_ranks: RunRanks,
    text: Text,
    folder: Path,
    moves: list[tuple[Place, Place]],
    *,
    reference: str = "zero 0",
    timeout: float = 600,
) -> list[Outcome]:
    """Each of ``moves`` compared with the run that one rank took under the engine ``reference`` without a stop."""
    jobs = Jobs(text, folder)
    whole = jobs.add("whole", Place(reference, 1))
    for source in dict.fromkeys(source for source, _ in moves):
        jobs.add(str(source), source, stop=HALF)
    went = [
        jobs.add(move, target, copy=[str(folder / str(source)), str(folder / move)])
        for source, target in moves
        for move in [f"{source} to {target}"]
    ]
    results = jobs.run(run_ranks, timeout)
    outcomes = []
    for number, (source, target) in zip(went, moves, strict=True):
        run = folder / f"{source} to {target}"
        output = results[number][0]["out"]
        assert source == target or line(source, target) in output, output
        assert source != target or "Resumed at" not in output
        outcomes.append(outcome(results[number], run, results[whole], folder / "whole"))
        print(f"{source} to {target}: {len(results[number])} ranks, loss apart {outcomes[-1].loss:.1e}")
    exact, largest = sum(each.exact for each in outcomes), max(each.loss for each in outcomes)
    print(f"{len(outcomes)} moves, {exact} exact, loss apart at most {largest:.1e}")
    return outcomes
