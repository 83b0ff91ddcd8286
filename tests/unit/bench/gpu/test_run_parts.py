"""Parts in their order, failures, time limits, and processes that do not end."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

from megamask.bench.gpu import preparation, run_parts
from megamask.bench.gpu.child import run_limited
from megamask.bench.gpu.figures import END, Figure, FigureFile
from megamask.bench.gpu.parts import PARTS, figures_of
from megamask.bench.gpu.settings import GpuBenchConfig, PartName
from megamask.errors import REQUEUE, ConfigError, LockError
from megamask.errors.setting_rules import settings_problems

MACHINE = {"gpu": None, "cpu": "x"}


def test_the_parts_are_those_that_can_be_named_and_their_functions_exist() -> None:
    assert tuple(PARTS) == get_args(PartName)
    for part in PARTS.values():
        module, _, name = part.function.partition(":")
        assert callable(getattr(import_module(f"megamask.bench.gpu.{module}"), name))
        assert 0 < part.least < part.most


def test_what_starts_the_parts_imports_no_torch() -> None:
    source = "import sys, megamask.bench.gpu.run_parts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source]).returncode == 0


def test_times_that_are_not_times_are_named() -> None:
    problems = settings_problems(GpuBenchConfig(limit="soon", run_time="0m", parts=()))
    assert [name for name in ("limit", "run_time", "parts") if not any(f"`{name}`" in each for each in problems)] == []
    assert not settings_problems(GpuBenchConfig())


def test_full_size_without_cuda_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_parts, "_machine", lambda config: MACHINE)
    with pytest.raises(ConfigError, match=r"needs a CUDA device.*--size tiny"):
        run_parts.bench_gpu(GpuBenchConfig(output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


class Measured:
    """In place of the parts: what was measured, in order; `zero` fails after its first figure until it is repaired."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.prepared: list[list[str]] = []
        """What had been measured whenever the text was prepared."""
        self.broken = True

    def __call__(self, name: PartName, config: GpuBenchConfig) -> Iterator[Figure]:
        self.names.append(name)
        yield Figure("speed", 1.0, "tokens/s")
        if name == "zero" and self.broken:
            raise RuntimeError("CUDA error: an illegal memory access\nand more lines")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Measured:
    measured = Measured()
    monkeypatch.setattr(run_parts, "figures_of", measured)
    monkeypatch.setattr(preparation, "open_text", lambda config: measured.prepared.append(list(measured.names)))
    monkeypatch.setattr(run_parts, "_machine", lambda config: MACHINE)
    return measured


def test_a_failure_costs_one_part_and_a_second_call_repeats_only_that(tmp_path: Path, parts: Measured) -> None:
    config = GpuBenchConfig(output=tmp_path, size="tiny", in_process=True)
    assert run_parts.bench_gpu(config) == 1
    assert parts.names == list(PARTS)
    file = FigureFile(tmp_path / run_parts.FILE, MACHINE, config)
    failure = file.latest()["zero", "zero"].figure
    assert failure.error == "RuntimeError: CUDA error: an illegal memory access"
    assert file.finished() == PARTS.keys() - {"zero"}
    assert "an illegal memory access" in (tmp_path / run_parts.PAGE).read_text()
    parts.names.clear()
    parts.broken = False
    assert run_parts.bench_gpu(config) == 0
    assert parts.names == ["zero"] and "illegal" not in (tmp_path / run_parts.PAGE).read_text()


def test_text_is_prepared_before_anything_is_measured_and_only_if_it_is_read(tmp_path: Path, parts: Measured) -> None:
    for names, prepared in ((("zero", "ceilings"), [[]]), (("ceilings", "tests"), [])):
        parts.names.clear()
        parts.prepared.clear()
        run_parts.bench_gpu(GpuBenchConfig(tmp_path, parts=names, size="tiny", in_process=True, again=True))
        assert (parts.prepared, len(parts.names)) == (prepared, 2)


def test_output_text_and_device_are_checked_together(tmp_path: Path, text: Path, parts: Measured) -> None:
    (tmp_path / "file").touch()
    config = GpuBenchConfig(tmp_path / "file" / "out", data=tmp_path / "missing")
    with pytest.raises(ConfigError) as caught:
        run_parts.bench_gpu(config)
    rules = ("`output` is .* is not a folder", "`data` must be a folder", "`size` 'full' needs a CUDA device")
    assert all(re.search(rule, each) for rule, each in zip(rules, caught.value.problems, strict=True))
    assert not preparation.text_problems(GpuBenchConfig(data=text, size="tiny"))
    few = preparation.text_problems(GpuBenchConfig(data=text))
    assert [re.findall(r"in the split '(\w+)'", each) for each in few] == [["train"], ["valid"]]
    copy = Path(shutil.copytree(text, tmp_path / "copy"))
    (copy / "train-00000.tokens.npy").unlink()
    (damaged,) = preparation.text_problems(GpuBenchConfig(data=copy, size="tiny"))
    assert "train-00000.tokens.npy" in damaged and not parts.names


