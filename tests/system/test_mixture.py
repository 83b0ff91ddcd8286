"""A run on a mixture: it resumes bit for bit, and refuses another mixture or tokenizer."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from megamask.__main__ import main
from megamask.checkpoint.format import read_tensors
from megamask.checkpoint.run_folder import RunFolder
from megamask.data.packs import Packs
from megamask.data.shards import Shards
from megamask.errors import ConfigError, DataError
from tests.system.commands import Ended, metrics, run, shell, text, train

STEPS = 12


@pytest.fixture(scope="module")
def other(folder: Path, data: Path) -> Path:
    """A smaller source in the tokens of the first."""
    source, output = folder / "other.txt", folder / "other"
    source.write_text(text(documents=60, seed=1))
    more = ["--tokenizer", data / "tokenizer", "--valid-share", "0.2", "--workers", "1"]
    made = shell(sys.executable, "-m", "megamask", "prepare", "--input", source, "--output", output, *more)
    assert made.code == 0, made.err
    return output


def mix(sources: list[str], output: Path, *arguments: object, **more: object) -> Ended:
    """A small run on ``sources``, such as ["wiki=0.5", "books=0.5"]."""
    same = {"steps": STEPS, "checkpoint__every": 4, "checkpoint__keep": 9, "validation__every": 4}
    return train(Path("unused"), output, "--data", *sources, *arguments, **(same | more))


@pytest.fixture(scope="module")
def finished_mixture(folder: Path, data: Path, other: Path) -> tuple[Path, Ended]:
    output = folder / "mixture"
    return output, mix([f"{data}=0.75", f"{other}=0.25"], output)


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(read_tensors(RunFolder(folder).checkpoint(step)))


def test_a_run_logs_shares_epochs_and_losses_of_each_source(finished_mixture, data: Path, other: Path) -> None:
    output, ended = finished_mixture
    assert ended.code == 0, ended.err
    config = json.loads((output / "config.json").read_text())
    assert config["data"] == [str(data), str(other)]
    assert config["mixture"] == {"shares": [0.75, 0.25], "alpha": 1.0, "alpha_end": None}
    assert "data: share 75.0%" in ended.out and "other: share 25.0%" in ended.out
    packs = len(Packs(Shards.open(other), tokens=256, length=64, seed=1))
    read = metrics(output, "total/epochs/data", "total/epochs/other")
    assert read[STEPS, "total/epochs/other"] == STEPS * 2 * 0.25 / packs
    assert f"times each source was read: data {read[STEPS, 'total/epochs/data']:.2f}, other" in ended.out
    losses = metrics(output, "valid/loss", "valid/data/loss", "valid/other/loss", "valid/other/nats_per_byte")
    split = Shards.open(other, "valid")
    size = split.manifest["coverage"]["valid"]["bytes"]
    assert "  nats per byte: data " in ended.out
    # each source has as many packs in the validation, and so as many targets
    for step in (0, 4, 8, 12):
        parts = losses[step, "valid/data/loss"], losses[step, "valid/other/loss"]
        assert losses[step, "valid/loss"] == pytest.approx(sum(parts) / 2, rel=1e-9)
        assert losses[step, "valid/other/nats_per_byte"] == pytest.approx(parts[1] * split.tokens / size, rel=1e-9)


def test_a_stopped_run_resumes_bit_for_bit(finished_mixture, data: Path, other: Path, tmp_path: Path) -> None:
    finished, _ = finished_mixture
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    for step in (8, 12):
        shutil.rmtree(RunFolder(copy).checkpoint(step))
    # the sources may have moved, and shares count in any unit
    moved = [Path(shutil.copytree(source, tmp_path / source.name)) for source in (data, other)]
    ended = mix([f"{moved[0]}=0.75", f"{moved[1]}=0.25"], copy)
    assert ended.code == 0, ended.err
    assert "resuming after step 4" in ended.out
    before, after = weights(finished, STEPS), weights(copy, STEPS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    replayed = run(main, "replay", "--run", copy, "--step", 6)
    assert replayed.code == 0 and ", 0 differ" in replayed.out, replayed.err + replayed.out


def test_another_mixture_is_refused_unless_change_names_it(
    finished_mixture, data: Path, other: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(finished_mixture[0], tmp_path / "copy"))
    shutil.rmtree(RunFolder(copy).checkpoint(STEPS))
    sources = [f"{data}=0.25", f"{other}=0.75"]
    refused = mix(sources, copy)
    assert refused.code == ConfigError.exit_code
    assert "`mixture.shares` is [0.25, 0.75] here, but [0.75, 0.25] there." in refused.err
    swapped = mix([f"{other}=0.75", f"{data}=0.25"], copy)
    assert swapped.code == DataError.exit_code
    assert f"Resume with --data {data} {other}." in swapped.err
    changed = mix(sources, copy, "--change", "mixture.shares")
    assert changed.code == 0, changed.err
    assert "`mixture.shares` is [0.25, 0.75] from step 8 on; it was [0.75, 0.25]." in changed.out


def test_sources_with_other_tokenizers_are_refused(folder: Path, data: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange"
    more = ["--tokenizer", "wordpiece", "--vocab-size", "250", "--valid-share", "0.2", "--workers", "1"]
    corpus = folder / "corpus.txt"
    made = shell(sys.executable, "-m", "megamask", "prepare", "--input", corpus, "--output", strange, *more)
    assert made.code == 0, made.err
    ended = mix([str(data), str(strange)], tmp_path / "run")
    assert ended.code == DataError.exit_code
    assert "must have one tokenizer" in ended.err and "a vocabulary of" in ended.err


def test_problems_of_sources_are_found_together(data: Path, other: Path, tmp_path: Path) -> None:
    ended = mix([f"{data}=x", str(other)], tmp_path / "run", "--seed", "-1")
    assert ended.code == ConfigError.exit_code
    assert all(words in ended.err for words in ("a finite number behind =", "has none", "`seed`")), ended.err


def test_languages_are_split_trained_with_moving_shares_and_resumed_bit_for_bit(data: Path, tmp_path: Path) -> None:
    records = [
        {"lang": language, "text": document}
        for seed, (language, count) in enumerate({"de": 240, "fr": 60}.items())
        for document in text(documents=count, seed=seed).split("\n\n")
    ]
    source, output = tmp_path / "text.jsonl", tmp_path / "languages"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    more = ["--split-by", "lang", "--tokenizer", data / "tokenizer", "--valid-share", 0.2, "--workers", 1]
    made = run(main, "prepare", "--input", source, "--output", output, *more)
    assert made.code == 0, made.err
    assert "  megamask pretrain --data" in made.out and "/* --mixture.alpha 0.3" in made.out
    sources = [str(folder) for folder in sorted(output.glob("*"))]
    moving = ["--mixture.alpha", 1, "--mixture.alpha-end", 0, "--masking.corruption.random-from", "source"]
    ended = mix(sources, tmp_path / "run", *moving, log__every=4)
    assert ended.code == 0, ended.err
    assert "in each of 64 steps of alpha" in ended.out and " to 50.0%, read" in ended.out
    rates = metrics(tmp_path / "run", "masks/rate/de", "masks/rate/fr")
    assert {name for _, name in rates} == {"masks/rate/de", "masks/rate/fr"}
    assert all(0.1 < rate < 0.4 for rate in rates.values())
    copy = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    for step in (8, 12):
        shutil.rmtree(RunFolder(copy).checkpoint(step))
    again = mix(sources, copy, *moving, log__every=4)
    assert again.code == 0 and "resuming after step 4" in again.out, again.err
    before, after = weights(tmp_path / "run", STEPS), weights(copy, STEPS)
    assert all(torch.equal(before[name], after[name]) for name in before)
    refused = mix(sources, copy, *moving[:2], *moving[4:])
    assert refused.code == ConfigError.exit_code and "`mixture.alpha_end`" in refused.err
