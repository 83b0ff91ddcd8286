"""No silent hang: when nothing moves any more, every rank's stacks are written, the one to blame named, and all end.

A rank that is stuck holds up all others in their next collective, where no error comes up for hours. So each rank says
which phase it enters, and a thread of its own looks twice a second whether the phase has lasted too long. Then each
rank writes its stacks below its beat (`beats`), one says who holds the others up, and all end with exit code 6. A
rank that cannot run Python, since some C code does not give it back, is ended by a timer of ``faulthandler``, which
needs none. The same files tell ranks whose collectives break that it was another that failed, so that one error is
told once, and ends all.

A phase costs two readings of a clock.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from megamask.errors import REQUEUE, HangError, MegamaskError, PeerLostError
from megamask.health.heartbeats import Heartbeat, Heartbeats, accused, place, report, waits, warn
from megamask.health.settings import WatchdogConfig as HangConfig
from megamask.health.stop_signals import StopRequest
from megamask.runtime import ranks
from megamask.runtime.entry_point import as_problem

TICK = 0.5
"""Seconds between two looks."""
GRACE = 3.0
"""Seconds that ranks give each other to write what they know."""
ORPHANED = 8.0
"""Seconds in which a rank without its launcher must have begun its last checkpoint."""
SHORT = ("data", "step")
"""Phases that must end within `watchdog.timeout`, except for the first of each; the others within
`watchdog.rare_timeout`."""
_CURE = "The same command goes on from the newest checkpoint."


class Watchdog:
    """Keeps watch over this rank, from the beginning of a run to its end.

    After an error, one rank's goes on its way. All others raise LostError, with the same exit code and nothing to say;
    or with a sentence, if a rank was lost that left no word.
    """

    def __init__(self, config: HangConfig, stop: StopRequest):
        self._config, self._stop = config, stop
        self._beats: Heartbeats | None = None
        self._seen: set[str] = set()
        self._now = ("joining", 0, 1, time.monotonic(), config.rare_timeout)
        self._number, self._asks = 0, 0.0
        self._written = -1e9
        self._orphaned: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._closed.set()
        self._thread.join()
        if self._number or self._beats:
            faulthandler.cancel_dump_traceback_later()
        try:
            if isinstance(error, Exception) and ranks.world() > 1:
                self._tell(error)
        finally:
            if self._beats:
                self._beats.close()

    @property
    def patience(self) -> timedelta:
        """How long a collective must be able to wait, so that the watchdog comes first."""
        return timedelta(seconds=2 * self._config.rare_timeout) if self._config.timeout else timedelta(days=7)

    def write_to(self, logs: Path, launch: str) -> None:
        """From now on keep the beats of this rank, and stacks, in the folder ``logs``."""
        self._beats = Heartbeats(logs, launch)
        if self._config.timeout:  # a rank may be stuck before its next look
            self._beats.write(self._beat())
            self._set_timer()

    def phase(self, name: str, step: int = 0) -> None:
        """This rank enters another phase."""
        limit = self._config.timeout if name in SHORT and name in self._seen else self._config.rare_timeout
        self._seen.add(name)
        # one assignment, so that the thread never sees a part of it
        self._now = (name, step, self._now[2] + 1, time.monotonic(), limit)

    # ---- in the thread

    def _watch(self) -> None:
        while not self._closed.wait(TICK):
            try:
                self._end_orphan()
                if self._config.timeout:
                    self._look()
            except Exception as error:  # what keeps watch must not do harm
                warn(f"No watch is kept on rank {ranks.rank()} any more: {type(error).__name__}: {error}")
                faulthandler.cancel_dump_traceback_later()
                return

    def _look(self) -> None:
        _, _, number, since, limit = self._now
        beats, seconds = self._beats, time.monotonic() - since
        if number != self._number:
            self._number, self._asks = number, 0.0
        self._set_timer()
        if beats and time.monotonic() - self._written > self._config.timeout / 60:
            self._written = time.monotonic()
            beats.write(self._beat())
        word = None
        if beats and seconds > self._asks and (seconds > GRACE or self._stop.this_rank()):
            self._asks = seconds + GRACE / 2  # not in every look, for the file system is one that all ranks share
            word = beats.exit_word()
        if beats and word is not None and word != HangError.exit_code:
            beats.close()
            os._exit(word)
        if word or seconds > limit:
            self._give_up(seconds, limit)

    def _set_timer(self) -> None:
        """Set anew in each look, so it goes off when the thread has not run for as long as a step may take."""
        # alone, nobody would point to a file
        file = self._beats.handle if self._beats and ranks.world() > 1 else None
        faulthandler.dump_traceback_later(self._config.timeout + GRACE, exit=True, file=file or 2)

    def _beat(self) -> Heartbeat:
        name, step, number, since, _ = self._now
        return Heartbeat(ranks.rank(), socket.gethostname(), os.getpid(), number, name, step, time.monotonic() - since)

    def _end_orphan(self) -> None:
        """Nobody would end a rank without its launcher: it has a moment to begin its last checkpoint."""
        if not self._stop.orphaned():
            return
        self._orphaned = self._orphaned or time.monotonic()
        if time.monotonic() - self._orphaned > ORPHANED and self._now[0] != "save":
            os._exit(REQUEUE)

    def _give_up(self, seconds: float, limit: float) -> None:
        """Write this rank's stacks, wait for those of the others, say who is to blame, and end."""
        faulthandler.dump_traceback_later(GRACE + 2, exit=True, file=2)  # should a file system be what hangs
        frames = {ident: f for ident, f in sys._current_frames().items() if ident != threading.get_ident()}
        mine = replace(self._beat(), hung=True, waits=waits(frames), place=place(frames))
        beats = self._beats
        if beats and beats.write(mine) and beats.handle is not None:
            beats.claim_exit(HangError.exit_code)
            faulthandler.dump_traceback(beats.handle)
            found = beats.gather(GRACE)
        else:
            faulthandler.dump_traceback(2)
            found = [mine]
        if mine.rank == min(beat.rank for beat in found if beat.hung):
            text = report(found, seconds, limit)
            if beats:
                beats.append_reason(text)
                text += f"\n{_where(beats)}"
            warn(f"{text}\n{_CURE}")
        os._exit(HangError.exit_code)

    # ---- at the end

    def _tell(self, error: Exception) -> None:
        """Leave word of ``error``; LostError if it is but a consequence of another's, or another was first."""
        beats, lost = self._beats, ranks.is_peer_failure(error)
        problem = as_problem(error)
        code = problem.exit_code if problem else 1
        if not lost and (beats is None or beats.claim_exit(code)):
            if beats:
                if isinstance(error, MegamaskError):
                    error.everywhere = False  # the others will be silent, whoever this is
                beats.append_reason(f"Rank {ranks.rank()}: " + "".join(traceback.format_exception(error)))
            return
        stuck = beats.timed_out() if beats and lost else []  # which leave no word, so that none need be waited for
        word = beats.exit_word(0 if stuck else GRACE) if beats else None
        if word is None and not lost:
            return  # who was first had no room to say so; this rank's own error is as good
        if word is None and beats and stuck:
            word = HangError.exit_code
            if beats.claim_exit(word):
                raise HangError(_told_of(stuck, beats)) from None
        if word is None:
            why = str(error).split(". ")[0].rsplit("] ", 1)[-1]
            raise PeerLostError(
                f"Rank {ranks.rank()} has lost another rank, which left no word: it was killed, perhaps for want of "
                f"memory, or its machine is gone. {_CURE} ({why})"
            ) from None
        silent = PeerLostError()
        silent.exit_code = word
        raise silent from None


def _told_of(stuck: list[Heartbeat], beats: Heartbeats) -> str:
    """What is said of ranks that their timers have ended, after leaving it as the word of this launch."""
    why = "let no Python run for as long as a step may take, so its timer ended it"
    text = "\n".join(accused(stuck, why))
    beats.append_reason(text)
    return f"{text}\n{_where(beats)}\n{_CURE}"


def _where(beats: Heartbeats) -> str:
    return f"The stacks of each rank that could write them are in {beats.logs}/beat-{beats.launch}-*."
