"""The parts of `megamask bench-gpu` in their order: what gives most per minute comes first. Without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from megamask.bench.gpu.figures import Figure
from megamask.bench.gpu.settings import GpuBenchConfig, PartName


@dataclass(frozen=True)
class BenchPart:
    """What is measured together, in one process."""

    title: str
    function: str
    """``module:name`` beside this file; takes the settings, and ``argument`` if there is one, and yields figures."""
    least: int
    """Seconds below which it is not started."""
    most: int
    """Seconds after which it is stopped."""
    argument: str = ""
    text: bool = True
    """Whether it reads text."""

    def bounds(self, config: GpuBenchConfig) -> tuple[float, float]:
        """``least`` and ``most``, with the time of the run if it is one."""
        run = config.run_seconds if self.function == "commands:base_run" and config.size == "full" else 0.0
        return self.least + run, self.most + run


PARTS: dict[PartName, BenchPart] = {
    "ceilings": BenchPart("Ceilings of the device", "kernels:ceilings", 15, 120, text=False),
    "tests": BenchPart("Tests that need a GPU", "commands:gpu_tests", 30, 300, text=False),
    "attention": BenchPart("Attention without padding", "kernels:attention_backends", 20, 180, text=False),
    "statistics": BenchPart("Statistics of predictions", "kernels:prediction_statistics", 20, 180, text=False),
    "steps-base": BenchPart("A training step, base", "steps:training_steps", 40, 360, "base"),
    "steps-large": BenchPart("A training step, large", "steps:training_steps", 40, 420, "large"),
    "entropy-base": BenchPart("Entropy sources and a teacher, base", "compared:entropy_sources", 60, 420, "base"),
    "trainer": BenchPart("Beside the Hugging Face Trainer, base", "compared:beside_trainer", 60, 420),
    "late-base": BenchPart("[MASK] at a later layer, base", "compared:late_masks", 60, 480),
    "zero": BenchPart("ZeRO 0 to 3 on one device, base", "steps:zero_stages", 40, 420),
    "entropy-large": BenchPart("Entropy sources and a teacher, large", "compared:entropy_sources", 90, 600, "large"),
    "steps-xl": BenchPart("A training step, xl", "steps:training_steps", 60, 600, "xl"),
    "run-base": BenchPart("A run, base", "commands:base_run", 120, 600),
}
"""By name."""


def figures_of(name: PartName, config: GpuBenchConfig) -> Iterator[Figure]:
    """Measure the part ``name``: its figures, as they come."""
    part = PARTS[name]
    module, _, function = part.function.partition(":")
    measure: Callable[..., Iterator[Figure]] = getattr(import_module(f"megamask.bench.gpu.{module}"), function)
    return (partial(measure, config, part.argument) if part.argument else partial(measure, config))()


def error_text(error: BaseException) -> str:
    """One line for an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
