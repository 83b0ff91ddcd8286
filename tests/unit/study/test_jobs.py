"""The queue of commands: order, records, failures, teachers, shares of the machine, and the end of everything."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megamask.storage.lock import Lock
from megamask.study import jobs
from megamask.study.jobs import CommandRecord, JobQueue, Slot, find_slots, next_command, read_record
from megamask.study.plan import PlannedArm, StudyPlan
from megamask.study.planned_runs import PlannedRun, plan_runs

SLOTS = [Slot((sorted(os.sched_getaffinity(0))[0],))]


@pytest.fixture
def runs(plan: StudyPlan, text: Path, tmp_path: Path) -> list[PlannedRun]:
    """Those of two arms, and of a third with the first as its teacher."""
    arm = PlannedArm("kd", "entropy-kd-complete-tiny", teacher="random")
    return plan_runs(replace(plan, arm=(*plan.arm, arm)), tmp_path, text)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Let every command be this line of Python, which finds the name of the subcommand in sys.argv[1]."""

    def script(line: str) -> None:
        monkeypatch.setattr(jobs, "megamask_command", lambda name, words: [sys.executable, "-c", line, name, *words])

    return script


def work(queue: JobQueue) -> list[str]:
    """Work until nothing is left; the commands as they end."""
    ended = []
    while queue.unfinished and not queue.blocked():
        queue.start_next()
        ended += [f"{command.run.name} {command.step} {record.state}" for command, record in queue.finish()]
        time.sleep(0.01)
    return ended


def test_commands_run_in_order_and_only_once(runs: list[PlannedRun], script) -> None:
    script("import os, sys; print(sys.argv[1], len(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'])")
    expected = [f"{run.name} {step} finished" for run in runs[:2] for step in ("pretrain", "frozen")]
    queue = JobQueue(runs[:2], SLOTS, "")
    assert work(queue) == expected
    assert [f"{command.run.name} {command.step} finished" for command in queue.take_started()] == expected
    assert not queue.take_started()
    assert runs[0].log("frozen").read_text() == "evaluate 1 1\n"
    record = read_record(runs[0])["pretrain"]
    assert record.state == "finished" and record.peak_memory > 2**20 and record.seconds > 0
    assert JobQueue(runs[:2], SLOTS, "").unfinished == 0


def test_a_changed_evaluation_is_computed_again(runs: list[PlannedRun], script) -> None:
    script("")
    work(JobQueue(runs[:1], SLOTS, ""))
    (evaluation,) = runs[0].evaluations
    changed = replace(runs[0], evaluations=(replace(evaluation, set={**evaluation.set, "max_train": 5}),))
    assert next_command(changed, read_record(changed)) == "frozen"


def test_a_failure_is_recorded_with_the_last_line_and_tried_again(runs: list[PlannedRun], script) -> None:
    script("import sys; print('first', flush=True); sys.exit('the reason' if sys.argv[1] == 'evaluate' else 0)")
    assert work(JobQueue(runs[:1], SLOTS, ""))[-1].endswith("frozen failed")
    record = read_record(runs[0])["frozen"]
    assert record.reason == "the reason (exit code 1)"
    script("")
    assert work(JobQueue(runs[:1], SLOTS, "")) == [f"{runs[0].name} frozen finished"]
    assert read_record(runs[0])["frozen"].seconds > record.seconds


def test_a_run_that_was_stopped_is_not_evaluated(runs: list[PlannedRun], script) -> None:
    script("import sys; sys.exit(75)")
    assert work(JobQueue(runs[:1], SLOTS, "")) == [f"{runs[0].name} pretrain stopped"]


def test_a_run_waits_for_its_teacher(runs: list[PlannedRun], script) -> None:
    script("")
    teacher, pupil = runs[0], runs[2]
    queue = JobQueue([pupil], SLOTS, "")
    assert work(queue) == [] and queue.blocked() == [pupil]
    names = [line.partition("/")[0] for line in work(JobQueue([pupil, teacher], SLOTS * 2, ""))]
    assert names == ["random", "random", "kd", "kd"]


def test_a_run_of_another_process_is_left_to_it(runs: list[PlannedRun], script) -> None:
    script("")
    runs[0].record.parent.mkdir(parents=True)
    lock = Lock(runs[0].record.with_suffix(".lock"), "other")
    queue = JobQueue(runs[:2], SLOTS, "")
    assert [line.partition("/")[0] for line in work(queue)] == ["probe", "probe"]
    assert queue.take_busy() == [runs[0]]
    lock.close()


def test_stop_ends_commands_that_ignore_signals_and_what_they_started(runs: list[PlannedRun], script) -> None:
    script(
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    queue = JobQueue(runs[:2], SLOTS * 2, "")
    queue.start_next()
    for command in queue.running:
        while "ready" not in command.run.log("pretrain").read_text():
            time.sleep(0.02)
    commands = [psutil.Process(command.process.pid) for command in queue.running]
    processes = [*commands, *(child for each in commands for child in each.children(recursive=True))]
    assert len(processes) >= 4
    queue.stop()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == [] and queue.running == []
    assert read_record(runs[0]) == {}


def test_a_damaged_record_counts_as_nothing_known(runs: list[PlannedRun]) -> None:
    runs[0].record.parent.mkdir(parents=True)
    for content in ("{", "[]", '{"pretrain": {"colour": 1}}'):
        runs[0].record.write_text(content)
        assert read_record(runs[0]) == {}
    runs[0].record.write_text(json.dumps({"pretrain": {"state": "stopped"}}))
    assert read_record(runs[0]) == {"pretrain": CommandRecord("stopped")}


def test_the_machine_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_slots(None) == [Slot((0, 1, 2, 3, 4))]
    assert find_slots(2) == [Slot((0, 1)), Slot((2, 3, 4))]
    assert len(find_slots(7)) == 7
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert [slot.gpu for slot in find_slots(None)] == ["3", "GPU-5"]
    assert [slot.gpu for slot in find_slots(3)] == ["3", "GPU-5", "3"]
