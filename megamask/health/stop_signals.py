"""Being asked to stop: a signal to any rank, or the death of its launcher, stops all ranks after the same step.

A handler sets a flag and nothing more; the ranks agree on it at the end of a step. So a signal comes into no half-done
work, a second one changes nothing, and one that comes before there is anything to stop, during imports or while
parts are built, is not forgotten. Costs one all-reduce of one number for each question.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megamask.errors import REQUEUE
from megamask.runtime import launch_environment

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""What asks a run to stop: people, launchers, Slurm's --signal. So does SIGHUP, unless nohup has it ignored."""


HEARD = "Asked to stop. The run saves after the current step and ends."
EARLY = "Stopped before the first step of this launch, as asked."


class StoppedEarly(KeyboardInterrupt):
    """A run was asked to stop while it had nothing to save."""


class StopRequest:
    """Whether somebody asked the run to stop; inside of this no signal to stop ends the process. It may be nested."""

    def __init__(self) -> None:
        self._asked = False
        self._early = False
        self.loading = False
        """Whether a signal ends the process at once: while modules are imported, and no other rank waits for it."""
        self._depth = 0
        self._before: dict = {}
        self._launcher = Launcher()

    def __enter__(self) -> StopRequest:
        self._depth += 1
        if self._depth == 1:
            hangs_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
            for name in (*SIGNALS, *((signal.SIGHUP,) if hangs_up else ())):
                self._before[name] = signal.signal(name, self._ask)
        return self

    def __exit__(self, *why: object) -> None:
        self._depth -= 1
        while self._depth == 0 and self._before:
            signal.signal(*self._before.popitem())

    @contextmanager
    def early(self) -> Iterator[None]:
        """Inside of this a signal raises StoppedEarly: there is nothing to save, and work that may take minutes.

        With several ranks the others must learn of it: use it inside of `ranks.on_rank_zero` and
        `ranks.all_ranks_or_none`, and let it contain no collective.
        """
        self.loading = False
        if self._asked:
            raise StoppedEarly
        self._early = True
        try:
            yield
        finally:
            self._early = False

    def _ask(self, number: int, frame: object) -> None:
        first, self._asked = not self._asked, True
        if first and self.loading:  # an exception in the middle of an import would be reported as the module's
            with suppress(OSError):
                os.write(2, f"{EARLY}\n".encode())
            os._exit(REQUEUE)
        if first and self._early:
            raise StoppedEarly
        # one system call and nothing more: a handler that prints through Python's buffers can fail
        if first and launch_environment.is_main():
            with suppress(OSError):
                os.write(2, f"{HEARD}\n".encode())

    def orphaned(self) -> bool:
        """Whether the launcher that would end this process with the others is gone."""
        return self._launcher.gone()

    def this_rank(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._asked or self.orphaned()

    def any_rank(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        from megamask.runtime import ranks  # here, for the imports that this must come before are those of torch

        return ranks.any_rank(self.this_rank())


class Launcher:
    """Who started this process and would end it: torchrun, or DeepSpeed's `launch` and the `deepspeed` before that.

    Nobody under `srun`, whose daemon outlives it, and under plain `python`: a run that a shell has started with nohup
    lives on when the shell is gone. Costs reading a line of /proc for each question.
    """

    def __init__(self) -> None:
        parent = os.getppid()
        deepspeed = "CROSS_RANK" in os.environ and "LOCAL_SIZE" in os.environ
        self._lineage: list[tuple[int, int]] = []  # (process, its parent when we began)
        if deepspeed or "TORCHELASTIC_RUN_ID" in os.environ:
            self._lineage.append((os.getpid(), parent))
        if deepspeed and (runner := parent_of(parent)) and _is_runner(runner):
            self._lineage.append((parent, runner))

    def gone(self) -> bool:
        """Whether one of them has ended."""
        return any((os.getppid() if who == os.getpid() else parent_of(who)) != then for who, then in self._lineage)


def parent_of(process: int) -> int | None:
    """The parent of a process, as Linux tells it; None if that cannot be found out."""
    try:
        # the second field, a name in brackets, may hold anything
        return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError, ValueError):
        return None


def _is_runner(process: int) -> bool:
    """Whether a process is the `deepspeed` command, and not the shell of somebody who called its launcher directly."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(Path(os.fsdecode(word)).name == "deepspeed" for word in words[:3])
