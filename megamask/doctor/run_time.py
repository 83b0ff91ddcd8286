"""How long a planned run takes, and how much disk it needs: arithmetic on FLOPs, rates and sizes, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megamask.config.phases import run_phases, run_tokens
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.time_budget import parse_duration
from megamask.doctor.report_text import LONGEST
from megamask.doctor.settings import MachineConfig


@dataclass(frozen=True)
class RunTime:
    """The rate of a run in tokens per second, padding included, where it comes from, and what follows."""

    rate: float
    source: str
    seconds: float
    jobs: int | None = None
    """Jobs that the run needs at least, one after the other; None without a time limit, or after more than `LONGEST`
    seconds. Each job also starts and saves."""


def predict_time(
    config: PretrainConfig, machine: MachineConfig, devices: int, step_flops: float, probed: float | None = None
) -> RunTime | None:
    """The time of a run, without validation and checkpoints; None if neither a rate nor a peak is known.

    ``step_flops`` are those of a mean step; ``probed`` is the rate of a probe on one device. With a `time_budget`, a
    run takes this time.
    """
    tokens = run_tokens(config)
    peak = machine.peak_flops or config.log.peak_flops
    if machine.tokens_per_second is not None:
        rate, source = machine.tokens_per_second, "as stated (`tokens_per_second`)"
    elif probed is not None:
        each = "" if devices == 1 else f", times {devices} devices, without the time of their communication"
        rate, source = probed * devices, f"of the probe{each}"
    elif peak is not None:
        rate = machine.assumed_mfu * peak * devices / step_flops * tokens / config.steps
        source = (
            f"{machine.assumed_mfu:.0%} of {peak:.3g} FLOP/s on {devices} devices: an assumption "
            "(`assumed_mfu`), not a measurement"
        )
    else:
        return None
    budget = config.time_budget and parse_duration(config.time_budget)
    seconds = budget or (tokens / rate if rate else math.inf)  # a tiny peak gives a rate of 0
    limit = machine.job_time and parse_duration(machine.job_time)
    return RunTime(rate, source, seconds, math.ceil(seconds / limit) if limit and seconds <= LONGEST else None)


def packs_of_a_step(config: PretrainConfig, num_ranks: int) -> str:
    """The packs of a step and the micro-steps of each rank, as words; of phases that differ, the fewest and the most.

    Packs that the ranks cannot share evenly, which is a problem of the plan, give no micro-steps.
    """
    sizes = sorted({phase.per_step for phase in run_phases(config).phases})
    ends = [sizes[0], sizes[-1]] if len(sizes) > 1 else sizes
    line = "packs of a step: " + " to ".join(f"{size:,}" for size in ends)
    if any(size % num_ranks for size in sizes):
        return line
    micro = " to ".join(f"{size // num_ranks:,}" for size in ends)
    return f"{line}; micro-steps of each of {num_ranks:,} rank{'s' * (num_ranks != 1)}: {micro}"


@dataclass(frozen=True)
class DiskUse:
    """Bytes and number of checkpoints, and bytes of the run folder while one more is written, the export included."""

    checkpoint: float
    written: int
    most: float
    start: float
    """Bytes that must be free at the start: three checkpoints with two moments."""


def predict_disk(config: PretrainConfig, weights: int, muon: int) -> DiskUse:
    """The disk that a run needs: fp32 weights, their moving average if there is one, and moments; `checkpoint.keep`
    checkpoints stay, and the next is written before the oldest is deleted. ``muon``: how many of the ``weights`` Muon
    trains, with one moment instead of two."""
    size = 12.0 * weights - 4.0 * muon + (0.0 if config.entropy.ema_decay is None else 4.0 * weights)
    written = math.ceil(config.steps / config.checkpoint.every)
    kept = min(written, config.checkpoint.keep + 1)
    return DiskUse(size, written, kept * size + (4.0 * weights if config.export else 0.0), 3 * 12.0 * weights)


def disk_problems(output: Path, free: int, disk: DiskUse) -> list[str]:
    """A sentence if a run in ``output`` would not start, or fill the disk; checkpoints that are there count as free."""
    own = sum(file.stat().st_size for file in (output / "checkpoints").rglob("*") if file.is_file())
    needed = max(disk.most - own, disk.start)
    if free >= needed:
        return []
    return [
        f"`output` ({output}) needs {needed:,.0f} bytes, for checkpoints and the export ({disk.most:,.0f}) and at the "
        f"start for three checkpoints ({disk.start:,.0f}), but has {free:,} free. Free some space, lower "
        "`checkpoint.keep`, or choose another folder."
    ]
