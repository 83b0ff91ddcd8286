"""`megamask export` and `megamask import` print what was compared and which commands come next."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megamask import hf
from megamask.__main__ import SUBCOMMANDS, find_subcommand
from megamask.config import cli
from megamask.hf.importing import Imported
from megamask.model.shape import ModelConfig
from megamask.training import convert
from megamask.training.settings import ExportConfig, ImportConfig
from tests.batches import IDS


def test_an_export_prints_the_difference_and_every_note(tmp_path, monkeypatch, capsys) -> None:
    arguments = {}

    def export_checkpoint(run: Path, output: Path, step: int | None, *, replace: bool) -> hf.Exported:
        arguments.update(run=run, output=output, step=step, replace=replace)
        return hf.Exported(1.5e-7, ("The tokenizer added no special tokens.",))

    monkeypatch.setattr(convert, "export_checkpoint", export_checkpoint)
    convert.export_run(ExportConfig(tmp_path / "run", tmp_path / "out", 7, replace=True))
    assert arguments == {"run": tmp_path / "run", "output": tmp_path / "out", "step": 7, "replace": True}
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path / 'out'}: ") and first.endswith(" differ by at most 1.5e-07")
    assert second == "The tokenizer added no special tokens."


@pytest.mark.parametrize("new_head", [False, True])
def test_an_import_prints_its_notes_and_the_next_two_commands(tmp_path, monkeypatch, capsys, new_head: bool) -> None:
    shape = ModelConfig("bert", "tiny").shape(IDS)
    arguments = []

    def save_start(source: str, output: Path, *, new_head: bool) -> Imported:
        arguments.append((source, output, new_head))
        return Imported(shape, {}, tmp_path, ("One.", "Two."))

    monkeypatch.setattr(convert.hf, "save_start", save_start)
    output = tmp_path / "start"
    convert.import_weights(ImportConfig("somebody/model", output, new_head=new_head))
    assert arguments == [("somebody/model", output, new_head)]
    *notes, last = capsys.readouterr().out.splitlines()
    assert notes == ["One.", "Two."]
    assert f"{shape.num_layers} layers of width {shape.hidden_size}" in last
    commands = [shlex.split(command) for command in re.findall(r": megamask (.+?)\.(?= |$)", last)]
    (prepare, tokenizer), (pretrain, start) = (find_subcommand(command) for command in commands)
    assert (prepare, tokenizer) == ("prepare", ["--tokenizer", str(output / "tokenizer")])
    assert pretrain in SUBCOMMANDS and cli.parse_command(start).run.init == output
