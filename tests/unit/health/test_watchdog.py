from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megamask.errors import ConfigError, DataError, HangError, PeerLostError, StorageError
from megamask.health import watchdog as hangs
from megamask.health.heartbeats import LINE
from megamask.health.settings import WatchdogConfig
from megamask.health.stop_signals import StopRequest
from megamask.health.watchdog import Watchdog
from megamask.runtime import ranks


def watchdog() -> Watchdog:
    return Watchdog(WatchdogConfig(), StopRequest())


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (WatchdogConfig(-1.0), "h.timeout"),
        (WatchdogConfig(0.5), "h.timeout"),
        (WatchdogConfig(100.0, 50.0), "h.rare_timeout"),
        (WatchdogConfig(0.0, 50.0), "h.rare_timeout"),
    ],
)
def test_what_is_wrong_is_named(config: WatchdogConfig, name: str) -> None:
    (problem,) = config.problems("h")
    assert name in problem


@pytest.mark.parametrize("config", [WatchdogConfig(), WatchdogConfig(0.0), WatchdogConfig(10.0, 10.0)])
def test_what_is_right_is_not(config: WatchdogConfig) -> None:
    assert config.problems("h") == []


def test_only_what_comes_often_must_be_quick() -> None:
    watch = watchdog()
    limits = {}
    for number, name in enumerate(["building", "data", "step", "save", "data", "step", "save"]):
        watch.phase(name)
        limits[number, name] = watch._now[-1]
    short = {key for key, limit in limits.items() if limit == WatchdogConfig.timeout}
    assert short == {(4, "data"), (5, "step")}, "the first of each may take its time"
    assert set(limits.values()) == {WatchdogConfig.timeout, WatchdogConfig.rare_timeout}


def test_a_watch_ends_with_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    with watchdog() as watch:
        watch.write_to(tmp_path, "now")
        watch.phase("step", 3)
    assert not watch._thread.is_alive()
    assert not list(tmp_path.iterdir())


def test_an_error_of_a_run_of_one_goes_on_its_way(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="planted"), watchdog() as watch:
        watch.write_to(tmp_path, "now")
        raise DataError("planted")
    assert not list(tmp_path.iterdir())


class TestOfSeveral:
    @pytest.fixture(autouse=True)
    def several(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setattr(hangs, "GRACE", 0.2)

    def test_the_first_error_is_told_and_the_next_is_silent(self, tmp_path: Path) -> None:
        with pytest.raises(DataError), watchdog() as watch:
            watch.write_to(tmp_path, "now")
            raise DataError("planted")
        assert (tmp_path / "end-now.txt").read_text().startswith("exit code 3\nRank 1: Traceback")
        for error in (ConfigError("another"), RuntimeError("[/gloo/pair.cc] Connection closed by peer")):
            with pytest.raises(PeerLostError) as silent, watchdog() as watch:
                watch.write_to(tmp_path, "now")
                raise error
            assert (str(silent.value), silent.value.exit_code) == ("", 3)

    def test_where_the_first_had_no_room_for_its_word_an_error_keeps_its_own(self, tmp_path: Path) -> None:
        (tmp_path / "end-now.txt").touch()  # as on a full disk
        with pytest.raises(StorageError, match="planted"), watchdog() as watch:
            watch.write_to(tmp_path, "now")
            raise StorageError("planted")

    def test_a_rank_ended_by_its_timer_is_named_by_one_that_lost_it(self, tmp_path: Path) -> None:
        with pytest.raises(HangError) as told, watchdog() as watch:
            watch.write_to(tmp_path, "now")
            stuck = json.dumps({"rank": 0, "host": "node7", "process": 4711, "phase": "save", "step": 8})
            (tmp_path / "beat-now-00000.txt").write_text(stuck.ljust(LINE) + "Timeout (0:30:03)!\nThread 0x7")
            raise RuntimeError("[/gloo/pair.cc:553] Connection closed by peer. This is typically caused by a crash.")
        assert str(told.value).startswith("Rank 0 (process 4711 on node7) holds the run up: it let no Python run")
        assert (tmp_path / "end-now.txt").read_text().startswith("exit code 6\nRank 0 (process 4711")

    def test_a_rank_lost_without_a_word_is_a_sentence(self, tmp_path: Path) -> None:
        with (
            pytest.raises(PeerLostError, match=r"Rank 1 has lost another .*\(Connection closed by peer\)"),
            watchdog() as w,
        ):
            w.write_to(tmp_path, "now")
            raise RuntimeError("[/gloo/pair.cc:553] Connection closed by peer. This is typically caused by a crash.")


def test_an_error_in_the_watch_itself_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(hangs, "TICK", 0.01)
    monkeypatch.setattr(Watchdog, "_look", lambda self: 1 / 0)
    with watchdog() as watch:
        watch._thread.join(60)
        watch.phase("step")
    assert "No watch is kept on rank 0 any more: ZeroDivisionError" in capsys.readouterr().err


def test_a_clock_that_jumps_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(hangs, "TICK", 0.01)
    monkeypatch.setattr(hangs.os, "_exit", ended.append)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 1e6)
    with watchdog() as watch:
        looked = watch._look
        watch.phase("step")
        looked()
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
def test_what_a_collective_says_when_another_rank_is_gone(error: BaseException | None, lost: bool) -> None:
    assert ranks.is_peer_failure(error) == lost
