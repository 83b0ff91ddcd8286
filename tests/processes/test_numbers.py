"""NaN and Inf on any rank reach no weight and no checkpoint; replicas that differ are detected; and a spike that was
dropped, or rewound from, leaves no trace in any stage and under any optimizer."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamask.checkpoint.format import read_state
from megamask.checkpoint.run_folder import RunFolder
from megamask.data import prepare
from tests.processes.conftest import RunRanks
from tests.processes.numbers_worker import BAD, GUILTY, PLACES
from tests.processes.test_engine import BF16, FP32, OFFLOAD
from tests.system.commands import flags, metrics, text, training
from tests.system.test_story import tensors

CELLS = [FP32[0], BF16[0], BF16[1], FP32[3]]
"""Each stage; tests/soak has each in every precision."""
FEW = [FP32[0], BF16[1], FP32[3]]
STEPS, AT, BACK = 8, 5, 3
"""Steps of a run with a spike; the step (from 0) that is one; the checkpoint that a rewind goes back to."""
LEDGER = [[BACK, AT + 1 - BACK]]
MUON: dict[str, object] = {"optimizer.kind": "muon", "optimizer.max_grad_norm": 0.0}
SPIKES: dict[str, object] = {"spikes.window": 8, "spikes.sigma": 20.0, "validation.every": 99, "steps": STEPS}
SPIKES |= {"checkpoint.every": 3, "checkpoint.keep": 9, "optimizer.lr.peak": 1e-2, "model.dropout": 0.1}


@dataclass(frozen=True)
class Spiked:
    """A run with a spike under a ``policy``, and the runs to compare it with."""

    policy: str
    engine: dict
    settings: dict[str, object]
    folder: Path
    """The folder of the runs."""
    control: bool = False
    """Whether one more run shows that without a policy the spike leaves a trace."""

    @property
    def run(self) -> Path:
        return self.folder / "spiked"

    def jobs(self, data: Path, world: int) -> list[dict[str, Any]]:
        """Launches: with the spike under the policy; without it, as it should be; perhaps with it and no policy."""
        self.folder.mkdir()
        zero = self.folder / "zero.json"
        zero.write_text(json.dumps(self.engine))
        policy: dict[str, object] = {"spikes.policy": self.policy}
        policy |= {"spikes.rewind_steps": 2} if self.policy == "rewind" else {}

        def job(name: str, **more: object) -> dict[str, Any]:
            settings = SPIKES | self.settings | {"packs.per-step": world} | more.pop("settings", policy)
            words = [*training(data, self.folder / name), *flags(settings), "--deepspeed", str(zero)]
            return {"world": world, "arguments": words} | more

        plant = {str(AT * world + 1): 100.0}
        jobs = [job("spiked", plant=plant)]
        if self.policy == "skip":
            jobs.append(job("whole", drop=[AT]))
        else:
            where = {"source": str(self.run), "target": str(self.folder / "whole")}
            jobs.append(job("whole", begin=where | {"step": BACK, "ledger": LEDGER, "per_step": world}))
        return [*jobs, job("log", plant=plant, settings={})] if self.control else jobs

    def check(self, launches: list[tuple[dict, ...]]) -> None:
        """The run equals the one without a spike, and differs from the one under the policy `log`."""
        for ranks in launches:
            assert all(rank["code"] == 0 for rank in ranks), [rank["err"] for rank in ranks]
        log = launches[0][0]["out"]
        assert log.count("is a spike") == 1 and f"Step {AT + 1} is a spike" in log, log
        assert ("Rewound from step 6 to step 3" in log) == (self.policy == "rewind")
        ours, whole = (tensors(self.folder / name, STEPS) for name in ("spiked", "whole"))
        assert ours.keys() == whole.keys()
        assert [name for name in whole if not torch.equal(ours[name], whole[name])] == [], self
        if self.control:
            unprotected = tensors(self.folder / "log", STEPS)
            assert any(not torch.equal(unprotected[name], whole[name]) for name in whole)
        expected = metrics(self.folder / "whole", "train/loss", "grad_norm", "lr")
        logged = metrics(self.run, "train/loss", "grad_norm", "lr")
        assert {key: value for key, value in logged.items() if key in expected} == expected and len(expected) >= 3 * 5
        state = read_state(RunFolder(self.run).checkpoint(STEPS))
        assert state["judge"]["ledger"] == (LEDGER if self.policy == "rewind" else [])
        # those of a span that a rewind leaves out were steps of the optimizer, but are no more
        assert state["optimizer_steps"] == (STEPS if self.policy == "rewind" else STEPS - 1)


def shards(folder: Path) -> Path:
    """Shards of a made-up text."""
    (folder / "corpus.txt").write_text(text(documents=60))
    how = {"tokenizer": "wordpiece", "vocab_size": 300, "valid_share": 0.2, "workers": 1}
    prepare.prepare(prepare.PrepareConfig((str(folder / "corpus.txt"),), folder / "data", **how))
    return folder / "data"


def assert_nonfinite_steps(run_ranks: RunRanks, cells: list[dict], world: int = 2) -> None:
    """A step with NaN or Inf on one of ``world`` ranks changes no weight, under each DeepSpeed file of ``cells``."""
    results = run_ranks(world, "numbers_worker:nonfinite", cells=cells, timeout=1800)
    tried = 0
    for cell, answers in enumerate(zip(*(rank["poisoned"] for rank in results), strict=True)):
        tried += assert_dropped(cells[cell], list(zip(*answers, strict=True)))
    # the negative controls: unjudged, the weights are spoilt; unasked, the other ranks would not know
    assert all(rank["unjudged"]["poison"] and not rank["unjudged"]["together"] for rank in results)
    assert [rank["unjudged"]["mine"] for rank in results] == [rank != GUILTY for rank in range(world)]
    print(f"{tried} steps with NaN or Inf in {len(cells)} cells: 0 moved a weight")


def assert_memory_faults(run_ranks: RunRanks, cells: list[dict], times: int, world: int = 2) -> None:
    """A spoilt number in memory is not saved, and a flipped bit of a copy is detected, each of ``times`` times."""
    results = run_ranks(world, "numbers_worker:memory", cells=cells, times=times, timeout=1800)
    published = sum(cell["published"] for rank in results for cell in rank["spoilt"])
    assert all(cell["tried"] >= 12 for rank in results for cell in rank["spoilt"])
    seen, false = (sum(cell[name] for rank in results for cell in rank["flipped"]) for name in ("seen", "false"))
    # at stage 3 there are no copies
    copies = sum(cell["zero_optimization"]["stage"] < 3 for cell in cells)
    assert (published, seen, false) == (0, world * copies * times, 0)
    spoilt = sum(cell["tried"] for cell in results[0]["spoilt"])
    print(
        f"{spoilt} spoilt states: 0 published; {copies * times} flipped bits: all seen, {copies * times} checks "
        "without one: 0 alarms"
    )


def assert_spikes(
    run_ranks: RunRanks,
    folder: Path,
    *,
    rewinds: list[dict],
    skips: list[tuple[dict, dict[str, object]]],
    world: int = 2,
) -> None:
    """A spike leaves no trace in a run.

    ``rewinds`` are DeepSpeed files under which a run goes back from it, ``skips`` such files and settings under which
    the step is dropped.
    """
    data = shards(folder)
    runs = [Spiked("rewind", ds, {}, folder / f"rewind-{n}") for n, ds in enumerate(rewinds)]
    runs += [Spiked("skip", ds, settings, folder / f"skip-{n}", not n) for n, (ds, settings) in enumerate(skips)]
    jobs = [run.jobs(data, world) for run in runs]
    results = run_ranks(world, "numbers_worker:spiked", jobs=[*itertools.chain(*jobs)], timeout=1800)
    launches = zip(*results, strict=True)
    for run, launched in zip(runs, jobs, strict=True):
        run.check([next(launches) for _ in launched])
    print(f"{len(rewinds)} runs that went back from a spike and {len(skips)} that dropped one: 0 differ")


def assert_dropped(cell: dict, answers: list[tuple[dict, ...]]) -> int:
    """All ranks decide alike, nothing moves, and the line names the cause and the rank; returns the number of steps."""
    *steps, after = answers
    # and the next step is that of a run in which nothing was wrong
    assert all(answer["same"] for answer in after), cell
    assert len(steps) == len(PLACES) * len(BAD)
    for number, step in enumerate(steps):
        place, line = PLACES[number // len(BAD)], step[0]["said"]
        assert all(answer == step[0] for answer in step), (cell, place)
        assert not step[0]["moves"] and step[0]["same"], (cell, place)
        assert f"Step {number + 2} was dropped" in line and "(packs " in line
        assert "the gradient of " in line or place == "loss", (cell, line)
        if place != "gradient":
            assert f"on rank {GUILTY}" in line and "on rank 0" not in line, (cell, line)
        assert ("the teacher's loss at pack" in line) == (place == "teacher"), (cell, line)
    return len(steps)


def test_a_step_with_nan_or_inf_changes_no_weight(run_ranks: RunRanks) -> None:
    assert_nonfinite_steps(run_ranks, CELLS)


def test_faults_in_memory_are_detected(run_ranks: RunRanks) -> None:
    assert_memory_faults(run_ranks, FEW, times=100)


def test_spikes_leave_no_trace(run_ranks: RunRanks, tmp_path: Path) -> None:
    assert_spikes(run_ranks, tmp_path, rewinds=[FP32[2], FP32[3]], skips=[(FP32[2], MUON), (OFFLOAD[0], {})])
