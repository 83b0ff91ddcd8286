"""The measurements themselves, tiny and on any device."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamask.bench.gpu import commands, compared, kernels, sizes
from megamask.bench.gpu.figures import NEEDS_CUDA, Figure
from megamask.bench.gpu.goals import GOALS
from megamask.bench.gpu.settings import GpuBenchConfig
from megamask.bench.gpu.sizes import FULL, TINY, bench_config
from megamask.bench.gpu.timing import each, seconds_of
from megamask.bench.megamask_variant import MegamaskVariant
from megamask.bench.settings import COMPILED
from megamask.errors.setting_rules import settings_problems
from megamask.model.shape import SIZES
from megamask.model.statistics import token_stats

CONFIG = GpuBenchConfig(size="tiny")


def test_a_failed_measurement_costs_only_its_own_figures() -> None:
    def broken():
        yield Figure("first", 1.0)
        raise MemoryError

    found = list(each([("broken", broken), ("fine", lambda: [Figure("second", 2.0)])]))
    assert [one.name for one in found] == ["first", "broken", "second"]
    assert [one.error for one in found] == ["", "MemoryError", ""]


def test_seconds_are_at_least_those_of_the_work() -> None:
    assert seconds_of(lambda: time.sleep(0.01), repeats=3, warm_up=0) >= 0.01


@pytest.mark.parametrize("measure", [kernels.ceilings, kernels.attention_backends, kernels.prediction_statistics])
def test_kernels_give_positive_figures_with_names_of_their_own(measure) -> None:
    figures = list(measure(CONFIG))
    assert len({one.name for one in figures}) == len(figures) > 0
    assert not [one for one in figures if one.failed]
    assert all(one.value > 0 for one in figures if one.value is not None)
    absent = [one.name for one in figures if one.error == NEEDS_CUDA]
    assert bool(absent) != torch.cuda.is_available()


@pytest.mark.parametrize("chosen", [FULL, TINY])
@pytest.mark.parametrize("mixed", [False, True])
def test_sequences_fill_the_tokens_and_none_is_too_long(chosen, mixed: bool) -> None:
    for length in chosen.lengths:
        layout = kernels._lengths(chosen, length, mixed)
        assert layout.rows == int(layout.lengths.sum()) == chosen.attention_tokens
        assert int(layout.lengths.min()) >= 1 and int(layout.lengths.max()) <= length == layout.max_seqlen
        assert mixed == (len(set(layout.lengths.tolist())) > 1)


def test_eager_statistics_are_those_of_the_kernel() -> None:
    rows, weight, bias = torch.randn(7, 5), torch.randn(11, 5), torch.randn(11)
    labels = torch.arange(7)
    entropy, log_prob = kernels.eager_statistics(rows, weight, bias, labels)
    stats = token_stats(rows, weight, bias, labels)
    torch.testing.assert_close(entropy, stats.entropy)
    torch.testing.assert_close(log_prob, stats.log_prob)


def test_full_sizes_have_whole_sequences_and_known_models() -> None:
    assert all(FULL.packs[size] % FULL.length == 0 and size in SIZES for size in FULL.packs)
    assert FULL.compared_pack % FULL.length == 0
    assert FULL.packs.keys() == TINY.packs.keys()


def test_only_the_comparison_with_the_trainer_compiles() -> None:
    full = GpuBenchConfig()
    assert bench_config(full, "base", compiled=True).compile and not bench_config(full, "large").compile
    assert not bench_config(CONFIG, "base", compiled=True).compile
    assert not settings_problems(bench_config(full, "large")) + settings_problems(bench_config(CONFIG, "base"))


def test_the_trainer_is_compared_with_steps_of_the_same_kind(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the speeds of a comparison are there before the next begins."""
    monkeypatch.setattr(sizes, "TINY", replace(TINY, compile=True))
    taken: list[str] = []
    run = MegamaskVariant.run
    monkeypatch.setattr(MegamaskVariant, "run", lambda self, steps: taken.append(self.name) or run(self, steps))
    pairs = {}
    with torch.compiler.set_stance("force_eager"):
        for figure in compared.beside_trainer(replace(CONFIG, data=text)):
            assert not figure.failed
            ours, _, theirs = figure.name.partition(", x ")
            if theirs and ours.startswith("megamask"):
                pairs[ours] = theirs, taken[-1]
    assert list(pairs.items()) == [
        (f"megamask bert, fp32{how}", (f"Trainer, concatenated, fp32{how}", f"megamask bert, fp32{how}"))
        for how in ("", COMPILED)
    ]
    patterns = [goal.pattern for goal in GOALS if goal.part == "trainer"]
    names = [f"{ours}, x {theirs}".replace("fp32", "bf16") for ours, (theirs, _) in pairs.items()]
    assert [[bool(re.fullmatch(pattern, name)) for name in names] for pattern in patterns] == [
        [True, False], [False, True],
    ]  # fmt: skip


RESULTS = """<?xml version="1.0"?><testsuites><testsuite tests="4">
<testcase classname="tests.gpu.test_kernels" name="test_a"/>
<testcase classname="tests.gpu.test_kernels" name="test_b[x]"><failure message="assert 1 == 2&#10;more"/></testcase>
<testcase classname="tests.gpu.test_kernels" name="test_c"><skipped message="no CUDA"/></testcase>
<testcase classname="" name="tests.gpu.test_attention"><error message="collection failure"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize("on_gpu", [True, False])
def test_results_of_tests_are_counted_and_failures_named(on_gpu: bool) -> None:
    figures = {one.name: one for one in commands.read_test_results(RESULTS, on_gpu=on_gpu)}
    assert figures["test_kernels: test_b[x]"].error == "assert 1 == 2"
    assert figures[": tests.gpu.test_attention"].error == "collection failure"
    assert (figures["failed"].value, figures["skipped"].value) == (2, 1)
    assert figures["passed"] == (Figure("passed", 1, "tests") if on_gpu else Figure("passed", error=NEEDS_CUDA))


def test_the_log_of_a_run_becomes_figures() -> None:
    lines = [
        {"step": 0, "valid/loss": 9.0, "valid/unigram_loss": 7.0},
        *({"step": step, "tokens_per_second": 100.0 * step, "data_wait": 0.1} for step in (1, 2, 3)),
        {"step": 3, "valid/loss": 6.0, "valid/unigram_loss": 7.0},
    ]
    figures = {one.name: one for one in commands.run_figures(lines, on_gpu=True)}
    assert figures["steps"].value == 3 and figures["tokens_per_second, median of the log"].value == 200.0
    assert (figures["validation loss, first"].value, figures["validation loss, last"].value) == (9.0, 6.0)
    assert figures["mfu, median of the log"].failed and figures["unigram loss"].value == 7.0
    assert [one.name for one in commands.run_figures([], on_gpu=False) if one.value is not None] == ["steps"]


def test_the_flags_of_the_run_are_flags_of_pretrain(tmp_path: Path) -> None:
    from megamask.config import cli

    for config in (GpuBenchConfig(run_time="7m"), CONFIG):
        words = [*commands.run_flags(config), "--data", str(tmp_path), "--output", str(tmp_path / "run")]
        run = cli.parse_command(words).run
        assert run.model.dropout == 0 and run.time_budget == ("7m" if config.size == "full" else None)
        assert replace(run, time_budget=None).steps > 0
        assert run.packs.tokens == sizes.sizes(config).run_pack
