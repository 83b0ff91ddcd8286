"""Bad input ends all ranks with the exit code of its kind, at once, and its sentence is told once."""

from __future__ import annotations

import pytest

from tests.processes import forked

ROWS = {
    "no_flag": (2, "--stepz"),
    "no_settings": (2, "nowhere.toml` cannot be read"),
    "uneven": (2, "`packs.per_step` must be a multiple of the number of ranks (2), but is 3"),
    "no_manifest": (3, "contains no manifest.json"),
    "cut": (3, "train-00000.tokens.npy has 11,506 bytes"),
    "cut_for_one": (3, "train-00000.tokens.npy has 11,506 bytes"),
    "wide": (3, "tokens in the split 'train', fewer than one pack of 1048576"),
    "no_start": (4, "holds no checkpoint, and `resume` is 'must'"),
    "no_teacher": (4, "`teacher.path` is"),
    "below_a_file": (7, "Not a directory"),
}
"""The exit code and the sentence of each input of `refused_worker`; of "cut_for_one" only the second rank sees it."""
LONGEST = 10.0
"""Seconds from the end of the first rank to that of the last."""


@pytest.fixture(scope="module")
def refusals(apart: forked.Apart, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    sound = apart("refused_worker:refusals", tmp_path_factory.mktemp("sound"), names=list(ROWS))
    broken = apart("refused_worker:refusals", tmp_path_factory.mktemp("broken"), names=["cut_for_one"], alone=True)
    return sound | {"alone": broken["cut_for_one"]}


def told_wrong(one: dict, code: int, sentence: str) -> list[str]:
    output = " ".join("\n".join(one["said"]).split())
    wrong = [] if one["codes"] == [code, code] else [f"the exit codes are {one['codes']}"]
    wrong += [] if output.count(sentence) == 1 else [f"told {output.count(sentence)} times"]
    wrong += ["there is a trace"] if "Traceback" in output else []
    wrong += [f"the last outlived the first by {one['seconds']:.1f} s"] if one["seconds"] > LONGEST else []
    return [*wrong, output] if wrong else []


@pytest.mark.parametrize("name", ROWS)
def test_all_ranks_exit_and_the_error_is_printed_once(refusals: dict[str, dict], name: str) -> None:
    print(f"\n{name}: {refusals[name]['codes']}, the last outlived the first by {refusals[name]['seconds']:.2f} s")
    assert not told_wrong(refusals[name], *ROWS[name])


def test_ranks_without_shared_errors_are_detected(refusals: dict[str, dict]) -> None:
    assert told_wrong(refusals["alone"], *ROWS["cut_for_one"])
