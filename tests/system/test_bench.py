"""The benchmark as a command, on very little: the table and the file say the same of every variant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megamask.data import local_text
from megamask.data.prepare import prepare
from megamask.data.settings import PrepareConfig
from megamask.runtime.precision import device_support

ROOT = Path(__file__).parent.parent.parent
PACK_TOKENS, STEPS, ROUNDS = 128, 2, 3


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[list[str], dict]:
    folder = tmp_path_factory.mktemp("bench")
    raw = folder / "text.jsonl"
    raw.write_text("".join(json.dumps({"text": one}) + "\n" for one in local_text.collect_local_text(60_000)))
    data = prepare(PrepareConfig((str(raw),), folder / "shards", vocab_size=600, valid_share=0.2, workers=1))
    command = [sys.executable, "tools/bench.py", "--data", data, "--text", raw, "--json", folder / "found.json"]
    sizes = ["--length", "32", "--pack-tokens", str(PACK_TOKENS), "--steps", str(STEPS), "--rounds", str(ROUNDS)]
    done = subprocess.run(list(map(str, [*command, *sizes])), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), json.loads((folder / "found.json").read_text())


def test_table_and_file_name_the_same_variants(measured):
    printed, record = measured
    table = [line for line in printed if line.startswith("| ")]
    names = [one["name"] for one in record["variants"]]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == names
    assert len({line.count("|") for line in table}) == 1
    bf16 = device_support(torch.device("cpu")).bf16
    assert sum(name.startswith("megamask") for name in names) == (5 if bf16 else 2)
    assert sum("concatenated" in name or "padded" in name for name in names) == (4 if bf16 else 2)
    assert any("bf16" in name for name in names) == bf16
    assert record["machine"]["instructions"] in table[0].split(" | ")[0]


def test_rounds_have_the_requested_steps(measured):
    _, record = measured
    for one in record["variants"]:
        assert len(one["rounds"]) == ROUNDS
        for part in one["rounds"]:
            assert 0 < part["targets"] < part["tokens"] <= part["rows"] <= STEPS * PACK_TOKENS
            assert "padded" in one["name"] or part["rows"] == STEPS * PACK_TOKENS
            assert part["wall"] > 0 and part["cpu"] > 0


def test_ratios_are_of_the_medians(measured):
    _, record = measured
    speed = {one["name"]: one["median"]["per_cpu_second"] for one in record["variants"]}
    for one in record["variants"]:
        assert one["ratios"] == {base: speed[one["name"]] / speed[base] for base in one["ratios"]}
        speeds = [part["tokens"] / part["cpu"] for part in one["rounds"]]
        assert min(speeds) <= speed[one["name"]] <= max(speeds)


def test_all_problems_are_reported_together():
    command = [sys.executable, "tools/bench.py", "--rounds", "0", "--ratio", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "`rounds`" in done.stderr and "`ratio`" in done.stderr and "Traceback" not in done.stderr
