from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megamask.health.stop_signals import EARLY, SIGNALS, StoppedEarly, StopRequest


@pytest.fixture(autouse=True)
def no_nohup() -> Iterator[None]:
    """SIGHUP as a terminal sends it, even where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("which", [*SIGNALS, signal.SIGHUP])
def test_a_signal_is_remembered_and_a_second_changes_nothing(which: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.this_rank() and not stop.any_rank()
        for _ in range(2):
            os.kill(os.getpid(), which)
            assert stop.this_rank() and stop.any_rank()


def test_handlers_are_restored_on_exit() -> None:
    names = (*SIGNALS, signal.SIGHUP)
    before = [signal.getsignal(name) for name in names]
    with StopRequest() as stop, stop:
        pass
    assert [signal.getsignal(name) for name in names] == before


def test_an_early_request_is_kept_for_the_run() -> None:
    early = StopRequest()
    with early:
        os.kill(os.getpid(), signal.SIGTERM)
        with early as stop:
            assert stop.this_rank()
        os.kill(os.getpid(), signal.SIGTERM)  # and still does not end the process


@pytest.mark.parametrize("which", SIGNALS)
def test_with_nothing_to_save_a_signal_ends_the_work(which: signal.Signals) -> None:
    with StopRequest() as stop:
        with stop.early():
            pass
        with pytest.raises(StoppedEarly), stop.early():
            os.kill(os.getpid(), which)
            raise AssertionError("it goes on")
        with pytest.raises(StoppedEarly), stop.early():  # the next phase does not begin
            raise AssertionError("it begins")
        os.kill(os.getpid(), which)  # and outside it is remembered
        assert stop.this_rank()


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.this_rank()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.this_rank()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("then", "code", "printed"), [("", 75, ""), ("with stop.early(): pass\n", 0, "goes on\n")])
def test_a_signal_during_imports_ends_the_process_at_once(then: str, code: int, printed: str) -> None:
    script = (
        "import os, signal\nfrom megamask.health.stop_signals import StopRequest\n"
        "stop = StopRequest().__enter__()\nstop.loading = True\n"
        f"{then}os.kill(os.getpid(), signal.SIGTERM)\nprint('goes on')"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (code, printed)
    assert (EARLY in process.stderr) == (code == 75)


def test_stop_signals_do_not_import_torch() -> None:
    script = "import sys; from megamask.health.stop_signals import StopRequest as S; S(); print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout == "False\n"


TORCHRUN, DEEPSPEED = {"TORCHELASTIC_RUN_ID": "none"}, {"CROSS_RANK": "0", "LOCAL_SIZE": "1"}
RANK = """
import sys
from megamask.health.stop_signals import StopRequest

stop = StopRequest()
print("ready", flush=True)
for _ in sys.stdin:
    print(stop.orphaned() and stop.this_rank(), flush=True)
"""
LAUNCH = f"import os, subprocess, sys; print(os.getpid(), flush=True); subprocess.run([sys.executable, '-c', {RANK!r}])"
RUNNER = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {LAUNCH!r}]); time.sleep(600)"


@pytest.mark.parametrize(
    ("variables", "runner", "killed", "orphaned"),
    [
        ({}, "deepspeed", "launch", False),
        (TORCHRUN, "shell", "launch", True),
        (TORCHRUN, "deepspeed", "runner", False),
        (DEEPSPEED, "shell", "launch", True),
        (DEEPSPEED, "deepspeed", "runner", True),
        (DEEPSPEED, "shell", "runner", False),  # a shell that called the launcher may end
    ],
)
def test_only_the_end_of_a_launcher_stops_a_rank(
    tmp_path: Path, variables: dict[str, str], runner: str, killed: str, orphaned: bool
) -> None:
    """A runner starts a launcher, and that a rank; the runner does not reap the launcher."""
    (tmp_path / runner).write_text(RUNNER)
    kept = {name: value for name, value in os.environ.items() if name not in TORCHRUN | DEEPSPEED}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = subprocess.Popen([sys.executable, tmp_path / runner], env=kept | variables, **pipes)
    try:
        launch = psutil.Process(int(started.stdout.readline()))
        assert started.stdout.readline() == "ready\n"

        def answer() -> str:
            started.stdin.write("\n")
            started.stdin.flush()
            return started.stdout.readline()

        assert answer() == "False\n"
        if killed == "runner":
            started.kill()
            started.wait()
        else:
            launch.kill()
            while launch.status() != psutil.STATUS_ZOMBIE:
                pass
        assert answer() == f"{orphaned}\n"
    finally:
        started.stdin.close()
        started.kill()
        started.wait()
