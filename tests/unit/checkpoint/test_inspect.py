"""An inspection predicts what a resume does, and changes nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megamask.__main__ import main
from megamask.checkpoint import format
from megamask.checkpoint import inspect as inspection
from megamask.checkpoint.inspect import inspect_folder, run_report_lines
from megamask.checkpoint.resume import open_run
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.save import save_checkpoint
from megamask.data.lost_text.coverage import Coverage
from megamask.errors import CheckpointError, MegamaskError

CONFIG = {"steps": 100, "recipe": "bert"}


def trace(folder: Path) -> dict[str, tuple]:
    """All there is to know of every file and folder."""
    files = {}
    for path in sorted([folder, *folder.rglob("*")]):
        status = path.lstat()
        text = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        files[str(path)] = (status.st_ino, status.st_mode, status.st_mtime_ns, status.st_ctime_ns, text)
    return files


def test_lost_text_is_reported(tmp_path):
    """A manifest of an earlier version has no counts; one that is damaged does not end the command."""
    run = RunFolder(tmp_path)
    run.config.write_text(json.dumps(CONFIG))
    counts = Coverage(tokens=200, characters=700, unknown_tokens=3, unknown_characters=5, examples=Counter(["東京"]))
    for manifest, line in (
        ({"coverage": {"train": counts.record()}}, f"train: {counts.sentence()}"),
        ({"coverage": {}}, "train: What the tokenizer lost was not counted."),
        ({"coverage": {"train": 7}}, f"{run.text} is damaged: its counts cannot be read."),
        ({"coverage": []}, f"{run.text} is damaged: its counts cannot be read."),
    ):
        run.text.write_text(json.dumps(manifest))
        inspected = inspect_folder(tmp_path)
        assert line in inspected.text
        assert f"  text, {line}" in run_report_lines(inspected, True)
    run.text.unlink()
    assert inspect_folder(tmp_path).text == ()


def save(run: RunFolder, step: int) -> None:
    save_checkpoint(run, step, {"weights/a": torch.full((3,), float(step))}, {"step": step}, keep=10)


def flip(run: RunFolder, step: int) -> None:
    file = run.checkpoint(step) / "rank-00000.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)


def newer(run: RunFolder) -> None:
    folder = run.checkpoint(3)
    body = {**json.loads((folder / "MANIFEST.json").read_bytes()), "format": format.FORMAT + 1}
    body.pop("sha256")
    (folder / "MANIFEST.json").write_bytes(format._seal(body))


def all_damaged(run: RunFolder) -> None:
    for step in (1, 2, 3):
        flip(run, step)


def only_bad_ones(run: RunFolder) -> None:
    for step in (1, 2, 3):
        run.rename_unused(run.checkpoint(step), "bad")


def half_done(run: RunFolder) -> None:
    (run.checkpoints / ".tmp-step-4-dead").mkdir()
    (run.checkpoints / "step-5").mkdir()
    (run.path / ".tmp-latest-1").touch()


STATES: dict[str, Callable[[RunFolder], object]] = {
    "whole": lambda run: None,
    "newest flipped": lambda run: flip(run, 3),
    "newest cut": lambda run: (run.checkpoint(3) / "state.json").write_text("{"),
    "no manifest": lambda run: (run.checkpoint(3) / "MANIFEST.json").unlink(),
    "all damaged": all_damaged,
    "only bad ones": only_bad_ones,
    "half done": half_done,
    "newer format": newer,
    "no checkpoint": lambda run: [shutil.rmtree(run.checkpoint(step)) for step in (1, 2, 3)],
    "no configuration": lambda run: run.config.unlink(),
    "damaged configuration": lambda run: run.config.write_text("{"),
    "damaged configuration of a run that took no step": lambda run: (
        [shutil.rmtree(run.checkpoint(step)) for step in (1, 2, 3)],
        run.config.write_text("{"),
    ),
    "damaged configuration and a metric": lambda run: (
        [shutil.rmtree(run.checkpoint(step)) for step in (1, 2, 3)],
        run.config.write_text("{"),
        (run.logs / "metrics.jsonl").write_text('{"step": 1, "train/loss": 9.0}\n'),
    ),
    "strange latest": lambda run: run.latest.write_bytes(b"\xff" * 100),
    "no latest, no record": lambda run: (run.latest.unlink(), run.environment.unlink()),
    "a dead writer": lambda run: run.lock.write_text(
        json.dumps({"launch": "x", "pid": 1, "host": inspection.os.uname().nodename})
    ),
}


@pytest.fixture
def made(tmp_path: Path) -> RunFolder:
    start = open_run(tmp_path / "run", CONFIG)
    for step in (1, 2, 3):
        save(start.run, step)
    start.close()
    return RunFolder(start.run.path)


def resumed(run: RunFolder) -> tuple[int, int]:
    """(exit code, step) of a resume."""
    try:
        start = open_run(run.path, CONFIG)
    except MegamaskError as error:
        return error.exit_code, 0
    start.close()
    return 0, start.step


@pytest.mark.parametrize("state", STATES)
def test_a_resume_does_what_an_inspection_predicts(made, state):
    STATES[state](made)
    before = trace(made.path)
    report = inspect_folder(made.path)
    assert trace(made.path) == before
    code, step = resumed(made)
    assert report.exit_code == code, report.resume
    assert bool(code) == report.resume[0].startswith("A resume would be refused")
    if not code:
        words = f"continue after step {step} of 100" if step else "start at step 0"
        assert words in report.resume[0]
    renamed = [name for name in inspect_folder(made.path).renamed if name not in report.renamed]
    if not code:
        assert len(renamed) == sum("would be renamed" in sentence for sentence in report.resume)


def test_a_finished_run_is_reported_as_finished(made):
    assert inspect_folder(made.path).resume[0] == "A resume would continue after step 3 of 100."
    finished = "The run is finished after step 3 of {}. A resume would only draw its curve and export it."
    made.config.write_text(json.dumps({**CONFIG, "steps": 3}))
    assert inspect_folder(made.path).resume == (finished.format(3),)
    # of a run with a budget of time the log knows whether it is used up
    made.config.write_text(json.dumps({**CONFIG, "time_budget": "4m"}))
    for progress, over in ((0.5, False), (1.0, True)):
        (made.logs / "metrics.jsonl").write_text(json.dumps({"step": 3, "progress": progress}) + "\n")
        assert (inspect_folder(made.path).resume == (finished.format(100),)) == over


def test_a_run_that_trains_is_inspected_and_continues(tmp_path):
    start = open_run(tmp_path / "run", CONFIG)
    save(start.run, 1)
    report = inspect_folder(tmp_path / "run")
    assert report.exit_code == 8 == resumed(start.run)[0]
    assert start.run.launch in report.writer
    save(start.run, 2)
    start.close()
    assert inspect_folder(tmp_path / "run").writer == ""


def test_a_writer_on_another_host_is_reported(made):
    made.lock.write_text(json.dumps({"launch": "far", "pid": 1, "host": "elsewhere"}))
    report = inspect_folder(made.path)
    assert "process 1 on elsewhere (launch far)" in report.writer
    assert "whether it still runs is not visible from here" in report.resume[-1]


def test_sizes_do_not_show_a_flipped_bit(made):
    flip(made, 3)
    assert [each.state for each in inspect_folder(made.path, hashes=False).checkpoints] == ["intact"] * 3
    assert [each.state for each in inspect_folder(made.path).checkpoints] == ["damaged", "intact", "intact"]


def test_a_folder_without_a_run_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path, words in ((tmp_path / "nowhere", "is not a folder"), (tmp_path / "file", "is not a folder")):
        with pytest.raises(CheckpointError, match=words):
            inspect_folder(path)
    with pytest.raises(CheckpointError, match=r"holds no run: neither config\.json nor checkpoints/"):
        inspect_folder(tmp_path)


def test_the_tool_prints_a_table_or_json(made, capsys):
    flip(made, 3)
    before = trace(made.path)
    assert main(["inspect", "--run", str(made.path)]) == 0
    shown = capsys.readouterr().out
    assert "rank-00000.safetensors is damaged" in shown
    assert "continue after step 2 of 100" in shown and "step-3 is damaged and would be renamed" in shown
    assert main(["inspect", "--run", str(made.path), "--json", "--no-verify"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [each["step"] for each in printed["checkpoints"]] == [3, 2, 1]
    assert main(["inspect", "--run", str(made.path / "logs")]) == 4
    assert "holds no run" in capsys.readouterr().err
    assert trace(made.path) == before
