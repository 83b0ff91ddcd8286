"""Where every rank is, left in files of the run folder, and what can be told from them when nothing moves any more.

    logs/beat-LAUNCH-RANK.txt     a line: where the rank is; its stacks below, if it hung. Removed at the end of a run
    logs/end-LAUNCH.txt           why a launch ended, if it was by an error: the exit code, then what was said

Files, because every rank can read those of one that is stopped, which answers no message. Nothing here raises an error
of storage: a folder that cannot be written costs one warning.
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
"""Bytes of a beat; stacks begin after them."""
WAITING = ("/torch/distributed/", "/deepspeed/comm/", "/deepspeed/runtime/zero/", "/deepspeed/runtime/comm/")
"""Where code lies in which a rank waits for others."""


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank is."""

    rank: int
    host: str = ""
    process: int = 0
    number: int = 0
    """How many phases it has entered. All ranks enter the same ones, so a lower number is one that is behind."""
    phase: str = ""
    step: int = 0
    seconds: float = 0.0
    """For how long it has been in the phase."""
    waits: str = ""
    """The collective in which it waits for others, if it does."""
    place: str = ""
    """The line of megamask at which its main thread is."""
    hung: bool = False
    """Whether it wrote this because nothing moves."""
    written: float = 0.0
    """By the clock of its host, in seconds since 1970."""


