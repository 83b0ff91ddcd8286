"""A run on a mixture, in phases, whose two ranks are killed: it goes on with one rank in another ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamask.__main__ import main
from megamask.checkpoint.format import read_state
from megamask.checkpoint.run_folder import RunFolder
from tests.processes.moves import BOUND, Place, apart, figures, line
from tests.system.cells import ENGINES
from tests.system.commands import flags, run, text, training

STEPS, SAVED, KILLED = 9, 4, 6
SETTINGS: dict[str, object] = {
    "steps": STEPS,
    "checkpoint.every": SAVED,
    "validation.every": 99,
    "masking.unit": "word",
}
PHASES = ["steps=2,length=16,per_step=4,mask_ratio=0.3,shares=[0.2,0.8]", "steps=5,length=32,shares=[0.6,0.4]"]
"""The checkpoint and the kill lie in the second; the last two steps are as the settings of the run say."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two folders of shards with one tokenizer, with their shares."""
    folder = tmp_path_factory.mktemp("sources")
    how = ["--tokenizer", "wordpiece", "--vocab-size", 300]
    for seed, name in enumerate(("data", "other")):
        source = folder / f"{name}.txt"
        source.write_text(text(documents=48, seed=seed))
        same = ["--input", source, "--output", folder / name, "--valid-share", 0.2, "--workers", 1]
        made = run(main, "prepare", *same, *how)
        assert made.code == 0, made.err
        how = ["--tokenizer", folder / "data" / "tokenizer"]
    return [f"{folder / 'data'}=0.75", f"{folder / 'other'}=0.25"]


def job(sources: list[str], output: Path, at: Place, **more: object) -> dict:
    """A launch of the run in ``output``, for `launch_worker`."""
    zero = output.with_name(f"{at}.json")
    zero.write_text(json.dumps(ENGINES[at.engine]))
    words = [*training(Path("unused"), output), *flags(SETTINGS), "--data", *sources, "--phases", *PHASES]
    return {"world": at.world, "arguments": [*words, "--deepspeed", str(zero)], **more}


def test_two_killed_ranks_go_on_as_one_in_another_stage(run_ranks, sources: list[str], tmp_path: Path) -> None:
    two, one, killed, whole = Place("zero 1", 2), Place("zero 3", 1), tmp_path / "killed", tmp_path / "whole"
    with pytest.raises(AssertionError, match=r"rank 0, exit code -9\n(.|\n)*rank 1, exit code -9\n"):
        run_ranks(2, "launch_worker:serve", jobs=[job(sources, killed, two, kill=KILLED)])
    jobs = [job(sources, whole, Place("zero 0", 1)), job(sources, killed, one)]
    (undisturbed, resumed) = run_ranks(1, "launch_worker:serve", jobs=jobs)[0]
    assert undisturbed["code"] == resumed["code"] == 0, undisturbed["err"] + resumed["err"]
    assert f"resuming after step {SAVED} of {STEPS}" in resumed["out"] and line(two, one) in resumed["out"]

    first = read_state(RunFolder(killed).checkpoint(SAVED))["packs"]
    assert [number for number, *_ in undisturbed["packs"]] == list(range(2 * 4 + 7 * 2))
    assert first == 2 * 4 + 2 * 2 and resumed["packs"] == undisturbed["packs"][first:]
    for name in ("lr", "mask_ratio", "total/tokens", "total/epochs/data", "total/epochs/other"):
        assert figures(killed, name) == figures(whole, name)
    losses = [figures(output, "train/loss") for output in (killed, whole)]
    assert losses[0].keys() == losses[1].keys() == set(range(1, STEPS + 1))
    assert apart(*losses) <= BOUND

    # the end was computed on one rank, as here, so it is repeated bit for bit
    replayed = run(main, "replay", "--run", killed, "--step", KILLED + 2)
    assert replayed.code == 0 and ", 0 differ" in replayed.out, replayed.err + replayed.out
    assert "was taken with" not in replayed.out
    moved = run(main, "replay", "--run", killed, "--step", 1)
    reasons = "2 ranks instead of 1 and another `deepspeed.zero_optimization.stage`"
    assert f"Step 1 was taken with {reasons}, so its metrics may differ in the last digits." in moved.out
