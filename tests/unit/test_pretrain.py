"""The command `megamask pretrain` before a run begins, and its signals."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megamask import pretrain
from megamask.errors import ConfigError
from megamask.health.stop_signals import StopRequest


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_recorded_inside_and_handled_as_before_outside(name: signal.Signals) -> None:
    before = signal.getsignal(name)
    with StopRequest() as stop:
        assert not stop.any_rank()
        os.kill(os.getpid(), name)
        assert stop.any_rank()
        assert stop.any_rank()
    assert signal.getsignal(name) == before
    with StopRequest() as again:
        assert not again.any_rank()


def test_print_config_looks_for_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["--print-config", "--data", str(tmp_path / "absent")]) == ConfigError.exit_code
    assert "absent is not a folder" in capsys.readouterr().err
