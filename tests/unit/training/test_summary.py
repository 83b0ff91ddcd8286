"""The end of a run: what cannot be written then costs no more than itself, and is said."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from megamask.checkpoint.run_folder import RunFolder
from megamask.config.pretrain_config import PretrainConfig
from megamask.data.shards import Shards
from megamask.engine.optimizer import OptimizerConfig
from megamask.errors import CheckpointError, DataError, MegamaskError, StorageError
from megamask.hf import Exported
from megamask.hf.model_folder import ModelLoadError
from megamask.model.shape import EncoderShape, ModelConfig
from megamask.runtime import ranks
from megamask.training import summary
from megamask.training.summary import describe, finish_run
from megamask.training.validation import Validation

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
Kind = TypeVar("Kind")


def bare(kind: type[Kind], **given: object) -> Kind:
    """What passes for a ``kind`` and has no more than is given."""
    found = object.__new__(kind)
    vars(found).update(given)
    return found


def fails(error: Exception):
    def act(*_: object, **__: object) -> Exported:
        raise error

    return act


@pytest.fixture
def end(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    """``end(curve=..., export=..., show=...)``: the ending of a run in which these functions are others."""
    done: list[Path] = []

    def export(_: Path, output: Path, **__: object) -> Exported:
        done.append(output)
        return Exported(0.0)

    acts = {"plot_curve": lambda *_: None, "export": export}
    acts |= {"_show": lambda *_: None}

    def act(**others: object) -> list[Path]:
        for name, other in (acts | others).items():
            monkeypatch.setattr(summary, name, other)
        finish_run(run, replace(PretrainConfig(), export=True), bare(Shards))
        return done

    return act


def test_a_failed_curve_prints_a_line_and_the_model_is_exported(end, run, capsys) -> None:
    assert end(plot_curve=fails(FULL)) == [run.export]
    told = capsys.readouterr().out
    assert f"could not draw {run.path / 'curve.png'}: No space left on device" in told and "bytes are free" in told


@pytest.mark.parametrize("error", [FULL, OSError("no file named config.json"), StorageError("It cannot be written.")])
def test_a_failed_export_is_a_sentence_with_code_7(end, run, error: Exception) -> None:
    with pytest.raises(StorageError, match=r"its checkpoints are saved.*the same command exports it") as found:
        end(export=fails(error))
    assert found.value.exit_code == 7
    assert (getattr(error, "strerror", None) or str(error)) in str(found.value)


@pytest.mark.parametrize(
    "error", [CheckpointError("It differs."), ModelLoadError(Path("there"), "no"), DataError("Text.")]
)
def test_a_refused_export_keeps_its_code_and_says_that_the_run_is_finished(end, error) -> None:
    with pytest.raises(
        MegamaskError, match=r"its checkpoints are saved.*not exported: .*the same command exports it"
    ) as e:
        end(export=fails(error))
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
    acts = {"load_tokenizer": lambda *_: None, "excerpts": lambda *_: [], "questions": lambda *_: []}
    for name, act in acts.items():
        monkeypatch.setattr(summary, name, act)
    monkeypatch.setattr(summary.hf, "common_words", lambda *_: [])
    monkeypatch.setattr(summary.hf, "fill_masks", lambda *_: [])
    monkeypatch.setattr(summary.Shards, "open", lambda *_: None)
    summary._show(run, bare(Shards, folder=run.path, unigram=None))
    assert ("Expect noise" in capsys.readouterr().out) is noise


def test_a_failure_to_describe_the_run_is_a_sentence_with_code_7(run, tmp_path) -> None:
    shape = bare(EncoderShape, save=lambda folder: None)
    with pytest.raises(StorageError, match=r"could not describe the run"):
        describe(run, shape, bare(Shards, folder=tmp_path / "nowhere"))
    with pytest.raises(StorageError, match=r"could not describe the run: No space left on device"):
        describe(run, bare(EncoderShape, save=fails(FULL)), bare(Shards, folder=tmp_path))


def test_lines_show_nats_per_byte_of_each_source_and_the_highest() -> None:
    by_source = {"de": Validation(3.0, 0.5, 7.0, 0.1, 10, 50.0), "zh": Validation(4.0, 0.5, 7.0, 0.1, 10, 20.0)}
    loss, nats = summary.source_losses(by_source)
    assert loss == "  validation loss: de 3.0000  zh 4.0000"
    assert nats == "  nats per byte: de 0.6000  zh 2.0000  (mean 1.3000, highest in zh)"
    assert len(summary.source_losses({**by_source, "old": Validation(3.0, 0.5, 7.0, 0.1, 10)})) == 1


@pytest.mark.parametrize("name", ["RANK", "SLURM_STEP_ID"])
def test_the_first_line_explains_a_launchers_lines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in ("RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(known, raising=False)
    assert "launcher" not in summary.first_line("tiny", Path("runs/tiny"))
    monkeypatch.setenv(name, "0")
    assert "are from the launcher" in summary.first_line("tiny", Path("runs/tiny"))


def test_a_line_names_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    muon, adamw = OptimizerConfig("muon", max_grad_norm=0.0), OptimizerConfig()
    for device, optimizer, compiled, words in (
        ("cpu", muon, False, []),
        ("cpu", muon, True, ["layers"]),
        ("cuda", muon, False, ["Muon"]),
        ("cuda", adamw, False, []),
        ("cuda", muon, True, ["layers", "Muon"]),
    ):
        monkeypatch.setattr(ranks, "device", lambda device=device: torch.device(device))
        config = PretrainConfig(optimizer=optimizer, model=ModelConfig(compile=compiled))
        said = " ".join(summary.compiling(config))
        assert [word for word in ("layers", "Muon") if word in said] == words
