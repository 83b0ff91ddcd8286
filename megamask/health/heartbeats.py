"""Heartbeat files: where every rank is, readable by the others when the run makes no progress.

    logs/beat-LAUNCH-RANK.txt   one line: where the rank is; below it its stacks, after a hang; removed at a normal end
    logs/end-LAUNCH.txt         the exit code of a launch that failed, then the error message

They are files because a stopped process answers no message, but its last heartbeat can still be read. Nothing here
raises an error of the file system: if the folder cannot be written, a rank prints one warning.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

from megamask.runtime import ranks

LINE = 512
"""Bytes of a heartbeat; stacks begin after them."""
COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", "/deepspeed/runtime/zero/", "/deepspeed/runtime/comm/")
"""Folders whose code waits for other ranks."""
PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank is."""

    rank: int
    host: str = ""
    process: int = 0
    phase_number: int = 0
    """How many phases it has entered. All ranks enter the same phases, so a rank with a lower number is behind."""
    phase: str = ""
    step: int = 0
    seconds: float = 0.0
    """Time in the phase."""
    collective: str = ""
    """The collective in which it waits for other ranks, if any."""
    location: str = ""
    """The line of megamask that its main thread executes."""
    hung: bool = False
    """Whether it wrote this because the run makes no progress."""
    written: float = 0.0
    """By the clock of its host, in seconds since 1970."""


