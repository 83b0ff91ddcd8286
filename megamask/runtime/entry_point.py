"""How every command begins and ends.

``begin`` runs before the slow imports. It checks the version of Python, makes printing safe, and installs the signal
handlers. ``command`` turns errors into messages and exit codes. ``run`` ends the process.

Exit codes: 0 finished; those of `errors`; 128 + N after signal N (130 for Ctrl-C, 143 for SIGTERM); 1 for a bug, with a
traceback. Output never changes the exit code: what cannot be written is dropped, and characters that the terminal lacks
are escaped. This module imports only the standard library, and Python 3.9 can parse it.
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

from megamask.errors import LaunchError, MegamaskError, StorageError
from megamask.runtime import launch_environment, versions

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that stop a command."""
CLEAN_UP_SECONDS = 3.0
"""Seconds that a command has to clean up after a signal before the process ends."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STORAGE = (*DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
"""Error numbers of the operating system that mean a storage problem."""
NO_TEMPORARY_FOLDER = "No usable temporary directory found"
"""What Python's `tempfile` says, which torch and other libraries need when they are imported."""


class Stopped(KeyboardInterrupt):
    """A signal stopped the command."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


_begun = False
"""Whether the function of the command is running, which may have to clean up."""
_stopped: Stopped | None = None


def begin(stop_on_signals: bool = True) -> None:
    """Check the version of Python, make printing safe and, unless the command handles signals itself, stop at signals.

    Call it in the main script before other imports.
    """
    make_output_safe()
    versions.check_python(sys.version_info[:2])
    if stop_on_signals:
        _stop_on_signals()


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Decorate the function of a command so that it returns an exit code whether it succeeds, fails or is stopped."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> int:
        global _begun
        _begun = True
        try:
            versions.check_torch()
            return main(*args, **kwargs)
        except Exception as error:
            if _stopped:  # an interrupted library may raise another error
                return _report_stop(_stopped)
            problem = as_problem(error)
            if problem is None:
                raise
            print_error(problem)
            return problem.exit_code
        except KeyboardInterrupt as stop:
            return _report_stop(stop)

    return wrapped


def run(main: Callable[[], int], end: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Call ``main`` and ``end`` the process with its exit code, or with 1 and a traceback after a bug."""
    try:
        code = main()
    except SystemExit as exit:  # from the command-line parsers
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except Exception as error:
        if problem := as_problem(error):  # an import needs a file
            print_error(problem)
            code = problem.exit_code
        else:
            traceback.print_exc()
            code = 1
    if _stopped:  # the normal interpreter exit may take seconds, and no thread can interrupt it
        end_process(code)
    end(code)


def end_process(code: int) -> NoReturn:
    """End the process at once with ``code``, without the normal interpreter exit.

    The normal exit waits for threads of libraries. And if a gloo thread still holds the tensor of its last message, the
    process aborts after its work is done (seen in one or two of a hundred runs of two ranks).
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or absent
            stream.flush()
    os._exit(code)


# ---- errors


def as_problem(error: Exception) -> MegamaskError | None:
    """``error`` as one that a user can fix: StorageError for a full disk or missing permissions; None for others."""
    if isinstance(error, MegamaskError):
        return error
    if isinstance(error, OSError) and error.errno in STORAGE:
        name = error.filename2 or error.filename
        return StorageError(f"{name}: {error.strerror}." if name else f"The storage failed: {error.strerror}.")
    if isinstance(error, FileNotFoundError) and str(error.args[-1]).startswith(NO_TEMPORARY_FOLDER):
        return StorageError(
            f"{error.args[-1]}: all are full or read-only. Free some space, or set TMPDIR to a folder with space."
        )
    reason = full_disk(error)
    return StorageError(f"A file cannot be written: {reason}.") if reason else None


def full_disk(error: Exception) -> str:
    """The operating system's message for a full disk, if ``error`` means that, else an empty string."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno in DISK_FULL else ""
    # libraries in Rust and C++ pass on only the message
    return next((message for number in DISK_FULL if (message := os.strerror(number)) in str(error)), "")


def print_error(error: MegamaskError) -> None:
    """Print an error to stderr. Only rank 0 prints an error that all ranks have."""
    if str(error) and (not error.everywhere or _is_main()):
        with suppress(OSError, ValueError):
            print(error, file=sys.stderr, flush=True)


def _is_main() -> bool:
    try:
        return launch_environment.is_main()
    except LaunchError:  # it is not known which process is rank 0
        return True


# ---- output


class _Output(io.FileIO):
    """A file descriptor whose writes never raise: output that cannot be written is dropped."""

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        while rest:
            try:
                written = super().write(rest)
            except OSError:  # closed pipe, full disk, closed terminal
                break
            if written is None:  # the reader of a non-blocking pipe is slow
                select.select([], [self], [])
            else:
                rest = rest[written:]
        return len(data)


def make_output_safe() -> None:
    """Make printing in this process never raise. Call it before libraries store references to the streams."""
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

    Python runs signal handlers only between two of its own instructions. C++ code, such as the training of a tokenizer,
    may delay that for minutes. A thread is notified at once, as long as that code releases the GIL.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for each in SIGNALS:
        if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN:  # nohup
            signal.signal(each, _stop)
    threading.Thread(target=_end_after_clean_up, args=(reader,), name="stop", daemon=True).start()


def _stop(number: int, frame: object) -> NoReturn:
    global _stopped
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # a second one must not interrupt the cleanup
    _stopped = Stopped(number)
    if not _begun:
        end_process(_report_stop(_stopped))
    raise _stopped


def _end_after_clean_up(reader: int) -> NoReturn:
    number = 0
    while number not in SIGNALS:
        number = os.read(reader, 1)[0]
    time.sleep(CLEAN_UP_SECONDS)
    end_process(_report_stop(Stopped(number)))


def _report_stop(stop: KeyboardInterrupt) -> int:
    with suppress(OSError, ValueError):
        print("Stopped.", *getattr(stop, "__notes__", []), file=sys.stderr, flush=True)
    return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
