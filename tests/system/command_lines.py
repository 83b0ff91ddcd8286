"""A short command line of every subcommand that works, for tests of what every command must do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megamask.__main__ import main
from tests.system.commands import TINY, flags, run, training
from tests.unit.evaluation.files import LINES as TASK_LINES
from tests.unit.evaluation.files import write_lines


@dataclass(frozen=True)
class Place:
    """A folder for what a command writes, and what it reads: shards, a finished run, its export."""

    folder: Path
    data: Path
    run: Path
    model: Path

    @property
    def output(self) -> Path:
        """What the command is asked to write, if it writes anything."""
        return self.folder / "output"

    @property
    def shards(self) -> Path:
        """Shards of its own, for commands that write beside them."""
        if not (self.folder / "shards").exists():
            shutil.copytree(self.data, self.folder / "shards")
        return self.folder / "shards"


def export_for_tests(finished: Path, folder: Path) -> Path:
    """The export of a finished run, made once."""
    if not (folder / "exported-model").exists():
        made = run(main, "export", "--run", finished, "--output", folder / "exported-model")
        assert made.code == 0, made.err
    return folder / "exported-model"


def _targets(place: Place) -> list[object]:
    stored = {"distill.stored": place.output, "distill.weight.start": 0.5, "teacher.path": place.run}
    run_flags = {"data": place.data, "recipe": "random-tiny", "steps": 2} | TINY | stored
    return [*flags(run_flags), "--draws", 4, "--workers", 1]


def _frozen(place: Place) -> list[object]:
    tasks = place.folder / "tasks"
    if not tasks.exists():
        tasks.mkdir()
        write_lines(tasks / "sst2.jsonl", TASK_LINES)
    return ["--model", place.model, "--data", tasks, "--output", place.output, "--frozen"]


SMALL_TEXT = ["--tokenizer", "wordpiece", "--vocab-size", 300, "--valid-share", 0.2, "--workers", 1]
LINES: dict[str, Callable[[Place], list[object]]] = {
    "prepare": lambda at: ["--input", at.data.parent / "corpus.txt", "--output", at.output, *SMALL_TEXT],
    "pretrain": lambda at: training(at.data, at.output, steps=2, validation__every=2),
    "export": lambda at: ["--run", at.run, "--output", at.output],
    "import": lambda at: ["--model", at.model, "--output", at.output],
    "annotate entropy": lambda at: ["--data", at.shards, "--teacher", at.run, "--length", 64, "--workers", 1],
    "annotate targets": _targets,
    "show-masks": lambda at: ["--model", at.model, "--sentence", "a b."],
    "analyze-rank": lambda at: ["--run", at.run, "--output", at.output, "--tokens", 500, "--length", 64],
    "inspect": lambda at: ["--run", at.run],
    "doctor": lambda at: training(at.data, at.output, steps=2),
    "replay": lambda at: ["--run", at.run, "--step", 6],
    "evaluate": _frozen,
    "bench": lambda at: [
        *["--data", at.data, "--json", at.output, "--preset", "bert", "--precisions", "fp32"],
        *["--rounds", 1, "--steps", 1, "--length", 32, "--pack-tokens", 128],
    ],
}  # fmt: skip
"""The arguments of each subcommand, with an output in a folder of its own."""
WRITE_NOTHING = {"show-masks", "inspect", "doctor"}
ELSEWHERE = {"study", "bench-gpu"}
"""Commands that start the ones above; their own tests try this."""
