"""Small files of benchmark tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LINES = [
    *({"split": "train", "sentence": f"a good film {i}", "label": 1} for i in range(12)),
    *({"split": "train", "sentence": f"a bad film {i}", "label": 0} for i in range(8)),
    *({"split": "dev", "sentence": f"so {word}, film {i}", "label": int(word == "good")}
      for i in range(10) for word in ("good", "bad")),
]  # fmt: skip
"""Of SST-2."""


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_table(path: Path, *rows: str) -> Path:
    """A file of GLUE; `|` stands for a tab."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(row.replace("|", "\t") + "\n" for row in rows).encode())
    return path