class Heartbeats:
    """The heartbeats of all ranks of a launch, and its exit code, in the existing folder ``logs``."""

    def __init__(self, logs: Path, launch: str):
        self.logs, self.launch = logs, launch
        self.end = logs / f"end-{launch}.txt"
        self._warned = False
        self.handle: int | None = None
        """The open file of this rank, for stacks below the heartbeat; None if it could not be opened."""
        try:
            self.handle = os.open(self._path(ranks.rank()), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.lseek(self.handle, LINE, os.SEEK_SET)
        except OSError as error:
            self._warn(error)
        if ranks.is_main():
            self._remove_stale()

    def _path(self, rank: int) -> Path:
        return self.logs / f"beat-{self.launch}-{rank:05d}.txt"

    def _remove_stale(self) -> None:
        """Remove the heartbeats of launches that were killed, except for those with stacks."""
        for path in self.logs.glob("beat-*.txt"):
            with suppress(OSError):
                if self.launch not in path.name and path.stat().st_size <= LINE:
                    path.unlink()

    def close(self) -> None:
        """Remove this rank's heartbeat, unless it has stacks."""
        if self.handle is None:
            return
        with suppress(OSError):
            if os.fstat(self.handle).st_size <= LINE:
                self._path(ranks.rank()).unlink()
        os.close(self.handle)
        self.handle = None

    def write(self, heartbeat: Heartbeat) -> bool:
        """Overwrite this rank's heartbeat; returns whether that was possible."""
        if self.handle is None:
            return False
        line = json.dumps(asdict(replace(heartbeat, written=time.time())))
        try:
            os.pwrite(self.handle, line[: LINE - 1].ljust(LINE - 1).encode() + b"\n", 0)
        except OSError as error:
            self._warn(error)
            return False
        return True

    def gather(self, timeout: float) -> list[Heartbeat]:
        """The heartbeats of all ranks, as soon as all are hung, at the latest after ``timeout`` seconds."""
        until = time.monotonic() + timeout
        while True:
            heartbeats = [self._read(rank) for rank in range(ranks.world())]
            if time.monotonic() > until or all(heartbeat.hung for heartbeat in heartbeats):
                return heartbeats
            time.sleep(0.1)

    def _read(self, rank: int) -> Heartbeat:
        try:
            with open(self._path(rank), "rb") as file:
                return Heartbeat(**json.loads(file.read(LINE)))
        except (OSError, ValueError, TypeError):
            return Heartbeat(rank)

    def timed_out(self) -> list[Heartbeat]:
        """The last heartbeats of ranks that their timers have killed, recognized by the stacks that timers write."""
        heartbeats = []
        for rank in range(ranks.world()):
            with suppress(OSError), open(self._path(rank), "rb") as file:
                file.seek(LINE)
                if file.read(9) == b"Timeout (":
                    heartbeats.append(self._read(rank))
        return heartbeats

    def claim_exit(self, code: int) -> bool:
        """Write the exit code of the launch; False if another rank has written one already."""
        try:
            handle = os.open(self.end, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        except OSError as error:
            self._warn(error)
            return True
        with suppress(OSError):
            os.write(handle, f"exit code {code}\n".encode())
        os.close(handle)
        return True

    def append_reason(self, text: str) -> None:
        """Write the reason below the exit code."""
        with suppress(OSError), self.end.open("a", encoding="utf-8") as file:
            file.write(text.rstrip() + "\n")

    def exit_code(self, timeout: float = 0.0) -> int | None:
        """The exit code that a rank has written; None if there is none after ``timeout`` seconds."""
        until = time.monotonic() + timeout
        while True:
            with suppress(OSError, ValueError):
                return int(self.end.read_text(errors="replace").partition("\n")[0].removeprefix("exit code "))
            if time.monotonic() >= until:
                return None
            time.sleep(0.05)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            write_stderr(
                f"Rank {ranks.rank()} cannot write its heartbeat to {self.logs}: {error.strerror}. Training continues."
            )
        self._warned = True


def write_stderr(text: str) -> None:
    """Print to stderr, unless it is closed or fails."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def current_collective(frames: dict[int, FrameType]) -> str:
    """The collective in which a thread waits, if any. All threads count: on a GPU, backward runs in its own."""
    for frame in frames.values():
        if any(folder in frame.f_code.co_filename for folder in COLLECTIVES):
            return frame.f_code.co_name
    return ""


def current_location(frames: dict[int, FrameType]) -> str:
    """The innermost line of megamask in the main thread, other than in ``ranks``."""
    frame: FrameType | None = frames.get(threading.main_thread().ident or 0)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE) and str(file) != ranks.__file__:
            return f"megamask/{file.relative_to(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def find_culprits(heartbeats: Sequence[Heartbeat]) -> tuple[list[Heartbeat], str]:
    """The ranks that block the others, and the evidence as the end of a sentence; no ranks if they cannot be told."""
    silent = [heartbeat for heartbeat in heartbeats if not heartbeat.hung]
    if silent:
        return silent, "did not answer: it is stopped, or in code that blocks Python, or its machine is down"
    busy = [heartbeat for heartbeat in heartbeats if not heartbeat.collective]
    behind = [one for one in busy if one.phase_number == min(other.phase_number for other in busy)]
    if busy and len(behind) < len(heartbeats):
        return behind, "waits for no other rank, and the others wait for it"
    by_location: dict[tuple[int, str], list[Heartbeat]] = {}
    for heartbeat in heartbeats:
        by_location.setdefault((heartbeat.phase_number, heartbeat.location), []).append(heartbeat)
    if busy or len(by_location) == 1:
        return [], ""
    # the smallest group, of equal ones the one furthest ahead: to get there, it skipped what the others wait in
    first, second = sorted(by_location.values(), key=lambda group: (len(group), -group[0].phase_number))[:2]
    if (len(first), first[0].phase_number) == (len(second), second[0].phase_number):
        return [], ""
    return first, "waits in another collective than the others"


def hang_report(heartbeats: Sequence[Heartbeat], seconds: float, limit: float) -> str:
    """Sentences about a hang of ``seconds``, where ``limit`` are allowed: the culprits, and where all ranks are."""
    lines = [
        f"No progress for {seconds:.0f} s, but {limit:.0f} s are allowed (`watchdog.timeout`, `watchdog.rare_timeout`)."
    ]
    culprits, evidence = find_culprits(heartbeats)
    lines += describe_culprits(culprits, evidence)
    if not culprits:
        lines.append(
            "No single rank can be blamed: all wait in the same collective, for the network or a device, or in several "
            "equally large groups."
        )
    groups: dict[tuple[bool, str, int, str, str], list[int]] = {}
    for one in heartbeats:
        groups.setdefault((one.hung, one.phase, one.step, one.collective, one.location), []).append(one.rank)
    for (hung, phase, step, collective, location), members in groups.items():
        where = f"in {phase!r} after {step} steps" if phase else "no heartbeat"
        where += f", waits in {collective}" if collective else ""
        where += f", at {location}" if location else ""
        lines.append(f"  rank {_ranges(members)}: {where}" + ("" if hung else ", when last seen"))
    return "\n".join(lines)


def describe_culprits(culprits: Sequence[Heartbeat], evidence: str) -> list[str]:
    """Sentences that name ranks, with the ``evidence`` against them."""
    lines = []
    for one in culprits[:8]:
        name = f"Rank {one.rank} (process {one.process} on {one.host})" if one.process else f"Rank {one.rank}"
        lines.append(f"{name} blocks the run: it {evidence}. {_last_phase(one)}")
    if len(culprits) > 8:
        lines.append(f"So do {len(culprits) - 8} more: {_ranges([one.rank for one in culprits[8:]])}.")
    return lines


def _last_phase(heartbeat: Heartbeat) -> str:
    if not heartbeat.phase:
        return "It has written no heartbeat."
    seconds = heartbeat.seconds + (0 if heartbeat.hung else max(time.time() - heartbeat.written, 0))
    return f"It entered {heartbeat.phase!r} after {heartbeat.step} steps, {seconds:.0f} s ago."


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 -> 1-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
