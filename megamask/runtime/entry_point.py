"""How every command begins and ends.

``begin`` comes before the slow imports. It checks the version of Python, makes printing safe, and lets signals stop the
command from then on. ``command`` turns errors into sentences and exit codes. ``run`` ends the process.

Exit codes: 0 finished; those of `errors`; 128 + N after signal N (130 for Ctrl-C, 143 for SIGTERM); 1 for a bug, with a
traceback. What is printed never decides it: output that cannot be written is dropped, and a character that the terminal
does not have is escaped. This module needs the standard library alone, and Python 3.9 can still read it.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from megamask.errors import MegamaskError, StorageError
from megamask.runtime import launch_environment, versions

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What stops a tool."""
PATIENCE = 3.0
"""Seconds that a tool has to clean up after a signal before the process ends."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STORAGE = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
"""Errors of the operating system for which the storage is to blame."""


class Stopped(KeyboardInterrupt):
    """A signal asked the command to stop."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


_begun = False
"""Whether the function of the command has begun, which may have something to clean up."""
_stopped: Stopped | None = None


def begin(stop_on_signals: bool = True) -> None:
    """Check the version of Python and make printing safe; a signal then stops the command, unless it has its own way.

    Call it in the main script before other imports.
    """
    make_output_safe()
    versions.check_python(sys.version_info[:2])
    if stop_on_signals:
        _stop_on_signals()


def command(main: Callable[..., int]) -> Callable[..., int]:
    """The function of a command, which returns its exit code, with every ending turned into such a code."""

    @functools.wraps(main)
    def ended(*given: Any, **named: Any) -> int:
        global _begun
        _begun = True
        try:
            versions.check_torch()
            return main(*given, **named)
        except Exception as error:
            if _stopped:  # a library that was interrupted may call it by another name
                return _say_stopped(_stopped)
            problem = as_problem(error)
            if problem is None:
                raise
            print_error(problem)
            return problem.exit_code
        except KeyboardInterrupt as stop:
            return _say_stopped(stop)

    return ended


def run(main: Callable[[], int], end: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Call ``main`` and ``end`` the process with the code that it returns, or with 1 and a traceback after a bug."""
    try:
        code = main()
    except SystemExit as exit:  # the parsers of the command line
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except Exception:
        traceback.print_exc()
        code = 1
    if _stopped:  # the interpreter's own ending may take seconds, in which no thread can cut it short
        end_process(code)
    end(code)


def end_process(code: int) -> NoReturn:
    """End the process at once with ``code``, without the interpreter's own ending.

    That ending would wait for threads of libraries. And if a thread of gloo still holds the tensor of its last message,
    the process aborts after all its work was done (seen in one or two of a hundred runs of two ranks).
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or absent
            stream.flush()
    os._exit(code)


# ---- errors


def as_problem(error: Exception) -> MegamaskError | None:
    """The error as a user can mend it: StorageError for a full disk or missing rights; None for anything else."""
    if isinstance(error, MegamaskError):
        return error
    if isinstance(error, OSError) and error.errno in STORAGE:
        name = error.filename2 or error.filename
        return StorageError(f"{name}: {error.strerror}." if name else f"The storage failed: {error.strerror}.")
    reason = full_disk(error)
    return StorageError(f"A file cannot be written: {reason}.") if reason else None


def full_disk(error: Exception) -> str:
    """The operating system's words for a full disk, if that is what ``error`` says, else an empty text."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno in FULL else ""
    # libraries written in Rust and C++ pass on the words alone
    return next((words for number in FULL if (words := os.strerror(number)) in str(error)), "")


def print_error(error: MegamaskError) -> None:
    """Print the sentences of an error to stderr; of an error that all ranks have, only on rank 0."""
    if str(error) and (launch_environment.is_main() or not error.everywhere):
        with suppress(OSError, ValueError):
            print(error, file=sys.stderr, flush=True)


# ---- output


class _Output(io.FileIO):
    """A file descriptor whose writes never raise: what cannot be written is dropped."""

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        while rest:
            try:
                written = super().write(rest)
            except OSError:  # nobody reads, the disk is full, the terminal is gone
                break
            if written is None:  # the reader of a non-blocking pipe is slow
                select.select([], [self], [])
            else:
                rest = rest[written:]
        return len(data)


def make_output_safe() -> None:
    """From now on printing never raises, in this process. Call it before libraries keep hold of the streams."""
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:  # a file opened later must not become stdout or stderr
        os.set_inheritable(free, True)
    os.close(free)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
        safe = io.TextIOWrapper(
            _Output(descriptor, "wb", closefd=False),  # type: ignore[arg-type]  # as `python -u` does it
            encoding=getattr(stream, "encoding", None) or "utf-8",
            errors="backslashreplace",
            line_buffering=True,
            write_through=getattr(stream, "write_through", False),
        )
        setattr(sys, name, safe)
        setattr(sys, f"__{name}__", safe)


# ---- signals


def _stop_on_signals() -> None:
    """Raise Stopped in the main thread at the first signal, and end the process if that is not enough.

    Python runs signal handlers only between two of its own instructions, which C++ code may keep it from for minutes,
    such as the training of a tokenizer. A thread hears of the signal at once, as long as that code lets Python run.
    """
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    for each in SIGNALS:
        if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN:  # nohup
            signal.signal(each, _stop)
    threading.Thread(target=_end_late, args=(ear,), name="stop", daemon=True).start()


def _stop(number: int, frame: object) -> NoReturn:
    global _stopped
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # a second one must not interrupt the cleanup
    _stopped = Stopped(number)
    if not _begun:
        end_process(_say_stopped(_stopped))
    raise _stopped


def _end_late(ear: int) -> NoReturn:
    number = 0
    while number not in SIGNALS:
        number = os.read(ear, 1)[0]
    time.sleep(PATIENCE)
    end_process(_say_stopped(Stopped(number)))


def _say_stopped(stop: KeyboardInterrupt) -> int:
    with suppress(OSError, ValueError):
        print("Stopped.", *getattr(stop, "__notes__", []), file=sys.stderr, flush=True)
    return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