def test_two_commands_do_not_measure_into_one_folder(tmp_path: Path, parts: Measured) -> None:
    config = GpuBenchConfig(tmp_path, parts=("ceilings",), size="tiny", in_process=True, again=True)
    with preparation.held_folder(tmp_path):
        with pytest.raises(LockError, match="is being written by process"):
            run_parts.bench_gpu(config)
        source = "from pathlib import Path; from megamask.bench.gpu import preparation\n"
        source += f"with preparation.held_folder(Path({str(tmp_path)!r})): pass"
        assert subprocess.run([sys.executable, "-c", source]).returncode == 0  # a part of this command
    assert not parts.names and run_parts.bench_gpu(config) == 0


def test_named_parts_keep_the_usual_order_and_again_repeats_them(tmp_path: Path, parts: Measured) -> None:
    config = GpuBenchConfig(tmp_path, parts=("trainer", "ceilings"), size="tiny", in_process=True, again=True)
    assert [run_parts.bench_gpu(config) for _ in range(2)] == [0, 0]
    assert parts.names == ["ceilings", "trainer"] * 2


def test_a_part_that_the_time_does_not_allow_is_not_started(
    tmp_path: Path, parts: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_parts, "_run_apart", lambda name, config, seconds: parts.names.append(name) or "")
    assert run_parts.bench_gpu(GpuBenchConfig(tmp_path, size="tiny", limit="29s")) == REQUEUE
    assert parts.names == [name for name, part in PARTS.items() if part.least < 29]


def test_a_process_that_ends_without_a_result_leaves_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_parts, "_run_apart", lambda name, config, seconds: "Segmentation fault (exit code -11)")
    config = GpuBenchConfig(tmp_path, size="tiny")
    file = FigureFile(tmp_path / run_parts.FILE, MACHINE, config)
    assert run_parts.measure_part("zero", config, file, left=10_000)
    assert [one.figure.name for one in file.records()] == ["zero", END]
    assert "Segmentation fault" in file.records()[0].figure.error and not file.finished()


def test_a_process_that_does_not_end_is_stopped(tmp_path: Path) -> None:
    found = run_limited(["-c", "import time; time.sleep(600)"], tmp_path / "log.txt", 0.2)
    assert found == "it was stopped after 0.2 s"


def test_nothing_that_a_process_started_outlives_it(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    source = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    assert run_limited(["-c", source], log, 60.0) == ""
    _wait(lambda: not _runs(log.read_text().strip()))  # the kernel ends it when it gets the core


def test_a_part_ends_with_a_command_that_is_killed(tmp_path: Path) -> None:
    """It would use the device while the next command measures."""
    log = tmp_path / "log.txt"
    part = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    source = "from pathlib import Path; from megamask.bench.gpu.child import run_limited\n"
    source += f"run_limited(['-c', {part!r}], Path({str(log)!r}), 600.0)"
    command = subprocess.Popen([sys.executable, "-c", source])
    _wait(lambda: log.exists() and log.read_text().endswith("\n"))
    command.kill()
    command.wait()
    _wait(lambda: not _runs(log.read_text().strip()))


def _runs(process: str) -> bool:
    state = Path("/proc", process, "stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def _wait(reached: Callable[[], bool]) -> None:
    patience = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < patience
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("source", "problem"),
    [("print('fine')", ""), ("raise SystemExit(3)", "no output (exit code 3)"), ("1/0", "division by zero")],
)
def test_what_a_process_ends_with_is_reported(tmp_path: Path, source: str, problem: str) -> None:
    log = tmp_path / "log.txt"
    log.write_text("of the part before\n")
    found = run_limited(["-c", source], log, 60.0)
    assert problem in found and bool(found) == bool(problem)


def test_a_part_measures_what_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measure(config: GpuBenchConfig, size: str) -> Iterator[Figure]:
        calls.append(size)
        return iter(())

    monkeypatch.setattr("megamask.bench.gpu.steps.training_steps", measure)
    for name in PARTS:
        if PARTS[name].function == "steps:training_steps":
            assert list(figures_of(name, GpuBenchConfig())) == [] and name == f"steps-{calls[-1]}"
