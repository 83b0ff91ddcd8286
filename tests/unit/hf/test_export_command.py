"""`megamask export`: a checkpoint of a run becomes a folder with a model card."""

from __future__ import annotations

import json
import os
from datetime import date
from pathlib import Path

import pytest

from megamask.__main__ import main
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.save import save_checkpoint
from megamask.errors import CheckpointError, ConfigError
from megamask.hf.tensor_names import WEIGHTS
from tests.unit.hf.models import weights_of


@pytest.fixture
def trained(make, tokenizer, tmp_path):
    """``trained(name)``: a run folder after 12 steps with everything that an export reads."""

    def trained(name: str, **settings: object) -> Path:
        model = make("modern")
        run = RunFolder(tmp_path / name)
        run.logs.mkdir(parents=True)
        run.config.write_text(json.dumps({"recipe": "quick", "text": "feed5eed", "data": "/far/away/poems"} | settings))
        run.environment.write_text(json.dumps({"launches": [{"launch": f"{name}-1"}, {"launch": f"{name}-2"}]}))
        run.text.write_text(json.dumps({"splits": {"train": {"documents": 7, "tokens": 4321}}}))
        lines = [{"step": 6, "valid/loss": 5.5}, {"step": 12, "valid/loss": 4.25, "valid/unigram_loss": 6.5}]
        lines += [{"step": 12, "train/loss": 3.0}, {"step": 18, "valid/loss": 1.0}]
        (run.logs / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        model.encoder.shape.save(run.path)
        (run.path / "tokenizer").symlink_to(tokenizer)
        run.checkpoints.mkdir()
        save_checkpoint(run, 12, {f"weights/{name}": tensor for name, tensor in weights_of(model).items()}, {})
        return run.path

    return trained


def test_one_command_exports_a_checkpoint(trained, tmp_path, capsys):
    run, out = trained("run"), tmp_path / "out"
    assert main(["export", "--run", str(run), "--output", str(out)]) == 0
    assert "differ by at most" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    for row in ("steps | 12", "text | poems: 7 documents, 4,321 tokens", f"exported | {date.today():%Y}"):
        assert f"| {row}" in card
    assert "| validation loss | 4.2500 nats per masked token at step 12 (a guess by frequency: 6.5000) |" in card
    assert main(["export", "--run", str(run), "--output", str(out), "--step", "13"]) == CheckpointError.exit_code
    assert "has no checkpoint of step 13" in capsys.readouterr().err


def test_an_export_of_another_run_is_replaced_only_with_replace(trained, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--run", str(trained("one")), "--output", str(out)]
    assert main(["export", *command]) == main(["export", *command]) == 0
    other = ["--run", str(trained("other")), "--output", str(out)]
    before = (out / WEIGHTS).read_bytes()
    capsys.readouterr()
    assert main(["export", *other]) == ConfigError.exit_code
    assert "contains a model that is not an export of this run" in capsys.readouterr().err
    assert (out / WEIGHTS).read_bytes() == before
    assert main(["export", *other, "--replace"]) == 0
    assert (out / WEIGHTS).read_bytes() != before


@pytest.mark.parametrize("settings", [{}, {"objective": {"kind": "mae_lm"}}, {"objective": {"mask_vector": "own"}}])
def test_the_example_of_the_model_card_runs(trained, tmp_path, settings):
    out = tmp_path / "out"
    assert main(["export", "--run", str(trained("run", **settings)), "--output", str(out)]) == 0
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert ("pipeline" in code and "[MASK]" in code) is not bool(settings)
    printed: list[object] = []
    exec(code.replace("path/to/this/model", str(out)), {"print": printed.append})
    assert bool(printed) is not bool(settings)


def test_an_export_has_the_permissions_of_the_umask(trained, tmp_path):
    run = str(trained("run"))
    before = os.umask(0o027)
    try:
        assert main(["export", "--run", run, "--output", str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
