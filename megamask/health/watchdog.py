"""Watchdog: a run that makes no progress ends, with the stacks of all ranks and the name of the one that blocks it.

A stuck rank blocks all others in their next collective, where no error appears for hours. So each rank registers the
phase that it enters, and a thread of its own checks twice a second whether the phase takes too long. Then each rank
writes its stacks below its heartbeat (`heartbeats`), one rank prints which rank blocks the others, and all exit with
code 6. If C code blocks Python, the thread cannot run; a timer of ``faulthandler``, which needs no Python, kills the
rank.

The same files tell a rank whose collective fails that another rank failed first, so that one error is printed once and
ends all ranks.

Costs two readings of a clock per phase.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from megamask.errors import REQUEUE, HangError, MegamaskError, PeerLostError
from megamask.health.heartbeats import (
    Heartbeat,
    Heartbeats,
    current_collective,
    current_location,
    describe_culprits,
    hang_report,
    write_stderr,
)
from megamask.health.settings import WatchdogConfig as WatchdogConfig
from megamask.health.stop_signals import StopRequest
from megamask.runtime import ranks
from megamask.runtime.entry_point import as_problem

INTERVAL = 0.5
"""Seconds between two checks."""
GRACE = 3.0
"""Seconds that ranks give each other to write their heartbeats and exit codes."""
ORPHAN_TIMEOUT = 8.0
"""Seconds in which a rank without its launcher must have begun its last checkpoint."""
FREQUENT = ("data", "step")
"""Phases limited by `watchdog.timeout`, except for the first of each; the others are limited by
`watchdog.rare_timeout`."""
CURE = "The same command resumes from the newest checkpoint."


@dataclass(frozen=True)
class Phase:
    """What a rank does, since when, and for how many seconds it may."""

    name: str
    step: int
    number: int
    """How many phases the rank has entered."""
    since: float
    limit: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since


class Watchdog:
    """Watches this rank from the beginning of a run to its end."""

    def __init__(self, config: WatchdogConfig, stop: StopRequest):
        self._config, self._stop = config, stop
        self._heartbeats: Heartbeats | None = None
        self._entered: set[str] = set()
        self._phase = Phase("joining", 0, 1, time.monotonic(), config.rare_timeout)
        self._checked_phase = 0
        self._next_exit_check = 0.0
        """Seconds of the phase after which the thread looks for an exit code."""
        self._last_written = -1e9
        self._orphaned_since: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop_thread()
        if self._heartbeats:
            self._heartbeats.close()

    @property
    def collective_timeout(self) -> timedelta:
        """The timeout of collectives, long enough that the watchdog acts first."""
        return timedelta(seconds=2 * self._config.rare_timeout) if self._config.timeout else timedelta(days=7)

    def start_heartbeats(self, logs: Path, launch: str) -> None:
        """Write heartbeats of this rank, and stacks, to the folder ``logs`` from now on."""
        self._heartbeats = Heartbeats(logs, launch)
        if self._config.timeout:  # a rank may get stuck before its next check
            self._heartbeats.write(self._heartbeat())
            self._set_timer()

    def enter_phase(self, name: str, step: int = 0) -> None:
        """Register that this rank enters a phase."""
        limit = self._config.timeout if name in FREQUENT and name in self._entered else self._config.rare_timeout
        self._entered.add(name)
        # one assignment, so that the thread never sees half of it
        self._phase = Phase(name, step, self._phase.number + 1, time.monotonic(), limit)

    # ---- in the thread

    def _watch(self) -> None:
        while not self._closed.wait(INTERVAL):
            try:
                self._exit_if_orphaned()
                if self._config.timeout:
                    self._check()
            except Exception as error:  # a bug of the watchdog must not end the run
                write_stderr(f"The watchdog of rank {ranks.rank()} has stopped: {type(error).__name__}: {error}")
                faulthandler.cancel_dump_traceback_later()
                return

    def _check(self) -> None:
        phase, heartbeats = self._phase, self._heartbeats
        seconds = phase.seconds
        if phase.number != self._checked_phase:
            self._checked_phase, self._next_exit_check = phase.number, 0.0
        self._set_timer()
        if heartbeats and time.monotonic() - self._last_written > self._config.timeout / 60:
            self._last_written = time.monotonic()
            heartbeats.write(self._heartbeat())
        code = None
        if heartbeats and seconds > self._next_exit_check and (seconds > GRACE or self._stop.this_rank()):
            self._next_exit_check = seconds + GRACE / 2  # not in every check, to spare a shared file system
            code = heartbeats.exit_code()
        if heartbeats and code is not None and code != HangError.exit_code:
            heartbeats.close()
            os._exit(code)
        if code or seconds > phase.limit:
            self._exit_hung(seconds, phase.limit)

    def _set_timer(self) -> None:
        """Restart the timer. It expires when no check has run for as long as a step may take."""
        # a single rank writes to stderr, because no other rank would point to its file
        file = self._heartbeats.handle if self._heartbeats and ranks.world() > 1 else None
        faulthandler.dump_traceback_later(self._config.timeout + GRACE, exit=True, file=file or 2)

    def _heartbeat(self) -> Heartbeat:
        phase = self._phase
        process = (ranks.rank(), socket.gethostname(), os.getpid())
        return Heartbeat(*process, phase.number, phase.name, phase.step, phase.seconds)

    def _exit_if_orphaned(self) -> None:
        """No launcher would end a rank whose launcher is gone, so it ends itself, after its last checkpoint."""
        if not self._stop.orphaned():
            return
        self._orphaned_since = self._orphaned_since or time.monotonic()
        if time.monotonic() - self._orphaned_since > ORPHAN_TIMEOUT and self._phase.name != "save":
            os._exit(REQUEUE)

    def _exit_hung(self, seconds: float, limit: float) -> None:
        """Write this rank's stacks, wait for those of the others, print which rank is to blame, and exit."""
        faulthandler.dump_traceback_later(GRACE + 2, exit=True, file=2)  # in case the file system hangs
        frames = {thread: f for thread, f in sys._current_frames().items() if thread != threading.get_ident()}
        own = replace(
            self._heartbeat(),
            hung=True,
            collective=current_collective(frames),
            location=current_location(frames),
        )
        heartbeats = self._heartbeats
        if heartbeats and heartbeats.write(own) and heartbeats.handle is not None:
            heartbeats.claim_exit(HangError.exit_code)
            faulthandler.dump_traceback(heartbeats.handle)
            of_ranks = heartbeats.gather(GRACE)
        else:
            faulthandler.dump_traceback(2)
            of_ranks = [own]
        if own.rank == min(heartbeat.rank for heartbeat in of_ranks if heartbeat.hung):
            text = hang_report(of_ranks, seconds, limit)
            if heartbeats:
                heartbeats.append_reason(text)
                text += f"\n{_where(heartbeats)}"
            write_stderr(f"{text}\n{CURE}")
        os._exit(HangError.exit_code)

    # ---- at the end

    def _stop_thread(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            if self._checked_phase or self._heartbeats:
                faulthandler.cancel_dump_traceback_later()

    def error_to_report(self, error: Exception) -> Exception:
        """The error with which this rank should end after ``error``. Ends the watch.

        It is ``error`` itself on the rank that fails first, whose exit code the others take over. If another rank was
        first, it is a PeerLostError with that rank's exit code and nothing to print; if another rank died without
        an exit code, it is one that says so; if its timer killed it, a HangError that names it.
        """
        self._stop_thread()
        heartbeats, peer_failed = self._heartbeats, ranks.is_peer_failure(error)
        if ranks.world() == 1:
            return error
        problem = as_problem(error)
        if not peer_failed and (heartbeats is None or heartbeats.claim_exit(problem.exit_code if problem else 1)):
            if heartbeats:
                if isinstance(error, MegamaskError):
                    error.everywhere = False  # the other ranks print nothing, so this one prints, whichever it is
                heartbeats.append_reason(f"Rank {ranks.rank()}: " + "".join(traceback.format_exception(error)))
            return error
        # killed ranks write no exit code, so there is nothing to wait for
        killed = heartbeats.timed_out() if heartbeats and peer_failed else []
        code = heartbeats.exit_code(0 if killed else GRACE) if heartbeats else None
        if code is not None:
            return PeerLostError(exit_code=code)
        if not peer_failed:
            return error  # the first rank could not write its exit code; this rank's own error is as good
        if heartbeats and killed:
            if heartbeats.claim_exit(HangError.exit_code):
                return _killed_by_timer(killed, heartbeats)
            return PeerLostError(exit_code=HangError.exit_code)
        reason = str(error).split(". ")[0].rsplit("] ", 1)[-1]
        return PeerLostError(
            f"Rank {ranks.rank()} has lost another rank, which left no error message: it was killed, perhaps because "
            f"memory ran out, or its machine is down. {CURE} ({reason})"
        )


def _killed_by_timer(killed: list[Heartbeat], heartbeats: Heartbeats) -> HangError:
    """The error that names ranks that their timers have killed; also the reason of the launch's exit code."""
    evidence = "blocked Python for longer than `watchdog.timeout`, so its timer killed it"
    text = "\n".join(describe_culprits(killed, evidence))
    heartbeats.append_reason(text)
    return HangError(f"{text}\n{_where(heartbeats)}\n{CURE}")


def _where(heartbeats: Heartbeats) -> str:
    return f"The stacks of each rank that could write them are in {heartbeats.logs}/beat-{heartbeats.launch}-*."
