"""Heartbeat files, and which rank they blame for a hang."""

from __future__ import annotations

import faulthandler
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.health.heartbeats import (
    LINE,
    PACKAGE,
    Heartbeat,
    Heartbeats,
    current_collective,
    current_location,
    find_culprits,
    hang_report,
)

WAITING = Heartbeat(
    0, "host", 1, phase_number=7, phase="step", step=3, seconds=9.0, collective="all_reduce", location="a", hung=True
)


def heartbeats(*changes: dict) -> list[Heartbeat]:
    """One waiting rank for each of ``changes``, with those changes."""
    return [Heartbeat(**{**vars(WAITING), "rank": rank, **change}) for rank, change in enumerate(changes)]


def culprits(of_ranks: list[Heartbeat]) -> list[int]:
    return [heartbeat.rank for heartbeat in find_culprits(of_ranks)[0]]


def test_a_rank_that_does_not_answer_is_to_blame() -> None:
    assert culprits(heartbeats({}, {"hung": False}, {"collective": ""})) == [1]
    assert culprits([*heartbeats({}, {}), Heartbeat(2)]) == [2]


def test_a_rank_that_waits_for_no_other_is_to_blame() -> None:
    assert culprits(heartbeats({}, {"collective": ""}, {})) == [1]
    # of two that wait for no other, the one that is behind
    assert culprits(heartbeats({"collective": ""}, {"collective": "", "phase_number": 6}, {})) == [1]


def test_a_rank_in_another_collective_is_to_blame() -> None:
    assert culprits(heartbeats({}, {}, {"location": "b"})) == [2]
    assert culprits(heartbeats({}, {"phase_number": 8})) == [1], "it is ahead, so it has skipped a collective"


def test_indistinguishable_ranks_are_not_blamed() -> None:
    assert culprits(heartbeats({}, {}, {})) == []
    assert culprits(heartbeats({}, {"location": "b"})) == []
    assert culprits(heartbeats({"collective": ""}, {"collective": ""})) == []
    assert culprits(heartbeats({})) == []


@given(st.lists(st.builds(Heartbeat, st.integers(0, 9), phase_number=st.integers(0, 2),
                          collective=st.sampled_from(["", "x"]), location=st.sampled_from("ab"), hung=st.booleans()),
                min_size=1, max_size=9))  # fmt: skip
def test_never_all_of_the_ranks_that_answer_are_blamed(of_ranks: list[Heartbeat]) -> None:
    blamed, _ = find_culprits(of_ranks)
    assert all(heartbeat in of_ranks for heartbeat in blamed)
    if all(heartbeat.hung for heartbeat in of_ranks):
        assert len(blamed) < len(of_ranks)


def test_a_report_names_the_rank_its_phase_and_its_age() -> None:
    busy = {"collective": "", "phase": "data", "seconds": 12.0, "phase_number": 6}
    report = hang_report(heartbeats(*[{}] * 5, busy), 12.3, 12.0)
    assert "Rank 5 (process 1 on host) blocks the run" in report
    assert "It entered 'data' after 3 steps, 12 s ago." in report
    assert "rank 0-4: in 'step' after 3 steps, waits in all_reduce, at a" in report


def test_heartbeats_are_readable_and_removed_at_the_end(tmp_path: Path) -> None:
    files = Heartbeats(tmp_path, "now")
    assert files.write(WAITING)
    assert files.gather(0) == [Heartbeat(**{**vars(WAITING), "written": files.gather(0)[0].written})]
    files.close()
    assert not list(tmp_path.iterdir())


def test_stacks_stay_and_heartbeats_of_dead_launches_go(tmp_path: Path) -> None:
    hung = Heartbeats(tmp_path, "hung")
    assert hung.handle is not None
    hung.write(WAITING)
    faulthandler.dump_traceback(hung.handle)
    hung.close()
    Heartbeats(tmp_path, "killed").write(WAITING)
    Heartbeats(tmp_path, "new").close()
    (left,) = tmp_path.iterdir()
    assert "hung" in left.name
    assert "test_stacks_stay" in left.read_text()[LINE:]


def test_the_first_exit_code_wins(tmp_path: Path) -> None:
    files = Heartbeats(tmp_path, "now")
    assert files.exit_code() is None
    assert files.claim_exit(3) and not files.claim_exit(5)
    files.append_reason("why")
    assert files.exit_code() == 3
    assert files.end.read_text() == "exit code 3\nwhy\n"


def test_an_unwritable_folder_costs_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = Heartbeats(tmp_path / "absent", "now")
    assert not files.write(WAITING) and not files.write(WAITING)
    assert files.claim_exit(3), "so that the error is printed"
    files.append_reason("why")
    files.close()
    assert capsys.readouterr().err.count("cannot write its heartbeat") == 1


def test_a_full_disk_costs_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "beat-now-00000.txt").symlink_to("/dev/full")
    files = Heartbeats(tmp_path, "now")
    assert not files.write(WAITING) and not files.write(WAITING)
    assert capsys.readouterr().err.count("No space left on device. Training continues.") == 1


def frame_in(file: str) -> dict:
    """The frames of a process whose main thread executes a function ``all_reduce`` of ``file``."""
    space: dict = {}
    source = "import sys\ndef all_reduce(): return sys._getframe()\nframe = all_reduce()"
    exec(compile(source, file, "exec"), space)
    return {threading.main_thread().ident: space["frame"]}


def test_a_frame_of_torch_distributed_is_a_collective() -> None:
    assert current_collective({1: sys._getframe()}) == ""
    assert current_collective(frame_in("/x/torch/distributed/c.py")) == "all_reduce"


def test_the_location_is_a_line_of_megamask() -> None:
    assert current_location({threading.main_thread().ident: sys._getframe()}) == ""
    assert current_location(frame_in(f"{PACKAGE}/data/packs.py")) == "megamask/data/packs.py:2 all_reduce"
