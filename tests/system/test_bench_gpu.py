"""`megamask bench-gpu` as a command: every kind of part, tiny, on whatever device there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamask.bench.gpu.figures import read_figures
from megamask.bench.gpu.parts import PARTS
from megamask.data import local_text
from megamask.data.prepare import prepare
from megamask.data.settings import PrepareConfig

ROOT = Path(__file__).parent.parent.parent
SAME = {"steps-large": "steps-base", "steps-xl": "steps-base", "entropy-large": "entropy-base"}
"""Parts that are another one with a larger model."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    raw = folder / "text.jsonl"
    raw.write_text("".join(json.dumps({"text": one}) + "\n" for one in local_text.collect_local_text(60_000)))
    return prepare(PrepareConfig((str(raw),), folder / "shards", vocab_size=600, valid_share=0.2, workers=1))


def bench_gpu(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megamask", "bench-gpu", "--size", "tiny", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_every_part_gives_its_figures(tmp_path: Path, data: Path) -> None:
    assert all(PARTS[large].function == PARTS[base].function for large, base in SAME.items())
    parts = [name for name in PARTS if name not in SAME]
    done = bench_gpu("--in-process", "--data", data, "--output", tmp_path, "--parts", *parts)
    records, bad = read_figures(tmp_path / "figures.jsonl")
    assert [(one.part, one.figure) for one in records if one.figure.failed] == []
    assert (done.returncode, bad, {one.part for one in records}) == (0, 0, set(parts)), done.stderr
    assert all(PARTS[name].title in (tmp_path / "report.html").read_text() for name in parts)


def test_a_part_in_a_process_of_its_own_and_a_second_call_that_has_nothing_to_do(tmp_path: Path) -> None:
    first, second = (bench_gpu("--output", tmp_path, "--parts", "ceilings") for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "matmul bf16: " in first.stdout and "Finished before: ceilings" in second.stdout
    assert {one.part for one in read_figures(tmp_path / "figures.jsonl")[0]} == {"ceilings"}


def test_what_is_wrong_is_reported_at_once(tmp_path: Path) -> None:
    done = bench_gpu("--output", tmp_path / "out", "--limit", "soon", "--run-time", "0m")
    assert done.returncode == 2 and "`limit`" in done.stderr and "`run_time`" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
