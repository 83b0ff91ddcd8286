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
        found = [job("spiked", plant=plant)]
        if self.policy == "skip":
            found.append(job("whole", drop=[AT]))
        else:
            where = {"source": str(self.run), "target": str(self.folder / "whole")}
            found.append(job("whole", begin=where | {"step": BACK, "ledger": LEDGER, "per_step": world}))
        return [*found, job("log", plant=plant, settings={})] if self.control else found

    def check(self, said: list[tuple[dict, ...]]) -> None:
        """The run equals the one without a spike, and differs from the one under the policy `log`."""
        for ranks in said:
            assert all(rank["code"] == 0 for rank in ranks), [rank["err"] for rank in ranks]
        told = said[0][0]["out"]
        assert told.count("is a spike") == 1 and f"Step {AT + 1} is a spike" in told, told
        assert ("Rewound from step 6 to step 3" in told) == (self.policy == "rewind")
        found, whole = (tensors(self.folder / name, STEPS) for name in ("spiked", "whole"))
        assert found.keys() == whole.keys()
        assert [name for name in whole if not torch.equal(found[name], whole[name])] == [], self
        if self.control:
            log = tensors(self.folder / "log", STEPS)
            assert any(not torch.equal(log[name], whole[name]) for name in whole)
        figures = metrics(self.folder / "whole", "train/loss", "grad_norm", "lr")
        ours = metrics(self.run, "train/loss", "grad_norm", "lr")
        assert {key: value for key, value in ours.items() if key in figures} == figures and len(figures) >= 3 * 5
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


def assert_numbers(
    run_ranks: RunRanks,
    folder: Path,
    cells: list[dict],
    few: list[dict],
    times: int,
    *,
    rewinds: list[dict],
    skips: list[tuple[dict, dict[str, object]]],
    world: int = 2,
) -> None:
    """Everything that `numbers_worker` tries, on ``world`` ranks of which one is at fault.

    ``rewinds`` are DeepSpeed files under which a run goes back from a spike, ``skips`` such files and settings under
    which it is dropped.
    """
    data = shards(folder)
    runs = [Spiked("rewind", ds, {}, folder / f"rewind-{n}") for n, ds in enumerate(rewinds)]
    runs += [Spiked("skip", ds, settings, folder / f"skip-{n}", not n) for n, (ds, settings) in enumerate(skips)]
    jobs = [run.jobs(data, world) for run in runs]
    said = run_ranks(
        world,
        "numbers_worker:everything",
        cells=cells,
        few=few,
        times=times,
        jobs=[*itertools.chain(*jobs)],
        timeout=1800,
    )
    launches = zip(*(rank["spiked"] for rank in said), strict=True)
    for run, those in zip(runs, jobs, strict=True):
        run.check([next(launches) for _ in those])
    tried = 0
    for cell, answers in enumerate(zip(*(rank["poisoned"] for rank in said), strict=True)):
        tried += assert_dropped(cells[cell], list(zip(*answers, strict=True)))
    published = seen = false = 0
    for rank in said:
        # the negative controls: unjudged, the weights are spoilt; unasked, the other ranks would not know
        assert rank["unjudged"]["poison"] and not rank["unjudged"]["together"]
        published += sum(cell["published"] for cell in rank["spoilt"])
        seen += sum(cell["seen"] for cell in rank["flipped"])
        false += sum(cell["false"] for cell in rank["flipped"])
        assert all(cell["tried"] >= 12 for cell in rank["spoilt"])
    assert [rank["unjudged"]["mine"] for rank in said] == [rank != GUILTY for rank in range(world)]
    # at stage 3 there are no copies
    copies = sum(cell["zero_optimization"]["stage"] < 3 for cell in few)
    assert (published, seen, false) == (0, world * copies * times, 0)
    spoilt = sum(cell["tried"] for cell in said[0]["spoilt"])
    print(
        f"{tried} steps with NaN or Inf in {len(cells)} cells: 0 moved a weight; {spoilt} spoilt states: "
        f"0 published; {copies * times} flipped bits: all seen, {copies * times} looks without one: 0 alarms; "
        f"{len(rewinds)} runs that went back from a spike and {len(skips)} that dropped one: 0 differ"
    )


def assert_dropped(cell: dict, answers: list[tuple[dict, ...]]) -> int:
    """All ranks decide alike, nothing moves, and the line names the cause and the rank; returns the number of steps."""
    *steps, after = answers
    # and the next step is that of a run in which nothing was wrong
    assert all(answer["same"] for answer in after), cell
    assert len(steps) == len(PLACES) * len(BAD)
    for number, said in enumerate(steps):
        place, line = PLACES[number // len(BAD)], said[0]["said"]
        assert all(answer == said[0] for answer in said), (cell, place)
        assert not said[0]["moves"] and said[0]["same"], (cell, place)
        assert f"Step {number + 2} was dropped" in line and "(packs " in line
        assert "the gradient of " in line or place == "loss", (cell, line)
        if place != "gradient":
            assert f"on rank {GUILTY}" in line and "on rank 0" not in line, (cell, line)
        assert ("the teacher's loss at pack" in line) == (place == "teacher"), (cell, line)
    return len(steps)


def test_nonfinite_steps_flipped_bits_and_spikes_leave_no_trace(run_ranks: RunRanks, tmp_path: Path) -> None:
    rewinds, skips = [FP32[2], FP32[3]], [(FP32[2], MUON), (OFFLOAD[0], {})]
    assert_numbers(run_ranks, tmp_path, CELLS, FEW, times=100, rewinds=rewinds, skips=skips)
