"""Every reader under fire for minutes: MEGAMASK_FUZZ_SECONDS for each, three minutes if not set."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.hostile.fuzzing import fuzz
from tests.hostile.targets import TARGETS
from tests.hostile.test_fuzz import CONTROLS, differential, strange_packs, strange_schedules

SECONDS = float(os.environ.get("MEGAMASK_FUZZ_SECONDS", "180"))


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_under_fire(name: str, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**40)
    findings = fuzz(TARGETS[name], tmp_path, seed=seed, count=10**9, seconds=SECONDS)
    print(f"fuzz: {name} from seed {seed}: {findings}")
    assert not findings.wrong, "\n\n".join(findings.wrong)


@pytest.mark.parametrize("name", CONTROLS)
def test_a_reader_without_its_check_is_found_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*CONTROLS[name])
    findings = fuzz(TARGETS[name], tmp_path, count=20_000, seconds=SECONDS)
    print(f"fuzz without a check: {name}: {findings}")
    assert findings.wrong


def test_the_mapped_reader_gives_what_the_plainest_reader_gives(tmp_path: Path) -> None:
    read = sum(differential(tmp_path / str(seed), seed, samples=10_000) for seed in range(100))
    print(f"fuzz: {read} tokens read by two readers, all equal")
    assert read >= 10**6


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_the_masker_accepts_any_pack_or_names_the_reason(unit: str) -> None:
    planned, refused = strange_packs(unit, seed=10**6, count=30_000)
    print(f"fuzz: {unit}: {planned} plans, {refused} refused")
    assert planned and refused


def test_a_schedule_stays_between_its_ends_or_is_refused() -> None:
    taken, refused = strange_schedules(seed=10**6, count=300_000)
    print(f"fuzz: {taken} schedules taken, {refused} refused")
