"""The file of figures: a JSON line for each, appended and synced as soon as it is measured. Without torch.

A line has the part, the name, the value (null without one), its unit, the setting it holds for, an error if there is
no value, the seconds since its part began, the time, the machine with its versions, and the sizes of the measurement.
The last line of a part has the name `END` and the seconds of the part.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamask.bench.gpu.settings import GpuBenchConfig
from megamask.storage.strict_json import BadRecord, parse_json

END = "part"
NEEDS_CUDA = "needs CUDA"
"""The error of a figure that only a GPU has; its part counts as finished."""


@dataclass(frozen=True)
class Figure:
    """A measured value, or why there is none. In a part every name occurs once."""

    name: str
    value: float | None = None
    unit: str = ""
    setting: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def failed(self) -> bool:
        """Whether a second attempt may give a value."""
        return bool(self.error) and self.error != NEEDS_CUDA


@dataclass(frozen=True)
class Record:
    """A line of the file."""

    part: str
    figure: Figure
    device: str
    sizes: Mapping[str, Any]
    time: str
    machine: Mapping[str, Any]


class FigureFile:
    """The figures of one machine at one size, in a file that may have those of others."""

    def __init__(self, path: Path, machine: Mapping[str, Any], config: GpuBenchConfig):
        self.path, self._machine, self._sizes = path, machine, sizes_of(config)

    def add(self, part: str, figure: Figure, seconds: float) -> None:
        """Append a line, on disk when this returns."""
        if figure.value is not None and not math.isfinite(figure.value):
            figure = Figure(figure.name, None, figure.unit, figure.setting, f"the value is {figure.value}")
        line = {
            "part": part,
            "name": figure.name,
            "value": figure.value,
            "unit": figure.unit,
            "setting": dict(figure.setting),
            "error": figure.error,
            "seconds": round(seconds, 3),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": dict(self._machine),
            "sizes": self._sizes,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            torn = b""
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                torn = b"" if file.read(1) == b"\n" else b"\n"
            file.write(torn + json.dumps(line, default=str, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[Record]:
        """The lines of this machine at this size, in the order in which they were written."""
        device = device_name(self._machine)
        return [one for one in read_figures(self.path)[0] if one.device == device and one.sizes == self._sizes]

    def latest(self) -> dict[tuple[str, str], Record]:
        """The last line of each figure by part and name; without failures before the part was finished."""
        return latest_figures(self.records())

    def finished(self) -> set[str]:
        """The parts whose last attempt gave every figure."""
        return {part for (part, name), one in self.latest().items() if name == END and not one.figure.error}


def latest_figures(records: Iterable[Record]) -> dict[tuple[str, str], Record]:
    """As `FigureFile.latest`, from the lines of one machine."""
    latest: dict[tuple[str, str], Record] = {}
    for one in records:
        if one.figure.name == END and not one.figure.error:
            latest = {key: each for key, each in latest.items() if key[0] != one.part or not each.figure.failed}
        latest[one.part, one.figure.name] = one
    return latest


def sizes_of(config: GpuBenchConfig) -> dict[str, Any]:
    """What two measurements must share for one to stand for the other."""
    return {"size": config.size, "data": str(config.data or ""), "run_time": config.run_time}


def device_name(machine: Mapping[str, Any]) -> str:
    """The GPU, or the CPU where there is none."""
    return str(machine.get("gpu") or machine.get("cpu"))


def read_figures(path: Path) -> tuple[list[Record], int]:
    """The lines of a file, and how many cannot be read, such as one during which the machine stopped."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    records, bad = [], 0
    for line in lines:
        try:
            records.append(_record(parse_json(line)))
        except (BadRecord, KeyError, TypeError, AttributeError):
            bad += 1
    return records, bad


def _record(line: dict[str, Any]) -> Record:
    figure = Figure(line["name"], line["value"], line["unit"], line["setting"], line["error"])
    return Record(line["part"], figure, device_name(line["machine"]), line["sizes"], line["time"], line["machine"])


def end_of_part(figures: Sequence[Figure], seconds: float) -> Figure:
    """The last line of a part with ``figures``."""
    failures = [figure.name for figure in figures if figure.failed]
    return Figure(END, seconds, "s", error=f"failed: {', '.join(failures)}" if failures else "")
