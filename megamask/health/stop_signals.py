"""Requests to stop: a signal to any rank, or the end of its launcher, stops all ranks after the same step.

A handler only sets a flag; the ranks agree on it at the end of a step. So a signal interrupts no half-done work, a
second one changes nothing, and one that arrives during imports or set-up is not lost. Costs one all-reduce of one
number for each question.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from megamask.errors import REQUEUE
from megamask.runtime import launch_environment

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that request a stop, from people, launchers or Slurm's --signal; and SIGHUP, unless nohup ignores it."""
HEARD = "Asked to stop. The run saves after the current step and ends."
EARLY = "Stopped before the first step of this launch, as asked."


class StoppedEarly(KeyboardInterrupt):
    """A stop was requested while the run had nothing to save."""


class StopRequest:
    """Whether a stop of the run was requested. In its context a stop signal does not end the process; may be nested."""

    def __init__(self) -> None:
        self._requested = False
        self._early = False
        self.loading = False
        """Whether a signal ends the process at once: while a run of one rank imports modules."""
        self._depth = 0
        self._before: dict = {}
        self._launchers = launchers()

    def __enter__(self) -> StopRequest:
        self._depth += 1
        if self._depth == 1:
            hangs_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
            for name in (*SIGNALS, *((signal.SIGHUP,) if hangs_up else ())):
                self._before[name] = signal.signal(name, self._handle)
        return self

    def __exit__(self, *why: object) -> None:
        self._depth -= 1
        while self._depth == 0 and self._before:
            signal.signal(*self._before.popitem())

    @contextmanager
    def early(self) -> Iterator[None]:
        """In this context, in which there is nothing to save, a signal raises StoppedEarly.

        With several ranks, use it only inside of `ranks.on_rank_zero` and `ranks.all_ranks_or_none`, which raise the
        error on all ranks, and around code without collectives.
        """
        self.loading = False
        if self._requested:
            raise StoppedEarly
        self._early = True
        try:
            yield
        finally:
            self._early = False

    def _handle(self, number: int, frame: object) -> None:
        first, self._requested = not self._requested, True
        if first and self.loading:  # an exception in the middle of an import would be reported as the module's
            with suppress(OSError):
                os.write(2, f"{EARLY}\n".encode())
            os._exit(REQUEUE)
        if first and self._early:
            raise StoppedEarly
        # a single system call: a handler that prints through Python's buffers can fail
        if first and launch_environment.is_main():
            with suppress(OSError):
                os.write(2, f"{HEARD}\n".encode())

    def orphaned(self) -> bool:
        """Whether a launcher has ended that would have ended this process. Reads a file of /proc for each launcher."""
        return any(_has_ended(launcher) for launcher in self._launchers)

    def this_rank(self) -> bool:
        """Whether a stop of this rank was requested."""
        return self._requested or self.orphaned()

    def any_rank(self) -> bool:
        """Whether a stop of any rank was requested. Collective."""
        from megamask.runtime import ranks  # here, because signals must be handled before torch is imported

        return ranks.any_rank(self.this_rank())


def launchers() -> list[psutil.Process]:
    """The processes that would end this one: torchrun, or DeepSpeed's `launch` and the `deepspeed` that started it.

    Empty under `srun`, whose daemon outlives it, and under plain `python`: a run that was started with nohup continues
    when its shell has ended.
    """
    deepspeed = "CROSS_RANK" in os.environ and "LOCAL_SIZE" in os.environ
    if not deepspeed and "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    parents = psutil.Process().parents()
    return parents[:1] + [process for process in parents[1:2] if deepspeed and _is_deepspeed_command(process)]


def _is_deepspeed_command(process: psutil.Process) -> bool:
    """Whether a process is the command `deepspeed`, not a shell that called DeepSpeed's `launch`."""
    with suppress(psutil.Error):
        return any(Path(word).name == "deepspeed" for word in process.cmdline()[:3])
    return False


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
