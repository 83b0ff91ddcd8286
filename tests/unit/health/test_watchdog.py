"""The watchdog: limits of phases, and which rank reports an error."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megamask.errors import ConfigError, DataError, HangError, PeerLostError, StorageError
from megamask.errors.setting_rules import settings_problems
from megamask.health import watchdog as module
from megamask.health.heartbeats import LINE
from megamask.health.settings import WatchdogConfig
from megamask.health.stop_signals import StopRequest
from megamask.health.watchdog import Watchdog
from megamask.runtime import ranks


def watchdog() -> Watchdog:
    return Watchdog(WatchdogConfig(), StopRequest())


def report(error: Exception, logs: Path) -> Exception:
    """The error that a rank reports after ``error``, if its heartbeats are in ``logs``."""
    with watchdog() as watch:
        watch.start_heartbeats(logs, "now")
        return watch.error_to_report(error)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (WatchdogConfig(-1.0), "h.timeout"),
        (WatchdogConfig(0.5), "h.timeout"),
        (WatchdogConfig(100.0, 50.0), "h.rare_timeout"),
        (WatchdogConfig(0.0, 50.0), "h.rare_timeout"),
    ],
)
def test_every_problem_is_named(config: WatchdogConfig, name: str) -> None:
    (problem,) = settings_problems(config, "h")
    assert name in problem


@pytest.mark.parametrize("config", [WatchdogConfig(), WatchdogConfig(0.0), WatchdogConfig(10.0, 10.0)])
def test_a_valid_config_has_no_problems(config: WatchdogConfig) -> None:
    assert settings_problems(config, "h") == []


def test_only_frequent_phases_have_the_short_timeout() -> None:
    watch = watchdog()
    limits = {}
    for number, name in enumerate(["building", "data", "step", "save", "data", "step", "save"]):
        watch.enter_phase(name)
        limits[number, name] = watch._phase.limit
    short = {key for key, limit in limits.items() if limit == WatchdogConfig.timeout}
    assert short == {(4, "data"), (5, "step")}, "the first of each may take longer"
    assert set(limits.values()) == {WatchdogConfig.timeout, WatchdogConfig.rare_timeout}


def test_a_watch_ends_with_the_run_and_leaves_no_file(tmp_path: Path) -> None:
    with watchdog() as watch:
        watch.start_heartbeats(tmp_path, "now")
        watch.enter_phase("step", 3)
    assert not watch._thread.is_alive()
    assert not list(tmp_path.iterdir())


def test_a_single_rank_reports_its_own_error(tmp_path: Path) -> None:
    error = DataError("planted")
    assert report(error, tmp_path) is error
    assert not list(tmp_path.iterdir())


class TestOfSeveralRanks:
    @pytest.fixture(autouse=True)
    def two_ranks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setattr(module, "GRACE", 0.2)

    def test_the_first_error_is_reported_and_the_next_is_silent(self, tmp_path: Path) -> None:
        first = DataError("planted")
        assert report(first, tmp_path) is first
        assert (tmp_path / "end-now.txt").read_text().startswith("exit code 3\nRank 1: megamask.errors.DataError")
        for error in (ConfigError("another"), RuntimeError("[/gloo/pair.cc] Connection closed by peer")):
            silent = report(error, tmp_path)
            assert isinstance(silent, PeerLostError)
            assert (str(silent), silent.exit_code) == ("", 3)

    def test_without_the_first_exit_code_an_error_is_reported(self, tmp_path: Path) -> None:
        (tmp_path / "end-now.txt").touch()  # as on a full disk
        error = StorageError("planted")
        assert report(error, tmp_path) is error

    def test_a_rank_killed_by_its_timer_is_named(self, tmp_path: Path) -> None:
        with watchdog() as watch:
            watch.start_heartbeats(tmp_path, "now")
            stuck = json.dumps({"rank": 0, "host": "node7", "process": 4711, "phase": "save", "step": 8})
            (tmp_path / "beat-now-00000.txt").write_text(stuck.ljust(LINE) + "Timeout (0:30:03)!\nThread 0x7")
            error = watch.error_to_report(RuntimeError("[/gloo/pair.cc:553] Connection closed by peer. It crashed."))
        assert isinstance(error, HangError)
        assert str(error).startswith("Rank 0 (process 4711 on node7) blocks the run: it blocked Python")
        assert (tmp_path / "end-now.txt").read_text().startswith("exit code 6\nRank 0 (process 4711")

    def test_a_rank_lost_without_an_exit_code_is_a_sentence(self, tmp_path: Path) -> None:
        error = report(RuntimeError("[/gloo/pair.cc:553] Connection closed by peer. This is a crash."), tmp_path)
        assert isinstance(error, PeerLostError) and error.exit_code == 1
        assert str(error).startswith("Rank 1 has lost another rank")
        assert str(error).endswith("(Connection closed by peer)")


def test_an_error_in_the_watchdog_is_a_warning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.01)
    monkeypatch.setattr(Watchdog, "_check", lambda self: 1 / 0)
    with watchdog() as watch:
        watch._thread.join(60)
        watch.enter_phase("step")
    assert "The watchdog of rank 0 has stopped: ZeroDivisionError" in capsys.readouterr().err


def test_a_clock_that_jumps_is_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(module, "INTERVAL", 0.01)
    monkeypatch.setattr(module.os, "_exit", ended.append)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 1e6)
    with watchdog() as watch:
        watch.enter_phase("step")
        watch._check()
    assert ended == []


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection reset by peer"), True),
        (RuntimeError("CUDA error"), False),
        (DataError("gloo"), False),
        (None, False),
    ],
)
def test_errors_of_collectives_that_lost_a_peer_are_recognized(error: BaseException | None, lost: bool) -> None:
    assert ranks.is_peer_failure(error) == lost
