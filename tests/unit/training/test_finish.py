"""The end of a run: what cannot be written costs nothing else, and is reported."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megamask.checkpoint.run_folder import RunFolder
from megamask.config.pretrain_config import PretrainConfig
from megamask.data.shards import Shards
from megamask.errors import CheckpointError, DataError, MegamaskError, StorageError
from megamask.hf import Exported
from megamask.hf.model_folder import ModelLoadError
from megamask.training import finish
from tests.unit.training.stand_ins import bare, fails

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def end(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    """``end(plot_curve=...)`` ends a run with other functions in place of those of `finish`."""
    done: list[Path] = []

    def export(_: Path, output: Path, **__: object) -> Exported:
        done.append(output)
        return Exported(0.0)

    acts = {"plot_curve": lambda *_: None, "export_checkpoint": export}
    acts |= {"_show": lambda *_: None}

    def act(**others: object) -> list[Path]:
        for name, other in (acts | others).items():
            monkeypatch.setattr(finish, name, other)
        finish.finish_run(run, replace(PretrainConfig(), export=True), bare(Shards))
        return done

    return act


def test_a_failed_curve_prints_a_line_and_the_model_is_exported(end, run, capsys) -> None:
    assert end(plot_curve=fails(FULL)) == [run.export]
    output = capsys.readouterr().out
    assert f"could not draw {run.path / 'curve.png'}: No space left on device" in output and "bytes are free" in output


@pytest.mark.parametrize("error", [FULL, OSError("no file named config.json"), StorageError("It cannot be written.")])
def test_a_failed_export_is_a_sentence_with_code_7(end, run, error: Exception) -> None:
    with pytest.raises(StorageError, match=r"its checkpoints are saved.*the same command exports it") as raised:
        end(export_checkpoint=fails(error))
    assert raised.value.exit_code == 7
    assert (getattr(error, "strerror", None) or str(error)) in str(raised.value)


@pytest.mark.parametrize(
    "error", [CheckpointError("It differs."), ModelLoadError(Path("there"), "no"), DataError("Text.")]
)
def test_a_refused_export_keeps_its_code_and_the_run_is_finished(end, error) -> None:
    with pytest.raises(
        MegamaskError, match=r"its checkpoints are saved.*not exported: .*the same command exports it"
    ) as e:
        end(export_checkpoint=fails(error))
    assert e.value.exit_code == error.exit_code and str(error) in str(e.value)


def test_a_closed_stdout_does_not_stop_the_export(end, run, monkeypatch) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

        flush = write

    monkeypatch.setattr("sys.stdout", Gone())
    assert end() == [run.export]


def test_failed_predictions_do_not_stop_the_export(end, run, capsys) -> None:
    assert end(_show=fails(OSError(errno.EIO, os.strerror(errno.EIO)))) == [run.export]
    assert "No [MASK] could be filled in: [Errno 5] Input/output error" in capsys.readouterr().out


@pytest.mark.parametrize(("loss", "noise"), [(7.25, True), (7.5, True), (6.0, False)])
def test_predictions_of_a_hardly_trained_model_are_announced_as_noise(run, monkeypatch, capsys, loss, noise) -> None:
    run.logs.mkdir(parents=True, exist_ok=True)
    lines = [{"step": 1, "valid/loss": 6.5, "valid/unigram_loss": 7.25}, {"step": 3, "train/loss": 1.0}]
    lines.insert(1, {"step": 2, "valid/loss": loss, "valid/unigram_loss": 7.25})
    (run.logs / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    acts = {"load_tokenizer": lambda *_: None, "excerpts": lambda *_: [], "fill_mask_examples": lambda *_: []}
    for name, act in acts.items():
        monkeypatch.setattr(finish, name, act)
    monkeypatch.setattr(finish.hf, "common_words", lambda *_: [])
    monkeypatch.setattr(finish.hf, "fill_masks", lambda *_: [])
    monkeypatch.setattr(finish.Shards, "open", lambda *_: None)
    finish._show(run, bare(Shards, folder=run.path, unigram=None))
    assert ("Expect noise" in capsys.readouterr().out) is noise
