"""`megamask evaluate` as a user runs it: stopped in the middle, continued, with several workers, and done."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megamask.evaluation.cells import read_cells
from tests.system.commands import ROOT, clean, content, shell
from tests.unit.evaluation.files import write_lines
from tests.unit.evaluation.models import save_model, sentences

pytestmark = pytest.mark.slow
NAMES = ("cola", "sst2", "subj", "mrpc", "wnli", "trec")
"""Tasks of the test."""


def task_lines(name: str) -> list[dict[str, object]]:
    """Examples whose label is a word of the text."""
    lines: list[dict[str, object]] = []
    for number, text in enumerate(sentences(300)):
        label = number % 2
        fields = ("sentence1", "sentence2") if name in ("mrpc", "wnli") else ("sentence",)
        words = f"{text} {'good' if label else 'bad'}"
        named = ("HUM", "LOC")[label] if name == "trec" else label
        lines.append({"split": "train" if number < 200 else "dev", "label": named} | dict.fromkeys(fields, words))
    return lines


def command(folder: Path, output: str, *more: object) -> list[str]:
    """The frozen evaluation of the model in ``folder``."""
    words = ("--model", folder / "model", "--data", folder / "tasks", "--output", folder / output, "--frozen", *more)
    return [sys.executable, "-m", "megamask", "evaluate", *map(str, words)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tasks."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_model(folder / "model")
    (folder / "tasks").mkdir()
    for name in NAMES:
        write_lines(folder / "tasks" / f"{name}.jsonl", task_lines(name))
    return folder


def test_a_stopped_evaluation_continues_and_workers_change_no_prediction(folder: Path) -> None:
    output = folder / "stopped"
    process = subprocess.Popen(
        command(folder, "stopped", "--workers", 2), cwd=ROOT, env=clean(), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(output.glob("cells/*/*.frozen.first.*.json")) and process.poll() is None:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert not psutil.wait_procs(children, timeout=10)[1]
    finished = content(output / "cells")
    assert 0 < len(read_cells(output)) < 4 * len(NAMES)

    ended = shell(*command(folder, "stopped"))
    assert ended.code == 0 and "are in" in ended.err
    assert finished.items() <= content(output / "cells").items()
    cells = read_cells(output)
    assert len(cells) == 4 * len(NAMES)  # two kinds of pooling, two references

    assert shell(*command(folder, "again", "--workers", 2)).code == 0
    again = read_cells(folder / "again")
    assert {key: cell.predictions for key, cell in again.items()} == {
        key: cell.predictions for key, cell in cells.items()
    }

    everything = content(output)
    ended = shell(*command(folder, "stopped"))
    assert ended.code == 0 and f"{3 * len(NAMES)} of {3 * len(NAMES)} results are in" in ended.err
    assert content(output) == everything
    assert (output / "results.md").read_text() in ended.out


def test_all_problems_are_reported_before_the_model_is_opened(folder: Path) -> None:
    ended = shell(*command(folder, "never", "--tasks", "sst2", "ruby", "--seeds", "3", "--max-pairs", "5"))
    assert ended.code == 2
    assert all(name in ended.err for name in ("`ruby` is not known", "`seeds` has no", "`max_pairs` has no"))
    assert not (folder / "never").exists()
