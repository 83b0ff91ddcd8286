from __future__ import annotations

import faulthandler
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.health.heartbeats import LINE, Heartbeat, Heartbeats, blame, place, report, waits

WAITS = Heartbeat(0, "host", 1, number=7, phase="step", step=3, seconds=9.0, waits="all_reduce", place="a", hung=True)


def beats(*changes: dict) -> list[Heartbeat]:
    return [Heartbeat(**{**vars(WAITS), "rank": rank, **change}) for rank, change in enumerate(changes)]


def named(found: list[Heartbeat]) -> list[int]:
    return [beat.rank for beat in blame(found)[0]]


def test_who_does_not_answer_is_to_blame() -> None:
    assert named(beats({}, {"hung": False}, {"waits": ""})) == [1]
    assert named([*beats({}, {}), Heartbeat(2)]) == [2]


def test_who_waits_for_nobody_is_to_blame() -> None:
    assert named(beats({}, {"waits": ""}, {})) == [1]
    # of two that wait for nobody, the one that is behind
    assert named(beats({"waits": ""}, {"waits": "", "number": 6}, {})) == [1]


def test_who_waits_elsewhere_is_to_blame() -> None:
    assert named(beats({}, {}, {"place": "b"})) == [2]
    assert named(beats({}, {"number": 8})) == [1], "it is ahead, so it has left something out"


def test_where_nothing_tells_ranks_apart_none_is_to_blame() -> None:
    assert named(beats({}, {}, {})) == []
    assert named(beats({}, {"place": "b"})) == []
    assert named(beats({"waits": ""}, {"waits": ""})) == []
    assert named(beats({})) == []


@given(st.lists(st.builds(Heartbeat, st.integers(0, 9), number=st.integers(0, 2), waits=st.sampled_from(["", "x"]),
                          place=st.sampled_from("ab"), hung=st.booleans()), min_size=1, max_size=9))  # fmt: skip
def test_the_blame_is_never_on_all_of_several_that_answer(found: list[Heartbeat]) -> None:
    guilty, _ = blame(found)
    assert all(beat in found for beat in guilty)
    if all(beat.hung for beat in found):
        assert len(guilty) < len(found)


def test_a_report_names_the_rank_its_phase_and_its_age() -> None:
    said = report(beats(*[{}] * 5, {"waits": "", "phase": "data", "seconds": 12.0, "number": 6}), 12.3, 12.0)
    assert "Rank 5 (process 1 on host) holds the run up" in said
    assert "It entered 'data' after 3 steps, 12 s ago." in said
    assert "rank 0-4: in 'step' after 3 steps, waits in all_reduce, at a" in said


def test_beats_are_read_by_others_and_gone_at_the_end(tmp_path: Path) -> None:
    kept = Heartbeats(tmp_path, "now")
    assert kept.write(WAITS)
    assert kept.gather(0) == [Heartbeat(**{**vars(WAITS), "written": kept.gather(0)[0].written})]
    kept.close()
    assert not list(tmp_path.iterdir())


def test_stacks_stay_beats_of_dead_launches_go(tmp_path: Path) -> None:
    hung = Heartbeats(tmp_path, "hung")
    assert hung.handle is not None
    hung.write(WAITS)
    faulthandler.dump_traceback(hung.handle)
    hung.close()
    Heartbeats(tmp_path, "killed").write(WAITS)
    Heartbeats(tmp_path, "new").close()
    (left,) = tmp_path.iterdir()
    assert "hung" in left.name
    assert "test_stacks_stay" in left.read_text()[LINE:]


def test_the_first_word_holds(tmp_path: Path) -> None:
    kept = Heartbeats(tmp_path, "now")
    assert kept.exit_word() is None
    assert kept.claim_exit(3) and not kept.claim_exit(5)
    kept.append_reason("why")
    assert kept.exit_word() == 3
    assert kept.end.read_text() == "exit code 3\nwhy\n"


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kept = Heartbeats(tmp_path / "absent", "now")
    assert not kept.write(WAITS) and not kept.write(WAITS)
    assert kept.claim_exit(3), "so that the error is told"
    kept.append_reason("why")
    kept.close()
    assert capsys.readouterr().err.count("cannot write where it is") == 1


def test_a_full_disk_costs_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "beat-now-00000.txt").symlink_to("/dev/full")
    kept = Heartbeats(tmp_path, "now")
    assert not kept.write(WAITS) and not kept.write(WAITS)
    assert capsys.readouterr().err.count("No space left on device. Training goes on.") == 1


def test_a_frame_in_a_collective_waits_and_the_place_is_ours() -> None:
    assert waits({1: sys._getframe()}) == ""
    code = compile(
        "import sys\ndef all_reduce(): return sys._getframe()\nframe = all_reduce()",
        "/x/torch/distributed/c.py",
        "exec",
    )
    space: dict = {}
    exec(code, space)
    assert waits({1: space["frame"]}) == "all_reduce"
    main = threading.main_thread().ident
    assert place({main: sys._getframe()}) == ""
