"""A checkpoint of every family is imported, trained and exported as the class that it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megamask.__main__ import main
from megamask.hf.families import FAMILIES
from megamask.hf.tensor_names import WEIGHTS
from tests.system.commands import metrics, run, train
from tests.system.families import initial_weights_of
from tests.tolerances import assert_close


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training_continues_a_checkpoint_of_every_family(family: str, data: Path, folder: Path, tmp_path: Path) -> None:
    start, output, exported = initial_weights_of(family, data, folder), tmp_path / "run", tmp_path / "exported"
    ended = train(data, output, init=start, steps=2)
    assert ended.code == 0, ended.err
    made = run(main, "export", "--run", output, "--output", exported)
    assert made.code == 0, made.err
    assert "logits of transformers and ours differ by at most" in made.out
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder / family, exported))
    assert before["architectures"] == after["architectures"] == [FAMILIES[family].architecture]
    old, new = load_file(folder / family / WEIGHTS), load_file(exported / WEIGHTS)
    assert old.keys() == new.keys() and any(not torch.equal(old[name], new[name]) for name in old)
    # training goes on where it ended
    made = run(main, "import", "--model", exported, "--output", tmp_path / "again")
    assert made.code == 0, made.err
    ended = train(data, tmp_path / "second", init=tmp_path / "again", steps=1)
    assert ended.code == 0, ended.err
    losses = [
        metrics(output, "valid/loss")[2, "valid/loss"],
        metrics(tmp_path / "second", "valid/loss")[0, "valid/loss"],
    ]
    assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]))
