"""Rounds in turn, medians, ratios."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

import pytest

from megamask.bench.measure import Medians, Round, measure_in_turn
from megamask.bench.settings import BenchConfig
from megamask.bench.table import ratios, speed_markdown
from megamask.errors.setting_rules import settings_problems
from megamask.runtime.precision import PrecisionSupport


class Counted:
    """A variant that records its calls, and whose rounds have different speeds."""

    def __init__(self, name: str, calls: list[str]):
        self.name, self._calls = name, calls

    def run(self, steps: int) -> Round:
        self._calls.append(self.name)
        seconds = float(len(self._calls))
        return Round(tokens=6 * steps, rows=8 * steps, targets=2 * steps, wall=seconds, cpu=seconds / 2)


def test_variants_take_turns_and_the_first_round_is_discarded():
    calls: list[str] = []
    rounds_of = measure_in_turn([Counted(name, calls) for name in "abc"], rounds=5, steps=2)
    assert "".join(calls) == "abc" * 6
    for at, name in enumerate("abc"):
        assert [one.wall for one in rounds_of[name]] == [3 * turn + at + 1 for turn in range(1, 6)]


def test_the_time_left_ends_at_zero(capsys):
    measure_in_turn([Counted(name, []) for name in "ab"], rounds=2, steps=1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and all(", ETA 00:0" in line for line in lines) and lines[-1].endswith(", ETA 00:00")


def test_medians_are_over_rounds():
    rounds = measure_in_turn([Counted("a", [])], rounds=7, steps=1)["a"]
    medians = Medians.of(rounds)
    assert medians.per_second == statistics.median(6 / one.wall for one in rounds)
    assert medians.per_cpu_second == 2 * medians.per_second
    assert (medians.fill, medians.masked, medians.flops_per_second) == (6 / 8, 2 / 6, None)


def test_ratios_are_quotients_of_the_named_speed():
    quotients = {
        "slow": Medians(10, 40, 1, 0.15, None),
        "fast": Medians(30, 60, 1, 0.15, 5e11),
    }
    assert ratios(quotients, ["slow"], by_cpu=False) == {"slow": [1], "fast": [3]}
    assert ratios(quotients, ["slow", "fast"], by_cpu=True) == {"slow": [1, 40 / 60], "fast": [1.5, 1]}


@pytest.mark.parametrize("peak", [None, 1e12])
def test_every_line_of_the_table_has_every_column(peak):
    medians = {name: Medians(1, 2, 0.5, 0.15, flops) for name, flops in (("a", None), ("b", 5e11))}
    head, rule, *lines = speed_markdown(medians, ["a", "b"], by_cpu=False, peak=peak)
    assert {line.count("|") for line in (rule, *lines)} == {head.count("|")}
    assert ("MFU" in head) == (peak is not None) == ("50.0% |" in lines[1].rsplit("masked")[-1][-10:])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"length": 4}, ["length"]),
        ({"pack_tokens": 100}, ["pack_tokens"]),
        ({"rounds": 0, "steps": 0, "threads": 0}, ["rounds", "steps", "threads"]),
        ({"precisions": ()}, ["precisions"]),
        ({"ratio": 1.0, "dropout": 1.0, "peak_flops": 0.0}, ["ratio", "dropout", "peak_flops"]),
    ],
)
def test_all_problems_are_named(wrong, named):
    problems = settings_problems(BenchConfig(**wrong))
    assert len(problems) == len(named)
    assert all(f"`{name}`" in sentence for name, sentence in zip(named, problems, strict=True))
    assert not settings_problems(BenchConfig())


@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_is_measured_if_supported_or_named(bf16):
    here = PrecisionSupport(bf16, "")
    assert BenchConfig().measured(here) == (("fp32", "bf16") if bf16 else ("fp32",))
    assert BenchConfig(precisions=("bf16",)).measured(here) == ("bf16",)


def test_the_benchmark_uses_no_network() -> None:
    source = "import megamask.bench; from huggingface_hub import constants; print(constants.HF_HUB_OFFLINE)"
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_paths_are_checked_before_anything_is_measured(tmp_path):
    missing = tmp_path / "missing"
    problems = settings_problems(BenchConfig(data=missing, text=missing, json=missing / "found.json"))
    assert [problem.split()[0] for problem in problems] == ["`data`", "`text`", "`json`"]
    assert not settings_problems(BenchConfig(data=tmp_path, text=tmp_path, json=tmp_path / "found.json"))
