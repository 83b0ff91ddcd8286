"""The lines about a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megamask.config.pretrain_config import PretrainConfig
from megamask.engine.optimizer import OptimizerConfig
from megamask.masking.settings import MaskingConfig
from megamask.model.shape import ModelConfig
from megamask.objectives.settings import ObjectiveConfig
from megamask.runtime import ranks
from megamask.schedules import Schedule
from megamask.training import summary
from megamask.training.validation import Validation


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
        output = " ".join(summary.compiling(config))
        assert [word for word in ("layers", "Muon") if word in output] == words


def test_a_line_warns_of_compiling_again_where_mask_enters_late_at_a_rate_that_moves() -> None:
    late, moving = ObjectiveConfig("three_ml", depth=1), Schedule("linear", 0.3, 0.15)
    for compiled, objective, ratio, warns in (
        (True, late, moving, True),
        (False, late, moving, False),
        (True, ObjectiveConfig(), moving, False),
        (True, late, Schedule(start=0.3), False),
    ):
        config = PretrainConfig(
            model=ModelConfig(compile=compiled), objective=objective, masking=MaskingConfig(ratio), steps=1000
        )
        lines = summary.compiling(config)
        assert any("through 65 values" in line for line in lines) == warns
