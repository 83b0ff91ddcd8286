"""Fifty signals, launchers that die, and ranks that do not agree whether to stop."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamask.checkpoint.run_folder import RunFolder
from megamask.errors import REQUEUE
from tests.processes import forked
from tests.processes.test_signals import check
from tests.system.command_lines import LINES, Place, export_for_tests
from tests.system.commands import ROOT, clean, free_port, training


def test_signals_at_random_points(apart: forked.Apart, tmp_path: Path, count: int = 50) -> None:
    check(apart("faults_worker:signals", tmp_path, count=count, seed=1), count)


def test_ranks_that_do_not_agree_are_found(apart: forked.Apart, tmp_path: Path) -> None:
    codes = apart("faults_worker:disagreeing", tmp_path)
    assert codes != [REQUEUE, REQUEUE]


LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc_per_node", "2", "--rdzv-backend", "static", "--master-port"],
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port"],
}
ENDINGS = [
    (name, which)
    for name in LAUNCHERS
    for which in (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
]  # fmt: skip


@pytest.mark.parametrize(("name", "which"), ENDINGS)
def test_no_rank_outlives_its_launcher(data: Path, tmp_path: Path, name: str, which: signal.Signals) -> None:
    output = tmp_path / "run"
    command = [*LAUNCHERS[name], str(free_port()), "megamask/pretrain.py"]
    arguments = training(data, output, steps=100_000, checkpoint__every=100_000, validation__every=100_000)
    with (tmp_path / "said.txt").open("wb") as log:
        launcher = subprocess.Popen(
            [*command, *arguments], cwd=ROOT, env=clean(), stdout=log, stderr=log,
            # a shell that has sent the tests to the background has it ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
    try:
        metrics, until = output / "logs" / "metrics.jsonl", time.monotonic() + 300
        while not (metrics.exists() and metrics.read_text().count("train/loss") > random.randint(1, 5)):
            assert launcher.poll() is None and time.monotonic() < until, (tmp_path / "said.txt").read_text()
            time.sleep(0.1)
        pids = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and str(output) in _command(pid)]
        handles = [os.pidfd_open(pid) for pid in pids if pid != launcher.pid]
        began = time.monotonic()
        launcher.send_signal(which)
        for handle in handles:
            assert select.select([handle], [], [], 120)[0], (tmp_path / "said.txt").read_text()
        print(f"{name}, {which.name}: {len(handles)} processes gone after {time.monotonic() - began:.1f} s")
    finally:
        for pid in os.listdir("/proc"):
            if pid.isdigit() and str(output) in _command(pid):
                os.kill(int(pid), signal.SIGKILL)
        print(f"exit code of the launcher: {launcher.wait()}")
    assert len(handles) >= 2
    assert len(RunFolder(output).steps()) == 1, "the last checkpoint"
    assert not list(output.rglob(".tmp*")) + list(output.rglob("beat-*"))


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def test_a_signal_during_the_real_imports_is_handled(data: Path, tmp_path: Path) -> None:
    """Sent while torch is imported, which takes seconds, to a process that runs pretrain.py as anybody would."""
    arguments = training(data, tmp_path / "run")
    run = subprocess.Popen([sys.executable, "megamask/pretrain.py", *arguments], cwd=ROOT, env=clean())
    while "libtorch_cpu" not in Path(f"/proc/{run.pid}/maps").read_text():
        time.sleep(0.001)
    run.send_signal(signal.SIGUSR1)
    assert run.wait(300) == REQUEUE
    assert RunFolder(tmp_path / "run").steps() == []


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to", ["parent", "group"])
@pytest.mark.parametrize("name", LINES)
def test_a_signal_ends_a_command_and_all_its_processes(
    name: str, to: str, which: signal.Signals, folder: Path, data: Path, finished: Path, tmp_path: Path, count: int = 5
) -> None:
    """At random moments, of the start of Python, of imports and of work; a process of its session is never left."""
    place = Place(tmp_path, data, finished, export_for_tests(finished, folder))
    command = [sys.executable, "-m", "megamask", *name.split(), *map(str, LINES[name](place))]
    for _ in range(count):
        began = time.monotonic()
        run = subprocess.Popen(
            command, cwd=ROOT, env=clean(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        try:
            run.wait(random.uniform(0, 8))
        except subprocess.TimeoutExpired:
            sent = time.monotonic()
            (os.kill if to == "parent" else os.killpg)(run.pid, which)
            assert run.wait(60) != 0
            while left := _of_session(run.pid):
                assert time.monotonic() < sent + 60, left
            print(f"{name}, {which.name} to the {to} after {sent - began:.1f} s: {time.monotonic() - sent:.1f} s")


def _of_session(number: int) -> list[str]:
    """The commands that run in a session."""
    pids = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == number and state != "Z":
            pids.append(_command(pid))
    return pids
