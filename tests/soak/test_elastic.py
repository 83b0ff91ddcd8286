"""Every pair of ZeRO stages on every number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes.moves import Place, moved
from tests.system.cells import Text

STAGES = [f"zero {stage}" for stage in range(4)]
FROM = {1: 2, 2: 4, 4: 1}
"""Where a run was that goes on on so many ranks."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text.made(tmp_path_factory.mktemp("elastic"))


@pytest.mark.parametrize("precision", ["", ", bf16"])
def test_every_pair_of_stages_on_every_number_of_ranks(precision: str, run_ranks, text: Text, tmp_path: Path) -> None:
    # DeepSpeed has no bf16 in stage 0
    stages = [f"{stage}{precision}" for stage in (STAGES[1:] if precision else STAGES)]
    moves = [
        (Place(source, there), Place(target, world))
        for world, there in FROM.items()
        for source in stages
        for target in stages
    ]
    outcomes = moved(run_ranks, text, tmp_path, moves, reference=stages[0], timeout=3600)
    assert len(outcomes) == 3 * len(stages) ** 2
    # under bf16 rounding decides how far losses lie apart, and nothing bounds that
    assert [o for o in outcomes if o.tensors or o.packs or o.rates or not (o.exact or precision)] == []
