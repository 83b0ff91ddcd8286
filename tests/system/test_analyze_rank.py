"""`megamask analyze-rank`: a run and its own export, on shards and on raw text, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamask.__main__ import main
from megamask.training.export import export_checkpoint
from tests.system.commands import Ended, run, text, train

LESS = ("--tokens", 800, "--length", 32)
STEPS = 3


@pytest.fixture(scope="module")
def trained(folder: Path, data: Path) -> tuple[Path, Path]:
    """A short run, all its checkpoints and its export."""
    output = folder / "ranked"
    ended = train(data, output, steps=STEPS, checkpoint__every=1)
    assert ended.code == 0, ended.err
    export_checkpoint(output, folder / "ranked-export")
    return output, folder / "ranked-export"


def ranked(*arguments: object) -> Ended:
    return run(main, "analyze-rank", *arguments)


def test_a_run_and_its_export_are_one_encoder(trained, tmp_path):
    ours, export = trained
    ended = ranked("--run", ours, "--model", export, "--output", tmp_path / "out", *LESS)
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "out" / "ranks.json").read_text())
    one, two = record["models"]
    assert one["rows"] == two["rows"] and one["rows"]["clean"] >= 800
    assert one["rows"]["mask"] == pytest.approx(0.15 * one["rows"]["clean"], abs=one["packs"])
    for figures, its in zip(one["plain"], two["plain"], strict=True):
        for name, ways in figures["ranks"].items():
            assert ways["effective"]["all"] == pytest.approx(its["ranks"][name]["effective"]["all"], rel=1e-4)
    assert record["made"]["arguments"]["ratio"] == 0.15
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ranks.json", "ranks.md", "ranks.png"]
    table = (tmp_path / "out" / "ranks.md").read_text()
    first = f"{one['plain'][0]['ranks']['clean']['effective']['all']:.1f} ±"
    assert first in table and first in ended.out
    assert "ranked, step 3" in table and "ranked-export" in table


def test_results_are_reproducible_and_differ_by_step(trained, tmp_path):
    for name, step in (("one", STEPS), ("two", STEPS), ("before", 1)):
        ended = ranked("--run", trained[0], "--step", step, "--output", tmp_path / name, *LESS)
        assert ended.code == 0, ended.err
    one, two, before = (
        json.loads((tmp_path / name / "ranks.json").read_text())["models"][0] for name in ("one", "two", "before")
    )
    assert one["plain"] == two["plain"] and one["sha256"] == two["sha256"]
    assert one["plain"] != before["plain"] and one["sha256"] != before["sha256"]
    assert one["rows"] == before["rows"]


def test_raw_text_is_encoded_with_the_encoders_tokenizer(trained, tmp_path):
    raw = tmp_path / "raw.txt"
    raw.write_text(text(documents=60, seed=1))
    ended = ranked("--model", trained[1], "--text", raw, "--output", tmp_path / "out", *LESS)
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "out" / "ranks.json").read_text())
    assert record["models"][0]["text"] == str(raw)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--ratio", 0), 2, "`ratio` must lie in (0, 1), but is 0"),
        (("--threshold", 1e-9), 2, "`threshold` must lie in [1e-06, 1)"),
        (("--tokens", 10_000_000), 3, "Lower `tokens`"),
        (("--tokens", 100), 3, "`tokens` must be at least 427 for a width of 32"),
        (("--step", 77), 4, "no checkpoint of step 77"),
        (("--length", 5_000), 2, "`length` must be at most 1024"),
        (("--data", "somewhere", "--text", "else"), 2, "Remove one."),
    ],
)
def test_wrong_settings_are_sentences(trained, tmp_path, more, code, message):
    ended = ranked("--run", trained[0], "--output", tmp_path / "out", *LESS[2:], *more)
    assert (ended.code, message in ended.err) == (code, True), ended.err
    assert not (tmp_path / "out").exists()


def test_missing_text_or_encoders_are_sentences(trained, tmp_path):
    out = tmp_path / "out"
    assert "name `data` or `text`" in ranked("--model", trained[1], "--output", out).err
    assert "`run` or `model` must name" in ranked("--output", out).err
    ended = ranked("--run", tmp_path / "a", "--run", tmp_path / "b", "--output", out)
    assert ended.code and str(tmp_path / "a") in ended.err and str(tmp_path / "b") in ended.err
    assert "two" in ranked("--run", trained[0], "--run", trained[0], "--output", out).err.lower()
