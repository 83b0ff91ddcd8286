"""Run the commands of a study in parallel, each on its share of the cores or on a GPU, and stop them with the study.

A run is a sequence of commands: `megamask pretrain`, then `megamask evaluate` for each evaluation. The end of each
command is recorded, so a study that was stopped continues with the next one. A command that was interrupted is called
again and resumes by itself. The study itself only waits: it uses less than a thousandth of a core.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from megamask.errors import REQUEUE, LockError
from megamask.runtime.child_process import child_environment, end_with_parent
from megamask.storage import atomic_write, strict_json
from megamask.storage.lock import Lock
from megamask.study.planned_runs import PlannedRun

CommandState = Literal["finished", "stopped", "failed"]
PRETRAIN = "pretrain"
"""The name of the first command of a run; the others have the names of evaluations."""
PATIENCE = 2.5
"""Seconds after a signal until commands that still run are killed. The study itself has 3 seconds."""
POLL = 0.2
"""Seconds between two checks of the commands."""


@dataclass(frozen=True)
class CommandRecord:
    """How a command of a run ended."""

    state: CommandState
    reason: str = ""
    """The last line that it printed, if it failed."""
    seconds: float = 0.0
    """Time of all its launches."""
    peak_memory: int = 0
    """Peak memory in bytes of the largest process of all its launches."""
    settings: str = ""
    """SHA-256 that identifies the result: `PlannedRun.settings`, or that of the settings of the evaluation."""


@dataclass(frozen=True)
class Slot:
    """A share of the machine for one run at a time."""

    cores: tuple[int, ...]
    gpu: str | None = None


@dataclass
class RunningCommand:
    """A command that has been started."""

    run: PlannedRun
    step: str
    slot: Slot
    lock: Lock
    """The lock of the run, so that several studies or tasks of an array can share the work."""
    process: subprocess.Popen
    started: float = field(default_factory=time.monotonic)


def find_slots(jobs: int | None) -> list[Slot]:
    """The shares for ``jobs`` runs at a time: a GPU each if there are any, and an equal part of the cores."""
    cores, gpus = sorted(os.sched_getaffinity(0)), visible_gpus()
    count = jobs or len(gpus) or 1
    shares = [tuple(cores[k * len(cores) // count : (k + 1) * len(cores) // count]) for k in range(count)]
    return [Slot(share or tuple(cores), gpus[k % len(gpus)] if gpus else None) for k, share in enumerate(shares)]


def visible_gpus() -> list[str]:
    """The names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in listed.split(",") if name.strip()]
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    return []


def megamask_command(subcommand: str, arguments: Sequence[str]) -> list[str]:
    """The words that start ``megamask subcommand``."""
    return [sys.executable, "-m", "megamask", subcommand, *arguments]


