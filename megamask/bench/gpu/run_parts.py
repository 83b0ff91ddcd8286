"""`megamask bench-gpu`: run the parts in their order, each in a process of its own, and write the figures down.

This process imports no torch and never touches the device, so a part has all of it. A part that fails, hangs, or leaves
the device in an error ends alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from megamask.bench.gpu import page, preparation
from megamask.bench.gpu.child import run_limited
from megamask.bench.gpu.figures import END, Figure, FigureFile, end_of_part
from megamask.bench.gpu.parts import PARTS, error_text, figures_of
from megamask.bench.gpu.settings import GpuBenchConfig, PartName
from megamask.errors import REQUEUE, ConfigError, raise_all
from megamask.runtime.child_process import child_environment
from megamask.runtime.output_folder import output_problems

FILE, PAGE, LOG = "figures.jsonl", "report.html", "log.txt"
DESCRIBE = "import json; from megamask.bench.gpu.machine import this_machine; print(json.dumps(this_machine()))"


def bench_gpu(config: GpuBenchConfig) -> int:
    """Measure the parts that are missing; returns the exit code.

    Raises ConfigError with everything that is wrong, LockError, DataError, StorageError, before anything is measured.
    """
    deadline = time.monotonic() + config.limit_seconds
    wanted = [name for name in PARTS if config.parts is None or name in config.parts]
    problems = output_problems(config.output)
    problems += preparation.text_problems(config) if preparation.reads_text(wanted) else []
    try:
        machine = _machine(config)
    except ConfigError as error:
        raise_all(ConfigError, [*problems, *error.problems])
        raise
    if config.size == "full" and not machine["gpu"]:
        problems.append("`size` 'full' needs a CUDA device, and torch finds none. `--size tiny` tries every part.")
    raise_all(ConfigError, problems)
    with preparation.held_folder(config.output):
        return _measure_parts(config, wanted, FigureFile(config.output / FILE, machine, config), deadline)


def _measure_parts(config: GpuBenchConfig, wanted: Sequence[PartName], file: FigureFile, deadline: float) -> int:
    finished = set() if config.again else file.finished()
    if skipped := [name for name in wanted if name in finished]:
        print(f"Finished before: {', '.join(skipped)}. `--again` measures them again.", flush=True)
    rest = [name for name in wanted if name not in finished]
    if preparation.reads_text(rest):
        preparation.prepare_text(config)
    in_time = True
    for name in rest:
        in_time &= measure_part(name, config, file, deadline - time.monotonic())
        page.write_page(config.output / PAGE, file)
    page.write_page(config.output / PAGE, file)
    print(f"Figures: {file.path}; beside the goals: {config.output / PAGE}", flush=True)
    missing = [name for name in wanted if name not in file.finished()]
    if missing:
        print(f"Not finished: {', '.join(missing)}. The same command measures them.", flush=True)
    return 0 if not missing else 1 if in_time else REQUEUE


def measure_part(name: PartName, config: GpuBenchConfig, file: FigureFile, left: float) -> bool:
    """Measure the part ``name`` and print its figures; False if ``left`` seconds were not enough."""
    part, begin, before = PARTS[name], time.monotonic(), len(file.records())
    if config.in_process:
        run_in_process(name, config, file)
        return True
    least, most = part.bounds(config)
    if left < least:
        print(f"{name}: not started, since only {max(0.0, left):.0f} s are left", flush=True)
        return False
    print(f"{name}: {part.title} (at most {min(left, most) / 60:.1f} min)", flush=True)
    error = _run_apart(name, config, min(left, most))
    figures = [one.figure for one in file.records()[before:]]
    ended = any(figure.name == END for figure in figures)
    if not ended:
        seconds = time.monotonic() - begin
        figures.append(Figure(name, error=error or "it ended without a result"))
        file.add(name, figures[-1], seconds)
        file.add(name, end_of_part(figures, seconds), seconds)
    for figure in figures:
        if figure.name != END:
            print(f"    {figure.name}: {page.value_text(figure)}", flush=True)
    return ended or left >= most


def run_in_process(name: PartName, config: GpuBenchConfig, file: FigureFile) -> None:
    """Measure the part ``name`` here, and write each figure as soon as it is measured."""
    begin = time.monotonic()
    figures: list[Figure] = []
    try:
        for figure in figures_of(name, config):
            figures.append(figure)
            file.add(name, figure, time.monotonic() - begin)
    except Exception as error:  # the next part goes on
        traceback.print_exc()
        figures.append(Figure(name, error=error_text(error)))
        file.add(name, figures[-1], time.monotonic() - begin)
    seconds = time.monotonic() - begin
    file.add(name, end_of_part(figures, seconds), seconds)


def _run_apart(name: PartName, config: GpuBenchConfig, seconds: float) -> str:
    """Measure the part ``name`` in a process of its own; what is wrong if it does not end well."""
    words = ["--parts", name, "--in-process", "--again", "--size", config.size, "--run-time", config.run_time]
    words += ["--output", str(config.output)] + (["--data", str(config.data)] if config.data else [])
    return run_limited(["-m", "megamask", "bench-gpu", *words], config.output / LOG, seconds)


def _machine(config: GpuBenchConfig) -> Mapping[str, Any]:
    """The machine and its versions, found by another process, since torch may take memory of the device."""
    if config.in_process:
        from megamask.bench.gpu.machine import this_machine

        return this_machine()
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE], env=child_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"torch does not work here: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
