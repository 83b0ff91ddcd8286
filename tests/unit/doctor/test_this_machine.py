"""The port where the ranks of a run meet, as this machine sees it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from megamask.doctor.this_machine import LAUNCHER_PORT, check_port, machine_facts, port_facts, port_problems


@pytest.fixture
def taken_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A port that a process listens at, and no launcher."""
    for name in list(os.environ):
        if name in ("RANK", "TORCHELASTIC_USE_AGENT_STORE") or name.startswith("SLURM"):
            monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield str(listener.getsockname()[1])


def launch(monkeypatch: pytest.MonkeyPatch, address: str, port: str, rank: str = "0") -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)


def test_a_taken_port_of_this_launch_is_a_problem(taken_port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, "127.0.0.1", taken_port)
    (problem,) = port_problems(check_port())
    assert f"MASTER_PORT {taken_port} is taken on 127.0.0.1" in problem
    assert port_facts(check_port()) == [f"port {taken_port} of 127.0.0.1, where the ranks meet: taken"]


def test_only_rank_0_needs_the_port_and_not_if_torchrun_serves_it(taken_port: str, monkeypatch) -> None:
    launch(monkeypatch, "127.0.0.1", taken_port, rank="1")
    assert port_problems(check_port()) == []
    launch(monkeypatch, "127.0.0.1", taken_port)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert port_problems(check_port()) == []


def test_a_free_port_is_a_fact(taken_port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = str(listener.getsockname()[1])
    launch(monkeypatch, "127.0.0.1", free)
    assert port_problems(check_port()) == []
    assert port_facts(check_port()) == [f"port {free} of 127.0.0.1, where the ranks meet: free"]


def test_the_port_of_another_machine_is_not_checked(taken_port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, "192.0.2.1", taken_port)  # an address of documentation (RFC 5737)
    assert port_problems(check_port()) == []
    assert "not checked from here" in port_facts(check_port())[0]


def test_without_a_launch_the_port_is_that_of_the_launchers(taken_port: str) -> None:
    assert f"port {LAUNCHER_PORT} of 127.0.0.1" in port_facts(check_port())[0]
    assert port_problems(check_port()) == []


def test_nccl_is_named_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 27, 5))
    assert "NCCL of torch: 2.27.5" in machine_facts()
