"""The file ``metrics.jsonl`` of a run: a JSON object with the metrics of a step in each line."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from megamask.storage import atomic_write


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, without one that a kill has cut short."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                lines.append(record)
    return lines


def drop_metrics_after(path: Path, start: int) -> None:
    """Keep the lines up to step ``start``; none if the run starts at step 0."""
    kept = [line for line in read_metrics(path) if start and line["step"] <= start]
    atomic_write.write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
