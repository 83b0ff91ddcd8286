"""The figures of one machine beside the goals, as one HTML file without scripts or network. Without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from megamask.bench.gpu.figures import END, Figure, FigureFile, Record, read_figures
from megamask.bench.gpu.goals import JudgedGoal, judge_goals
from megamask.bench.gpu.parts import PARTS
from megamask.errors import StorageError
from megamask.storage.atomic_write import write_atomic

PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #4a84d866; --good: #1a7f37; --bad: #c4302b; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 2rem; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.value { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.bar { width: 22%; } td.bar div { background: var(--bar); height: 1em; }
td.setting { color: #888; font-size: .85em; overflow-wrap: anywhere; }
.reached { color: var(--good); } .missed, .error { color: var(--bad); }
"""


def write_page(path: Path, file: FigureFile) -> None:
    """Write the page of the machine and size of ``file``. Raises StorageError."""
    latest = list(file.latest().values())
    bad = read_figures(file.path)[1]
    try:
        write_atomic(path, render_page(latest, bad))
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}.") from None


def render_page(records: list[Record], bad: int = 0) -> str:
    """The whole page; ``bad`` lines of the file could not be read."""
    on_gpu = any(one.machine.get("gpu") and one.sizes.get("size") == "full" for one in records)
    facts = [f"Lines that cannot be read: {bad}"] if bad else []
    if records:
        facts = [*_machine_facts(records[-1]), *facts]
    if not on_gpu:
        facts.append("These figures are not of a GPU at full size: they show only that every part runs.")
    sections = "\n".join(_part(name, [one for one in records if one.part == name]) for name in PARTS)
    title = f"megamask on {records[-1].device}" if records else "megamask on a GPU"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><h1>{escape(title)}</h1>
<ul>{"".join(f"<li>{escape(fact)}</li>" for fact in facts)}</ul>
<h2>Goals</h2>
{_goals(judge_goals(records, on_gpu=on_gpu))}
{sections}
</body></html>
"""


def value_text(figure: Figure) -> str:
    """The value in the unit that a reader expects, or the error."""
    value, unit = figure.value, figure.unit
    if value is None:
        return figure.error
    if unit == "share":
        return f"{value:.1%}"
    if unit == "s":
        scale, name = next((each for each in SECONDS if value >= each[0]), SECONDS[-1])
        return f"{value / scale:.4g} {name}"
    if unit in ("FLOP/s", "B/s", "B"):
        scale, prefix = next((each for each in PREFIXES if value >= each[0]), (1.0, ""))
        return f"{value / scale:.4g} {prefix}{unit}"
    text = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
    return f"{text} {unit}"


def _machine_facts(record: Record) -> list[str]:
    machine = record.machine
    versions: Mapping[str, Any] = machine.get("versions", {})
    memory = f", {value_text(Figure('', machine['gpu_memory'], 'B'))}" if machine.get("gpu_memory") else ""
    return [
        f"Device: {record.device}{memory}; host: {machine.get('cpu')}, {machine.get('cores')} cores",
        f"Versions: Python {machine.get('python')}, " + ", ".join(f"{name} {each}" for name, each in versions.items()),
        f"Commit: {machine.get('commit') or 'not known'}; last figure: {record.time}",
        "Sizes: " + ", ".join(f"{name} {each or 'of this machine'}" for name, each in record.sizes.items()),
    ]


def _goals(goals: Iterable[JudgedGoal]) -> str:
    rows = "".join(
        f"<tr><td>{escape(one.goal.title)}</td>"
        f'<td class="value">{one.goal.kind} {escape(value_text(Figure("", one.goal.bound, one.goal.unit)))}</td>'
        f'<td class="value">{escape(value_text(Figure("", one.value, one.goal.unit)))}</td>'
        f'<td class="{one.verdict.split()[0]}">{one.verdict}</td><td class="setting">{escape(one.figure)}</td></tr>'
        for one in goals
    )
    head = "".join(f"<th>{name}</th>" for name in ("goal", "bound", "measured", "verdict", "figure"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _part(name: str, records: list[Record]) -> str:
    ends = [one.figure for one in records if one.figure.name == END]
    figures = [one.figure for one in records if one.figure.name != END]
    state = "not measured" if not records else "cut off" if not ends else ends[-1].error or value_text(ends[-1])
    title = next(part.title for known, part in PARTS.items() if known == name)
    head = f"<h2>{escape(title)} <small>({name}, {escape(state)})</small></h2>"
    if not figures:
        return head
    largest: dict[str, float] = {}
    for figure in figures:
        if figure.value is not None:
            largest[figure.unit] = max(largest.get(figure.unit, 0.0), figure.value)
    return f"{head}<table><tbody>{''.join(_row(figure, largest) for figure in figures)}</tbody></table>"


def _row(figure: Figure, largest: Mapping[str, float]) -> str:
    most = largest.get(figure.unit, 0.0)
    width = 100 * max(0.0, figure.value) / most if figure.value is not None and most > 0 else 0.0
    setting = ", ".join(
        f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in figure.setting.items()
    )
    kind = "error" if figure.failed else "value"
    return (
        f'<tr><td>{escape(figure.name)}</td><td class="{kind}">{escape(value_text(figure))}</td>'
        f'<td class="bar"><div style="width:{width:.1f}%"></div></td><td class="setting">{escape(setting)}</td></tr>'
    )
