"""Ranks that hang, fail or lose their launcher: all ranks end, and the cause is named and printed once."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from megamask.errors import DataError, HangError
from tests.processes import forked
from tests.processes.faults import PLANTED, Fault, Orphan, Result

HUNG = [
    Fault("backward", 1, 2, "stopped", waits=False),
    Fault("data", 0, 5, "sleep", waits=False),
    Fault("backward", 1, 2, "gil", waits=False),
    Fault("step", 0, 3, "fifo", waits=False),
]
FAILED = [
    Fault("building", 1, 1, "data", waits=False),
    Fault("step", 0, 2, "assertion", waits=False),
    Fault("save", 1, 1, "memory", waits=False),
    Fault("evaluation", 1, 1, "killed", waits=False),
]
TIMEOUT = 5.0
"""The watchdog's, in seconds."""


@pytest.fixture(scope="module")
def answers(apart: forked.Apart, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    faults = {"hung": [asdict(fault) for fault in HUNG], "failed": [asdict(fault) for fault in FAILED]}
    return apart("faults_worker:all_faults", tmp_path_factory.mktemp("faults"), **faults, timeout=TIMEOUT)


@pytest.mark.parametrize("number", range(len(HUNG)), ids=lambda number: HUNG[number].kind)
def test_a_hang_ends_all_ranks_and_names_the_culprit(answers: dict, number: int) -> None:
    result = Result.from_json(answers["hung"][number])
    assert result.fault == HUNG[number]
    check_hang(result)


def check_hang(result: Result) -> None:
    """The others have ended with exit code 6, named the rank and left their stacks; so has the rank, if it can."""
    fault, codes, printed = result.fault, result.codes, result.everything_printed
    print(f"{fault}: exit codes {codes} after {result.seconds:.1f} s")
    # if the others wait for longer than the timer, they lose the rank that it kills, and have no stacks to show
    lost = fault.kind == "gil" and "its timer killed it" in result.reason
    assert [codes[other] for other in result.other_ranks] == [HangError.exit_code] * len(result.other_ranks), printed
    assert f"Rank {fault.rank} (process" in result.reason
    assert result.reason.count("blocks the run") == 1
    assert printed.count("blocks the run") == 1, "once"
    assert lost or all("pretrain.py" in result.stacks[other] for other in result.other_ranks)
    if fault.kind == "stopped":
        assert codes[fault.rank] is None, "it can do nothing, and is killed by its launcher"
        assert "did not answer" in result.reason
    elif fault.kind == "gil":
        assert codes[fault.rank] == 1, "the timer that needs no Python ends it"
        assert "_suffer" in result.stacks[fault.rank]
    else:
        assert codes[fault.rank] == HangError.exit_code
        assert "pretrain.py" in result.stacks[fault.rank]


@pytest.mark.parametrize("number", range(len(FAILED)), ids=lambda number: FAILED[number].kind)
def test_an_error_on_one_rank_ends_all_and_is_printed_once(answers: dict, number: int) -> None:
    result = Result.from_json(answers["failed"][number])
    assert result.fault == FAILED[number]
    check_failure(result)


def check_failure(result: Result) -> None:
    """All ranks have ended with one exit code; one has printed the cause, and no other prints more."""
    fault, codes, printed = result.fault, result.codes, result.everything_printed
    print(f"{fault}: exit codes {codes} after {result.seconds:.1f} s")
    assert "gloo" not in printed
    if fault.kind == "killed":
        assert (codes[fault.rank], codes[1 - fault.rank]) == (-9, 1)
        assert f"Rank {1 - fault.rank} has lost another rank, which left no error message" in printed
        return
    assert codes == [DataError.exit_code if fault.kind == "data" else 1] * 2, printed
    assert printed.count(PLANTED) == 1, printed
    assert printed.count("Traceback") == (fault.kind != "data")
    assert result.leftovers == []


def test_ranks_without_their_launcher_end_after_a_last_checkpoint(answers: dict) -> None:
    orphans = {orphan["launcher"]: Orphan(**orphan) for orphan in answers["orphans"]}
    for orphan in orphans.values():
        print(f"{orphan.launcher}, {orphan.fault}: after {orphan.seconds:.1f} s, checkpoints {orphan.steps}")
        assert orphan.ended, orphan.printed
    # 40 steps in all, and no checkpoint but the last one and one after a request to stop
    assert orphans["shell"].steps == [40], "nohup is not a launcher"
    assert orphans["deepspeed"].steps == [], "it hung, so there was nothing to save"
    assert orphans["torchrun"].steps == [2]
    assert "Stopped after step 2 of 40, as requested." in orphans["torchrun"].printed
