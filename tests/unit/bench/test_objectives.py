"""The table of what is saved: predicted and measured of the same rounds."""

from __future__ import annotations

import pytest

from megamask.bench import objectives
from megamask.bench.measure import Round
from megamask.errors.setting_rules import settings_problems
from megamask.objectives.objective import ObjectiveConfig
from tests.batches import IDS
from tests.unit.model.models import config

BASE = Round(tokens=100, rows=128, targets=50, wall=4.0, cpu=2.0, flops=1000.0)


def test_every_objective_fits_the_encoder():
    for layers in (1, 2, 4, 6, 12, 24, 48):
        compared = objectives.objectives_to_compare(layers)
        assert next(iter(compared.values())) == ObjectiveConfig()
        shape = config("bert", num_layers=layers).shape(IDS)
        assert not [
            p
            for objective in compared.values()
            for p in settings_problems(objective) + objective.misfits("objective", shape)
        ]


@pytest.mark.parametrize("by_cpu", [True, False])
def test_measured_savings_are_compared_with_predicted_ones(by_cpu):
    half = Round(tokens=200, rows=256, targets=100, wall=6.0, cpu=3.0, flops=1200.0)
    costly = Round(tokens=100, rows=128, targets=50, wall=5.0, cpu=3.0, flops=1100.0)
    base, saves, costs = objectives.objectives_markdown(
        {"MLM": [BASE] * 3, "a": [half] * 3, "b": [costly] * 3}, by_cpu=by_cpu
    )
    assert base.count("%") == 0
    # 6 FLOPs a token of 10; a quarter less time
    assert [cell.strip(" |") for cell in saves.split(" | ")[2:]] == ["40.0%", "25.0%", "0.62"]
    assert costs.endswith("| costs more |")