def read_record(run: PlannedRun) -> dict[str, CommandRecord]:
    """The commands of ``run`` that have ended, by name."""
    try:
        content = strict_json.read_json(run.record)
        return {name: CommandRecord(**record) for name, record in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # the commands themselves know what is there; a call of one that is finished is short


def command_settings(run: PlannedRun, step: str) -> str:
    """The hash that identifies the result of a command. If it has changed, the command must run again."""
    if step == PRETRAIN:
        return run.settings
    (evaluation,) = (each for each in run.evaluations if each.name == step)
    return f"{run.settings} {json.dumps(dict(evaluation.set), sort_keys=True)}"


def next_command(run: PlannedRun, record: dict[str, CommandRecord]) -> str:
    """The first command of ``run`` that is not finished; empty if all are."""
    for step in (PRETRAIN, *(each.name for each in run.evaluations)):
        known = record.get(step)
        if known is None or known.state != "finished" or known.settings != command_settings(run, step):
            return step
    return ""


def unfinished_runs(runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """Those of ``runs`` that have a command to run."""
    return [run for run in runs if next_command(run, read_record(run))]


class JobQueue:
    """A queue of runs, and the commands that are running."""

    def __init__(self, runs: Sequence[PlannedRun], slots: Sequence[Slot], tasks_data: str):
        self._waiting = unfinished_runs(runs)
        self._free, self._tasks_data = list(slots), tasks_data
        self._launch, self._busy = secrets.token_hex(4), list[PlannedRun]()
        self._started = list[RunningCommand]()
        self.running: list[RunningCommand] = []

    @property
    def unfinished(self) -> int:
        """The number of runs that wait or are running."""
        return len(self._waiting) + len(self.running)

    def start_next(self) -> None:
        """Start commands on the free slots, in order. A run waits for the run of its teacher."""
        while self._free and (run := next((each for each in self._waiting if self._is_ready(each)), None)):
            self._waiting.remove(run)
            run.record.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock = Lock(run.record.with_suffix(".lock"), self._launch)
            except LockError:
                self._busy.append(run)
                continue
            if step := next_command(run, read_record(run)):
                self._start(run, step, self._free.pop(0), lock)
            else:
                lock.close()

    def take_started(self) -> list[RunningCommand]:
        """The commands that were started, since the last call."""
        started, self._started = self._started, []
        return started

    def take_busy(self) -> list[PlannedRun]:
        """The runs that were found locked by another process since the last call."""
        busy, self._busy = self._busy, []
        return busy

    def finish(self) -> list[tuple[RunningCommand, CommandRecord]]:
        """Record and return the commands that have ended since the last call; start the next command of their runs."""
        ended = []
        for command in list(self.running):
            pid, status, usage = os.wait4(command.process.pid, os.WNOHANG)
            if not pid:
                continue
            self.running.remove(command)
            command.process.returncode = code = os.waitstatus_to_exitcode(status)
            record = _record(command, code, usage.ru_maxrss * 1024)
            ended.append((command, record))
            following = next_command(command.run, read_record(command.run)) if record.state == "finished" else ""
            if following:
                self._start(command.run, following, command.slot, command.lock)
            else:
                self._free.append(command.slot)
                command.lock.close()
        return ended

    def blocked(self) -> list[PlannedRun]:
        """Runs that cannot start because the run of their teacher failed or is not part of this call."""
        return [] if self.running or any(map(self._is_ready, self._waiting)) else list(self._waiting)

    def stop(self) -> None:
        """End all commands, within a few seconds."""
        for command in self.running:
            _signal_group(command.process.pid, signal.SIGTERM)
        end = time.monotonic() + PATIENCE
        while any(command.process.poll() is None for command in self.running) and time.monotonic() < end:
            time.sleep(0.05)
        for command in self.running:
            _signal_group(command.process.pid, signal.SIGKILL)  # what it started may outlive it
            command.process.wait()
            command.lock.close()
        self.running.clear()

    def _is_ready(self, run: PlannedRun) -> bool:
        if not run.arm.teacher:
            return True
        teacher = run.folder / "jobs" / run.arm.teacher / run.budget / f"seed-{run.seed}.json"
        with suppress(OSError, ValueError, KeyError, TypeError):
            return strict_json.read_json(teacher)[PRETRAIN]["state"] == "finished"
        return False

    def _start(self, run: PlannedRun, step: str, slot: Slot, lock: Lock) -> None:
        if step == PRETRAIN:
            words = megamask_command("pretrain", run.pretrain_arguments())
        else:
            (evaluation,) = (each for each in run.evaluations if each.name == step)
            words = megamask_command("evaluate", run.evaluate_arguments(evaluation, self._tasks_data))
        log = run.log(step)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=_environment(slot),
                start_new_session=True, preexec_fn=partial(_begin, slot.cores),
            )  # fmt: skip
        self.running.append(RunningCommand(run, step, slot, lock, process))
        self._started.append(self.running[-1])


def describe_end(command: RunningCommand, record: CommandRecord) -> str:
    """A log line about a command that has ended."""
    reason = f": {record.reason}" if record.reason else ""
    taken = tqdm.format_interval(time.monotonic() - command.started)
    return f"{command.run.name}: {command.step} {record.state} after {taken}{reason}"


def _begin(cores: tuple[int, ...]) -> None:
    """In the new process: use only the ``cores``, and receive SIGTERM when the study ends for any reason."""
    os.sched_setaffinity(0, cores)
    end_with_parent(signal.SIGTERM)


def _environment(slot: Slot) -> dict[str, str]:
    threads = str(len(slot.cores))
    own = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return child_environment() | own | ({"CUDA_VISIBLE_DEVICES": slot.gpu} if slot.gpu is not None else {})


def _record(command: RunningCommand, code: int, peak: int) -> CommandRecord:
    """Record that ``command`` ended with exit ``code``."""
    run, step = command.run, command.step
    known = read_record(run)
    before = known.get(step, CommandRecord("stopped"))
    state: CommandState = "finished" if code == 0 else "stopped" if code == REQUEUE else "failed"
    record = replace(
        before,
        state=state,
        reason=_last_line(run.log(step), code) if state == "failed" else "",
        seconds=before.seconds + time.monotonic() - command.started,
        peak_memory=max(before.peak_memory, peak),
        settings=command_settings(run, step),
    )
    everything: dict[str, Any] = {name: asdict(each) for name, each in (known | {step: record}).items()}
    atomic_write.write_atomic(run.record, json.dumps(everything, indent=1) + "\n")
    return record


def _last_line(log: Path, code: int) -> str:
    with suppress(OSError):
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        if lines:
            return f"{lines[-1][:500]} (exit code {code})"
    return f"exit code {code}"


def _signal_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
