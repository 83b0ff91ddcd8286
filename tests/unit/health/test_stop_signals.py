from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megamask.health import stop_signals
from megamask.health.stop_signals import SIGNALS, Launcher, StoppedEarly, StopRequest, parent_of


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


def test_outside_the_handlers_are_those_of_before() -> None:
    names = (*SIGNALS, signal.SIGHUP)
    before = [signal.getsignal(name) for name in names]
    with StopRequest() as stop, stop:
        pass
    assert [signal.getsignal(name) for name in names] == before


def test_a_stop_that_began_early_is_not_forgotten_in_the_run() -> None:
    early = StopRequest()
    with early:
        os.kill(os.getpid(), signal.SIGTERM)
        with early as stop:
            assert stop.this_rank()
        os.kill(os.getpid(), signal.SIGTERM)  # and still does not end the process


@pytest.mark.parametrize("which", SIGNALS)
def test_while_there_is_nothing_to_save_a_signal_ends_the_work(which: signal.Signals) -> None:
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
def test_a_signal_while_modules_are_imported_ends_the_process_at_once(then: str, code: int, printed: str) -> None:
    script = (
        "import os, signal\nfrom megamask.health.stop_signals import StopRequest\n"
        "stop = StopRequest().__enter__()\nstop.loading = True\n"
        f"{then}os.kill(os.getpid(), signal.SIGTERM)\nprint('goes on')"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (code, printed)
    assert (stop_signals.EARLY in found.stderr) == (code == 75)


def test_it_needs_no_slow_import() -> None:
    script = "import sys; from megamask.health.stop_signals import StopRequest as S; S(); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"


def test_the_parent_of_a_process() -> None:
    assert parent_of(os.getpid()) == os.getppid()
    assert parent_of(2**22 + 1) is None


@pytest.mark.parametrize(
    ("told", "asked"),
    [({}, False), ({"TORCHELASTIC_RUN_ID": "none"}, True), ({"CROSS_RANK": "0", "LOCAL_SIZE": "2"}, True)],
)
def test_only_a_launcher_is_missed(monkeypatch: pytest.MonkeyPatch, told: dict[str, str], asked: bool) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "CROSS_RANK", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    stop = StopRequest()
    assert not stop.this_rank()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop.this_rank() == stop.orphaned() == asked


def test_the_end_of_the_deepspeed_command_is_the_end_of_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSS_RANK", "0")
    monkeypatch.setenv("LOCAL_SIZE", "1")
    monkeypatch.setattr(os, "getppid", lambda: 20)
    parents = {20: 10}
    monkeypatch.setattr(stop_signals, "parent_of", parents.get)
    for runner, watched in ((True, True), (False, False)):  # a shell that called the launcher may go
        parents[20] = 10
        monkeypatch.setattr(stop_signals, "_is_runner", lambda process, runner=runner: runner)
        launcher = Launcher()
        assert not launcher.gone()
        parents[20] = 1
        assert launcher.gone() == watched