class Heartbeats:
    """The beats of all ranks of a launch and the word of its end, in the folder ``logs``, which is there."""

    def __init__(self, logs: Path, launch: str):
        self.logs, self.launch = logs, launch
        self.end = logs / f"end-{launch}.txt"
        self._warned = False
        self.handle: int | None = None
        """Of this rank's file, in which stacks go below the beat; None if there is none."""
        try:
            self.handle = os.open(self._path(ranks.rank()), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.lseek(self.handle, LINE, os.SEEK_SET)
        except OSError as error:
            self._warn(error)
        if ranks.is_main():
            self._sweep()

    def _path(self, rank: int) -> Path:
        return self.logs / f"beat-{self.launch}-{rank:05d}.txt"

    def _sweep(self) -> None:
        """Remove what launches that were killed have left, except for stacks."""
        for path in self.logs.glob("beat-*.txt"):
            with suppress(OSError):
                if self.launch not in path.name and path.stat().st_size <= LINE:
                    path.unlink()

    def close(self) -> None:
        """Remove this rank's beats, unless there are stacks below."""
        if self.handle is None:
            return
        with suppress(OSError):
            if os.fstat(self.handle).st_size <= LINE:
                self._path(ranks.rank()).unlink()
        os.close(self.handle)
        self.handle = None

    def write(self, beat: Heartbeat) -> bool:
        """Write a beat over the last one; whether that was possible."""
        if self.handle is None:
            return False
        line = json.dumps(asdict(replace(beat, written=time.time())))
        try:
            os.pwrite(self.handle, line[: LINE - 1].ljust(LINE - 1).encode() + b"\n", 0)
        except OSError as error:
            self._warn(error)
            return False
        return True

    def gather(self, patience: float) -> list[Heartbeat]:
        """The beats of all ranks, as soon as all are hung or at the end of ``patience``, in seconds."""
        until = time.monotonic() + patience
        while True:
            beats = [self._read(rank) for rank in range(ranks.world())]
            if time.monotonic() > until or all(beat.hung for beat in beats):
                return beats
            time.sleep(0.1)

    def _read(self, rank: int) -> Heartbeat:
        try:
            with open(self._path(rank), "rb") as file:
                return Heartbeat(**json.loads(file.read(LINE)))
        except (OSError, ValueError, TypeError):
            return Heartbeat(rank)

    def timed_out(self) -> list[Heartbeat]:
        """The last beats of ranks that their timers have ended: what those write stands below."""
        found = []
        for rank in range(ranks.world()):
            with suppress(OSError), open(self._path(rank), "rb") as file:
                file.seek(LINE)
                if file.read(9) == b"Timeout (":
                    found.append(self._read(rank))
        return found

    def claim_exit(self, code: int) -> bool:
        """Say with which exit code the launch ends; False if another rank has said so before."""
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
        """Say why, below."""
        with suppress(OSError), self.end.open("a", encoding="utf-8") as file:
            file.write(text.rstrip() + "\n")

    def exit_word(self, patience: float = 0.0) -> int | None:
        """The exit code that a rank has left; None if none has after ``patience``, in seconds."""
        until = time.monotonic() + patience
        while True:
            with suppress(OSError, ValueError):
                return int(self.end.read_text(errors="replace").partition("\n")[0].removeprefix("exit code "))
            if time.monotonic() >= until:
                return None
            time.sleep(0.05)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            warn(f"Rank {ranks.rank()} cannot write where it is to {self.logs}: {error.strerror}. Training goes on.")
        self._warned = True


def warn(text: str) -> None:
    """Say something, to whoever still listens."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def waits(frames: dict[int, FrameType]) -> str:
    """The name of the collective in which a thread waits, if any does: on a GPU, backward runs in one of its own."""
    for frame in frames.values():
        if any(part in frame.f_code.co_filename for part in WAITING):
            return frame.f_code.co_name
    return ""


def place(frames: dict[int, FrameType]) -> str:
    """The innermost line of megamask in the main thread, that of ``ranks`` aside."""
    here = str(Path(__file__).parent)
    frame: FrameType | None = frames.get(threading.main_thread().ident or 0)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(here) and file != ranks.__file__:
            return f"megamask/{Path(file).relative_to(here)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def blame(beats: Sequence[Heartbeat]) -> tuple[list[Heartbeat], str]:
    """Those who hold up the others, and why they are thought to; none if that cannot be told."""
    silent = [beat for beat in beats if not beat.hung]
    if silent:
        return silent, "did not answer: it is stopped, or in code that does not let Python run, or its machine is gone"
    busy = [beat for beat in beats if not beat.waits]
    behind = [beat for beat in busy if beat.number == min(other.number for other in busy)]
    if busy and len(behind) < len(beats):
        return behind, "waits for no other rank, and the others wait for it"
    places: dict[tuple, list[Heartbeat]] = {}
    for beat in beats:
        places.setdefault((beat.number, beat.place), []).append(beat)
    if busy or len(places) == 1:
        return [], ""
    # the fewest, and of as many the ones furthest ahead: to get there they have left out what the others wait in
    odd, other = sorted(places.values(), key=lambda group: (len(group), -group[0].number))[:2]
    if (len(odd), odd[0].number) == (len(other), other[0].number):
        return [], ""
    return odd, "waits for something else than the others"


def report(beats: Sequence[Heartbeat], seconds: float, limit: float) -> str:
    """What is known of a hang after so many ``seconds`` of which ``limit`` were allowed, as sentences."""
    lines = [
        f"Nothing has moved for {seconds:.0f} s; {limit:.0f} s are allowed "
        "(`watchdog.timeout`, `watchdog.rare_timeout`)."
    ]
    guilty, why = blame(beats)
    lines += accused(guilty, why)
    if not guilty:
        lines.append("None can be named: all wait in the same place, for the network or a device, or in several alike.")
    groups: dict[tuple, list[int]] = {}
    for beat in beats:
        groups.setdefault((beat.hung, beat.phase, beat.step, beat.waits, beat.place), []).append(beat.rank)
    for (hung, phase, step, waiting, where), members in groups.items():
        what = f"in {phase!r} after {step} steps" if phase else "never seen"
        what += f", waits in {waiting}" if waiting else ""
        what += f", at {where}" if where else ""
        lines.append(f"  rank {_list(members)}: {what}" + ("" if hung else ", when last seen"))
    return "\n".join(lines)


def accused(guilty: Sequence[Heartbeat], why: str) -> list[str]:
    """Sentences that name ranks, with what speaks against them."""
    lines = []
    for beat in guilty[:8]:
        who = f"Rank {beat.rank} (process {beat.process} on {beat.host})" if beat.process else f"Rank {beat.rank}"
        lines.append(f"{who} holds the run up: it {why}. {_last(beat)}")
    if len(guilty) > 8:
        lines.append(f"So do {len(guilty) - 8} more: {_list([beat.rank for beat in guilty[8:]])}.")
    return lines


def _last(beat: Heartbeat) -> str:
    if not beat.phase:
        return "It has left no beat."
    seconds = beat.seconds + (0 if beat.hung else max(time.time() - beat.written, 0))
    return f"It entered {beat.phase!r} after {beat.step} steps, {seconds:.0f} s ago."


def _list(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 -> 1-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
