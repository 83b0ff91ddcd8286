"""A whole study with two arms, two seeds and two tasks: it resumes, refuses another plan, and stops with its runs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megamask.__main__ import main
from megamask.study.collect import read_results
from tests.system.commands import ADAMW, ROOT, TINY, Ended, clean, run

pytestmark = pytest.mark.slow
PLAN = """
name = "smoke"
question = "Does it run?"
seeds = [1, 2]
budgets = ["tokens=2048"]
deepspeed = ""
mean_tasks = ["sst2"]
mean_variant = "mean"
[[arm]]
name = "random"
role = "baseline"
recipe = "random-tiny"
[[arm]]
name = "entropy"
recipe = "entropy-self-probe-tiny"
[[evaluation]]
name = "frozen"
frozen = true
tasks = ["sst2", "blimp"]
[set]
"""


@pytest.fixture(scope="module")
def plan(folder: Path, data: Path) -> Path:
    """The plan, in a folder with its tasks."""
    path, tasks = folder / "smoke.toml", folder / "tasks"
    settings = {name.replace("-", "_"): value for name, value in (TINY | ADAMW).items()}
    path.write_text(PLAN + "".join(f"{json.dumps(name)} = {json.dumps(value)}\n" for name, value in settings.items()))
    tasks.mkdir()
    draw = random.Random(0)
    words = [["good", "fine"], ["bad", "poor"]]
    lines = [
        {
            "split": split,
            "label": label,
            "sentence": " ".join([draw.choice(words[label]), *draw.choices("abcdef", k=4)]),
        }
        for split, count in (("train", 60), ("dev", 30))
        for label in [0, 1] * (count // 2)
    ]
    pairs = [
        {"split": "test", "UID": uid, "sentence_good": f"{a} b c d", "sentence_bad": f"b c {a} d d"}
        for uid in ("first", "second")
        for a in "efgh"
    ]
    for name, some in (("glue_sst2", lines), ("blimp", pairs)):
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some))
    return path


def study(plan: Path, data: Path, output: Path, *more: object) -> Ended:
    """A call of the command in this process. Its runs and evaluations have processes of their own."""
    return run(main, "study", plan, "--data", data, "--tasks-data", plan.parent / "tasks", "--output", output, *more)


def test_a_study_runs_resumes_and_reports(plan: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "study"
    part = study(plan, data, output, "--only", "random/seed-1", "--jobs", "2")
    assert part.code == 0, part.out + part.err
    assert "done: 1 of these runs" in study(plan, data, output, "--dry-run").out
    ended = study(plan, data, output, "--jobs", "2")
    assert ended.code == 0, ended.out + ended.err
    assert "random/tokens=2048/seed-1: pretrain started" not in ended.out  # it was finished before

    runs, cells, references = read_results(output / "results.jsonl")
    assert set(runs) == set(cells) == {(arm, seed, "tokens=2048") for arm in ("random", "entropy") for seed in (1, 2)}
    assert all({cell.key.task for cell in some} == {"sst2", "blimp"} for some in cells.values())
    assert {cell.key.variant for cell in references} >= {"majority"}
    for (arm, _, _), result in runs.items():
        assert (result.state, result.steps, result.curve[-1].tokens) == ("finished", 4, result.tokens)
        assert (result.flops["scoring"] > 0) == (arm == "entropy")
    first, other = runs["random", 1, "tokens=2048"], runs["entropy", 1, "tokens=2048"]
    assert first.curve[0].loss == other.curve[0].loss  # the same start
    assert first.tokens == other.tokens

    files = {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*")}
    again = study(plan, data, output)
    assert again.code == 0 and "started" not in again.out
    assert {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*")} == files

    plan_of_another = tmp_path / "other.toml"
    plan_of_another.write_text(plan.read_text().replace('recipe = "random-tiny"', 'recipe = "frequency-tiny"'))
    (tmp_path / "tasks").symlink_to(plan.parent / "tasks")
    refused = study(plan_of_another, data, output)
    assert refused.code == 2 and "arm random.recipe" in refused.err


def test_a_failed_run_is_recorded_and_the_others_continue(plan: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "study"
    blocked = output / "runs" / "random" / "tokens=2048" / "seed-1"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("not a folder")
    short = tmp_path / "short.toml"
    short.write_text(plan.read_text().partition("[[evaluation]]")[0].replace('mean_tasks = ["sst2"]', ""))
    settings = plan.read_text().partition("[set]")[2]
    short.write_text(f"{short.read_text()}[set]{settings}")
    ended = study(short, data, output, "--only", "random/seed-1", "entropy/seed-1")
    assert ended.code == 1
    assert "random/tokens=2048/seed-1: pretrain failed" in ended.out
    runs, _, _ = read_results(output / "results.jsonl")
    assert {key[0]: result.state for key, result in runs.items()} == {"random": "failed", "entropy": "finished"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_all_runs(number: int, plan: Path, data: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "megamask", "study", plan, "--data", data, "--jobs", "2", "--output", tmp_path / "s"]
    words += ["--tasks-data", plan.parent / "tasks"]
    process = subprocess.Popen(list(map(str, words)), cwd=ROOT, env=clean(), stdout=subprocess.DEVNULL)
    parent, children = psutil.Process(process.pid), list[psutil.Process]()
    while len(children) < 2:
        children = parent.children(recursive=True)
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=60) == (-number if number == signal.SIGKILL else 128 + number)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


def test_dry_run_writes_nothing(plan: Path, data: Path, tmp_path: Path) -> None:
    ended = study(plan, data, tmp_path / "study", "--dry-run")
    assert ended.code == 0, ended.err
    for word in ("scoring FLOPs", "4 runs of 8,192 tokens", "disk:", "sign-flip", "time: unknown"):
        assert word in ended.out
    assert os.listdir(tmp_path) == []
