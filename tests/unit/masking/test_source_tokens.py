"""Random tokens follow the unigram distribution of the source of their pack."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from megamask.config.checks import config_problems
from megamask.config.pretrain_config import PretrainConfig
from megamask.errors import ConfigError
from megamask.masking.corrupt import SourceTokens
from megamask.masking.masker import Masker
from megamask.masking.rng import PackRng
from megamask.masking.settings import Corruption, MaskingConfig
from megamask.schedules import Schedule
from tests.batches import IDS, pack

ONLY_RANDOM = MaskingConfig(Schedule(start=0.5), corruption=Corruption(0.0, 1.0, 0.0, "source"))


def planted(source: int) -> np.ndarray:
    """Counts of a source, with counts of special tokens too; half of the other tokens do not occur in it."""
    counts = np.random.default_rng(source).integers(1, 1000, IDS.size)
    counts[source::2] = 0
    counts[list(IDS.special)] = 10_000
    return counts


def tokens() -> SourceTokens:
    return SourceTokens([planted(0), planted(1)], lambda number: number % 2, IDS)


@pytest.mark.parametrize("source", [0, 1])
def test_random_tokens_have_the_frequencies_of_their_source(source: int) -> None:
    masker, drawn = Masker(ONLY_RANDOM, IDS, source_tokens=tokens()), np.zeros(IDS.size, np.int64)
    for number in range(source, 400, 2):
        plan = masker(pack([100, 100], number=number), progress=0.0, rng=PackRng(5, number))
        drawn += np.bincount(plan.inputs[plan.targets].numpy(), minlength=IDS.size)
    expected = planted(source).astype(float)
    expected[list(IDS.special)] = 0
    assert drawn[expected == 0].sum() == 0
    occurs = expected > 0
    frequencies = expected[occurs] / expected.sum() * drawn.sum()
    assert stats.chisquare(drawn[occurs], frequencies).pvalue > 0.001
    other = planted(1 - source).astype(float)[occurs] + 1
    assert stats.chisquare(drawn[occurs], other / other.sum() * drawn.sum()).pvalue < 1e-9


def test_the_rest_of_the_plan_is_as_with_tokens_of_the_vocabulary() -> None:
    mixed = replace(ONLY_RANDOM, corruption=Corruption(random_from="source"))
    plain = replace(ONLY_RANDOM, corruption=Corruption())
    batch = pack([100, 100], number=3)
    one = Masker(mixed, IDS, source_tokens=tokens())(batch, progress=0.0, rng=PackRng(5, 3))
    other = Masker(plain, IDS)(batch, progress=0.0, rng=PackRng(5, 3))
    assert one.targets.equal(other.targets) and one.hidden.equal(other.hidden)
    assert not one.inputs.equal(other.inputs)


def test_a_run_without_sources_is_refused(tmp_path: Path) -> None:
    config = replace(PretrainConfig(), masking=MaskingConfig(corruption=Corruption(random_from="source")))
    name = "`masking.corruption.random_from`"
    assert f"{name} 'source' has no effect with a single folder in `data`. Remove it." in config_problems(config)
    stored = replace(config, distill=replace(config.distill, stored=tmp_path))
    assert f"{name} must be 'vocabulary' with `distill.stored`, but is 'source'." in config_problems(stored)
    unused = replace(config, masking=MaskingConfig(corruption=Corruption(1.0, 0.0, 0.0, "source")))
    assert any("has no effect while `masking.corruption.random` is 0" in problem for problem in config_problems(unused))
    with pytest.raises(ConfigError, match="needs a run on a mixture"):
        Masker(ONLY_RANDOM, IDS)
