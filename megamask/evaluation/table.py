"""The table of results: a row for each model and method, a column for each task, and what a reader must know."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from megamask.evaluation.outcome import Cell
from megamask.evaluation.tasks import TASKS

_Row = tuple[str, str]
"""The model; the mode and the variant."""
COLLAPSED, FAILED = "†", "‡"


def results_table(cells: Sequence[Cell]) -> str:
    """Markdown: scores in percent, mean ± standard deviation over seeds; then the notes."""
    tasks = [name for name in TASKS if any(cell.key.task == name for cell in cells)]
    rows: dict[_Row, dict[str, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in sorted(cells, key=_order):
        rows[_row(cell)][cell.key.task].append(cell)
    lines = [
        "| model | mode | " + " | ".join(TASKS[name].title for name in tasks) + " |",
        "|---|---|" + "---:|" * len(tasks),
    ]
    for (model, mode), by_task in rows.items():
        lines.append(f"| {model} | {mode} | " + " | ".join(_entry(by_task.get(name, [])) for name in tasks) + " |")
    metrics = ", ".join(f"{TASKS[name].title} {' and '.join(TASKS[name].metrics)}" for name in tasks).replace("_", " ")
    return (
        "\n".join([*lines, "", f"Scores in percent, the mean of a task's metrics: {metrics}.", *_notes(cells)]) + "\n"
    )


def comparability_note(cells: Sequence[Cell]) -> str:
    """With what the scores of tasks from JSON lines can be compared; empty if there are none."""
    local = {cell.key.task: cell for cell in cells if cell.layout == "json_lines" and cell.state != "failed"}
    if not local:
        return ""
    sizes = ", ".join(
        f"{TASKS[name].title} {int(cell.metrics.get('train_examples', 0)):,} / {len(cell.predictions):,}"
        for name, cell in sorted(local.items(), key=lambda item: list(TASKS).index(item[0]))
    )
    return (
        "The tasks were read from local JSON lines, whose splits are not those of GLUE or of the authors: compare "
        f"these scores with each other, not with published ones. Examples for training / reported: {sizes}."
    )


def _notes(cells: Sequence[Cell]) -> list[str]:
    notes = [comparability_note(cells)]
    collapsed = [cell for cell in cells if cell.state == "collapsed"]
    failed = [cell for cell in cells if cell.state == "failed"]
    if collapsed:
        notes.append(f"{COLLAPSED} {len(collapsed)} of {len(cells)} cells collapsed; their scores are in the means:")
        notes.append("\n".join(f"- {_name(cell)}: {cell.reason}" for cell in collapsed))
    if failed:
        notes.append(f"{FAILED} {len(failed)} of {len(cells)} cells failed; the same command tries them again:")
        notes.append("\n".join(f"- {_name(cell)}: {cell.reason}" for cell in failed))
    overlaps = {cell.key.task: cell.metrics.get("test_examples_in_train", 0) for cell in cells if cell.metrics}
    shared = ", ".join(f"{TASKS[name].title} {int(count)}" for name, count in sorted(overlaps.items()) if count)
    if shared:
        notes.append(f"Reported examples that are in train too, ignoring case and punctuation: {shared}.")
    return [line for note in notes if note for line in ("", note)]


def _entry(cells: Sequence[Cell]) -> str:
    scores = [100 * cell.score for cell in cells if cell.score is not None]
    if not cells:
        return ""
    marks = [COLLAPSED * any(cell.state == "collapsed" for cell in cells), FAILED * (len(scores) < len(cells))]
    if not scores:
        return FAILED
    spread = f" ± {np.std(scores, ddof=1):.1f} ({len(scores)})" if len(scores) > 1 else ""
    return f"{np.mean(scores):.1f}{spread}{''.join(marks)}"


def _row(cell: Cell) -> _Row:
    key = cell.key
    if key.mode == "reference":
        return ("" if key.model == "reference" else key.model), f"reference: {key.variant}".replace("_", " ")
    return key.model, " ".join(filter(None, (key.mode, key.variant))).replace("_", " ")


def _order(cell: Cell) -> tuple[bool, str, str, str, int]:
    key = cell.key
    return key.mode == "reference", key.model, key.mode, key.variant, key.seed


def _name(cell: Cell) -> str:
    model, mode = _row(cell)
    seed = f", seed {cell.key.seed}" if cell.key.seed else ""
    return ", ".join(filter(None, (model, mode, TASKS[cell.key.task].title))) + seed
