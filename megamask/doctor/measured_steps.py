"""Run some steps of a planned run on one device of this machine, and time the loader alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import harmonic_mean, median

from megamask.config.phases import phase_ends, run_phases
from megamask.config.pretrain_config import PretrainConfig, as_dict
from megamask.data.loader import Loader
from megamask.doctor.settings import DoctorCommand
from megamask.errors import ConfigError
from megamask.metrics.metrics_file import read_metrics
from megamask.runtime.child_process import child_environment, end_with_parent
from megamask.runtime.output_folder import existing_parent
from megamask.training.run_text import RunText

WINDOWS = 4
"""Lines of the log in a probe. The first is left out, because it includes the first use of everything."""


@dataclass(frozen=True)
class MeasuredSteps:
    """What a probe measured on one device. Tokens count padding, as the rate in the log does."""

    steps: int
    tokens_per_second: float
    data_wait: float
    """Share of the time that steps waited for data."""
    loader_tokens_per_second: float
    """Of the loader alone, in this process."""
    peak_memory: int
    """Bytes of resident memory of the process, libraries and evaluation included."""


def measure_steps(command: DoctorCommand, text: RunText, steps: int) -> MeasuredSteps:
    """Run ``steps`` steps of ``command`` in a process of its own, with the packs that one of its devices gets.

    The schedules of the run are compressed into them, so a masking rate that decays, a teacher that starts late or
    a phase with longer sequences counts with its share. Communication between devices is not measured. Writes a run
    folder with one checkpoint beside `output` and deletes it, unless this process is killed. ConfigError if the process
    fails, with its last lines.
    """
    config = probe_settings(command.run, command.num_ranks, steps)
    loader = _loader_rate(config, text, steps)
    with tempfile.TemporaryDirectory(prefix="probe-", dir=existing_parent(config.output)) as folder:
        metrics, peak = _train(command, config, steps, Path(folder))
    windows = [line for line in metrics if "tokens_per_second" in line][1:]
    rates = [line["tokens_per_second"] for line in windows]
    return MeasuredSteps(steps, harmonic_mean(rates), median(line["data_wait"] for line in windows), loader, peak)


def probe_settings(config: PretrainConfig, num_ranks: int, steps: int) -> PretrainConfig:
    """``config`` with the packs of one of ``num_ranks`` devices, and each phase for its share of ``steps``."""
    packs = replace(config.packs, per_step=config.packs.per_step // num_ranks or 1)
    phases, begin = [], 0
    for phase, run_end in zip(config.phases, phase_ends(config), strict=True):
        end = min(max(begin + 1, round(run_end / config.steps * steps)), steps - 1)
        per_step = phase.per_step and (phase.per_step // num_ranks or 1)
        if end > begin:
            phases.append(replace(phase, until=None, steps=end - begin, per_step=per_step))
        begin = end
    return replace(config, packs=packs, phases=tuple(phases))


def measured_lines(probe: MeasuredSteps) -> list[str]:
    """What the probe measured, and whether the loader can keep up."""
    lines = [
        f"probe of {probe.steps} steps on one device here: {probe.tokens_per_second:,.0f} tokens/s, "
        f"{probe.data_wait:.1%} of the time waiting for data; {probe.peak_memory / 1e9:,.2f} GB of resident memory",
    ]
    ratio = probe.loader_tokens_per_second / probe.tokens_per_second
    bound = "" if ratio > 1 else ": the loader limits the rate"
    lines.append(f"loader alone: {probe.loader_tokens_per_second:,.0f} tokens/s, {ratio:,.1f} times the probe{bound}")
    return lines


def _loader_rate(config: PretrainConfig, text: RunText, steps: int) -> float:
    batches = Loader(text.packs).batches(range(run_phases(config).packs_before(steps)))
    next(batches)  # starts the thread
    began, rows = time.perf_counter(), 0
    for batch in batches:
        rows += batch.layout.rows
    return rows / (time.perf_counter() - began)


def _train(
    command: DoctorCommand, config: PretrainConfig, steps: int, folder: Path
) -> tuple[list[dict[str, float]], int]:
    """The metrics in the log of a run of ``steps``, and the peak of its resident memory in bytes."""
    config = replace(
        config,
        output=folder / "run",
        steps=steps,
        time_budget=None,
        export=False,
        log=replace(config.log, every=max(1, steps // WINDOWS)),
        validation=replace(config.validation, every=steps),
        checkpoint=replace(config.checkpoint, every=steps),
    )
    file, log = folder / "config.json", folder / "log.txt"
    # the keys of a record: nothing in it was typed, so a setting without effect is left out
    file.write_text(json.dumps(as_dict(config) | {"recipe": command.recipe, "deepspeed": {}, "text": ""}))
    words = [sys.executable, "-m", "megamask", "pretrain", "--config", str(file), "--no-verify"]
    words += ["--deepspeed", str(command.deepspeed)] if command.deepspeed else []
    with open(log, "wb") as output:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=child_environment(),
            preexec_fn=partial(end_with_parent, signal.SIGKILL),
        )  # fmt: skip
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # Ctrl-C: the run must not outlive its folder
            process.kill()
            process.wait()
            raise
    process.returncode = code = os.waitstatus_to_exitcode(status)
    if code:
        last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-12:])
        raise ConfigError(f"The probe ended with code {code}. Its last lines:\n{last}")
    return read_metrics(folder / "run" / "logs" / "metrics.jsonl"), usage.ru_maxrss * 1024
