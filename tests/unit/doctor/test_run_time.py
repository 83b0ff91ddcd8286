"""Time and disk: relations between rates, steps and limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megamask.config.pretrain_config import PretrainConfig
from megamask.config.settings import CheckpointConfig
from megamask.doctor.report_text import LONGEST, YEAR, duration, readable_number
from megamask.doctor.run_time import disk_problems, predict_disk, predict_time
from megamask.doctor.settings import MachineConfig, parse_memory
from megamask.entropy.settings import EntropyConfig
from megamask.errors.setting_rules import settings_problems

CONFIG = PretrainConfig(steps=1000, checkpoint=CheckpointConfig(every=100, keep=3))
TOKENS = CONFIG.packs.per_step * CONFIG.packs.tokens


def test_a_measured_rate_gives_the_time_of_all_tokens() -> None:
    time = predict_time(CONFIG, MachineConfig(tokens_per_second=5000, job_time="1h"), 8, step_flops=1e12)
    assert time is not None and time.jobs is not None
    assert time.seconds * 5000 == pytest.approx(1000 * TOKENS)
    assert (time.jobs - 1) * 3600 < time.seconds <= time.jobs * 3600


def test_an_assumed_rate_spends_the_share_of_the_peak_of_all_devices() -> None:
    time = predict_time(CONFIG, MachineConfig(peak_flops=1e14, assumed_mfu=0.5), 8, step_flops=1e12)
    assert time is not None
    assert time.seconds * 0.5 * 1e14 * 8 == pytest.approx(1000 * 1e12)
    assert "assumption" in time.source


@pytest.mark.parametrize("rate", [5e-324, 1e-300, 1e300])
@pytest.mark.parametrize("name", ["tokens_per_second", "peak_flops"])
def test_absurd_rates_give_short_lines(name: str, rate: float) -> None:
    time = predict_time(CONFIG, MachineConfig(**{name: rate}, job_time="1h"), 8, step_flops=1e12)
    assert time is not None
    assert len(duration(time.seconds)) < 30 and len(readable_number(time.rate)) < 30 and len(str(time.jobs)) < 30
    assert (time.jobs is None) == (rate < 1) == (duration(time.seconds) == "more than 10,000 years")


def test_a_time_is_in_the_largest_unit_of_which_there_are_two() -> None:
    for unit, size in (("minutes", 60), ("hours", 3600), ("days", 86400), ("years", YEAR)):
        assert duration(2 * size) == f"2.0 {unit}" and unit not in duration(1.9 * size)
    assert duration(LONGEST) == "10,000.0 years"


def test_without_a_rate_there_is_no_time() -> None:
    assert predict_time(CONFIG, MachineConfig(), 8, step_flops=1e12) is None


def test_a_budget_is_the_time() -> None:
    time = predict_time(replace(CONFIG, time_budget="2h"), MachineConfig(tokens_per_second=1), 1, step_flops=1.0)
    assert time is not None and time.seconds == 7200


def test_disk_holds_the_kept_checkpoints_and_the_next() -> None:
    disk = predict_disk(replace(CONFIG, export=False), weights=10, muon=0)
    assert (disk.checkpoint, disk.written, disk.most) == (120, 10, 480)
    short = predict_disk(replace(CONFIG, steps=1, export=False), weights=10, muon=0)
    assert (short.written, short.most) == (1, 120)


def test_a_checkpoint_holds_the_moving_average_of_the_weights() -> None:
    averaged = replace(CONFIG, entropy=EntropyConfig("exact", ema_decay=0.99))
    plain, larger = (predict_disk(config, weights=10, muon=4) for config in (CONFIG, averaged))
    assert (plain.checkpoint, larger.checkpoint) == (104, 144)
    assert larger.most - plain.most == 4 * 40


def test_a_full_disk_is_one_problem_and_checkpoints_that_are_there_count(tmp_path: Path) -> None:
    disk = predict_disk(CONFIG, weights=10, muon=0)
    assert disk.most > disk.start
    (problem,) = disk_problems(tmp_path, 0, disk)
    assert f"{disk.most:.0f}" in problem
    assert disk_problems(tmp_path, int(disk.most) - 1, disk) and not disk_problems(tmp_path, int(disk.most), disk)
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-1" / "weights").write_bytes(b"0" * 100)
    assert not disk_problems(tmp_path, int(disk.most) - 100, disk)
    assert disk_problems(tmp_path, int(disk.start) - 1, disk)


@pytest.mark.parametrize(("amount", "size"), [("80GB", 80e9), ("40GiB", 40 * 2**30), ("1.5TB", 1.5e12)])
def test_memory_has_a_unit(amount, size) -> None:
    assert parse_memory(amount) == size


@pytest.mark.parametrize("amount", ["80", "GB", "-1GB", "80 GB", "0GB", "1e3GB"])
def test_other_amounts_are_refused(amount) -> None:
    (problem,) = settings_problems(MachineConfig(gpus=1, gpu_memory=amount))
    assert "`gpu_memory`" in problem


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (MachineConfig(gpu_memory="80GB"), "gpu_memory"),
        (MachineConfig(gpus=8, nodes=3), "gpus"),
        (MachineConfig(job_time="24"), "job_time"),
        (MachineConfig(assumed_mfu=0.3), "assumed_mfu"),
        (MachineConfig(tokens_per_second=1.0, peak_flops=1.0), "peak_flops"),
    ],
)
def test_settings_without_effect_or_meaning_are_refused(settings, name) -> None:
    (problem,) = settings_problems(settings)
    assert f"`{name}`" in problem
