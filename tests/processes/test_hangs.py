"""Ranks that hang, fail or lose their launcher: all end, who was to blame is named, and a cause is told once."""

from __future__ import annotations

import pytest

from megamask.errors import DataError, HangError
from tests.processes import forked

HUNG = [("backward", 1, 2, "stopped"), ("data", 0, 5, "sleep"), ("backward", 1, 2, "gil"), ("step", 0, 3, "fifo")]
"""Points, ranks, how manyeth time, and how a rank hangs there."""
FAILED = [
    ("building", 1, 1, "data"), ("step", 0, 2, "assertion"), ("save", 1, 1, "memory"), ("evaluation", 1, 1, "killed"),
]  # fmt: skip
TIMEOUT = 5.0


@pytest.fixture(scope="module")
def found(apart: forked.Apart, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("faults")
    return apart("faults_worker:failures", folder, hung=HUNG, failed=FAILED, timeout=TIMEOUT)


def test_a_hang_ends_all_ranks_and_names_the_one_to_blame(found: dict) -> None:
    assert len(found["hung"]) == len(HUNG)
    for one in found["hung"]:
        check_hang(one)


def check_hang(one: dict) -> None:
    """The others have ended with exit code 6, named the rank, and left their stacks; so has the rank, if it can."""
    fault, rank, codes = one["fault"], one["rank"], one["codes"]
    # where the others may still wait for long when its timer ends it, they lose it, and have no stacks to show
    lost = fault == "gil" and "its timer killed it" in one["word"]
    print(f"{fault} on rank {rank}: exit codes {codes} after {one['seconds']:.1f} s")
    said = "\n".join(one["said"])
    others = [other for other in range(len(codes)) if other != rank]
    assert [codes[other] for other in others] == [HangError.exit_code] * len(others), said
    assert f"Rank {rank} (process" in one["word"]
    assert one["word"].count("blocks the run") == 1
    assert said.count("blocks the run") == 1, "told once"
    assert lost or all("pretrain.py" in one["stacks"][str(other)] for other in others)
    if fault == "stopped":
        assert codes[rank] is None, "it can do nothing, and is killed by its launcher"
        assert "did not answer" in one["word"]
    elif fault == "gil":
        assert codes[rank] == 1, "the timer that needs no Python ends it"
        assert "_suffer" in one["stacks"][str(rank)]
    else:
        assert codes[rank] == HangError.exit_code
        assert "pretrain.py" in one["stacks"][str(rank)]


def test_an_error_on_one_rank_ends_all_and_is_told_once(found: dict) -> None:
    assert len(found["failed"]) == len(FAILED)
    for one in found["failed"]:
        check_failure(one)


def check_failure(one: dict) -> None:
    """All ranks have ended with one exit code; what one said is the cause, and no other says more."""
    (point, rank, _, kind), codes, said = one["fault"], one["codes"], "\n".join(one["said"])
    print(f"{kind} at {point} on rank {rank}: exit codes {codes} after {one['seconds']:.1f} s")
    assert "gloo" not in said
    if kind == "killed":
        assert (codes[rank], codes[1 - rank]) == (-9, 1)
        assert f"Rank {1 - rank} has lost another rank, which left no error message" in said
        return
    assert codes == [DataError.exit_code if kind == "data" else 1] * 2, said
    assert said.count("what was planted") - said.count('"what was planted"') == 1, said
    assert said.count("Traceback") == (kind != "data")
    assert one["leftovers"] == []


def test_ranks_without_their_launcher_end_after_a_last_checkpoint(found: dict) -> None:
    for one in found["orphans"]:
        print(f"{one['launcher']}, {one['fault']}: ended {one['ended']} after {one['seconds']:.1f} s, {one['steps']}")
        assert one["ended"], one["said"]
        # 40 steps in all, and no checkpoint but the last one and one for who asks to stop
        if one["launcher"] == "shell":
            assert one["steps"] == [40], "nohup is no launcher"
        elif one["fault"] == "sleep":
            assert one["steps"] == [], "it hung, so there was nothing to save"
        else:
            assert one["steps"] == [2]
            assert "Stopped after step 2 of 40, as asked." in one["said"]
