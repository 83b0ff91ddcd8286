"""The ranks of one or more encoders as Markdown tables and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamask.analysis.deficiency import MATRICES, Analysis, Cuts, LayerRanks, RankFigure
from megamask.analysis.effective_rank import Way

COLOURS = {"clean": "tab:blue", "masked": "tab:purple", "real": "tab:green", "mask": "tab:red", "under": "tab:grey"}
LINES: tuple[Any, ...] = ("-", "--", ":", "-.")
MARKS = "osv^D"


def titles(cuts: Cuts) -> dict[Way, str]:
    """The title of each way of counting."""
    return {
        "effective": "effective rank",
        "energy": f"energy rank ({cuts.energy:.0%} of the squared norm)",
        "numerical": f"numerical rank (above {cuts.threshold:g} of the largest singular value)",
    }


def tables(name: str, layers: list[LayerRanks], cuts: Cuts, centred: bool) -> list[str]:
    """Markdown tables with the ranks of each matrix by layer, and the shares outside the span.

    A cell contains the figure of all rows +- its standard error (the figure of half the rows).
    """
    how = "minus their mean" if centred else "as they are"
    lines = []
    for way, title in titles(cuts).items():
        heads = [head for head in MATRICES if head in layers[-1].ranks]
        cells = [[_cell(layer.ranks[head][way], 1) for head in heads] for layer in layers]
        lines += [f"**{name}: {title}, states {how}**", "", *_markdown(heads, cells), ""]
    columns = [(head, kind) for kind in ("norm", "directions") for head in layers[-1].outside]
    for way in ("energy", "numerical") if columns else ():
        heads = [f"{head}: {kind}" for head, kind in columns]
        cells = [[_cell(layer.outside[head][way][kind], 3) for head, kind in columns] for layer in layers]
        title = f"share outside the real tokens' span, by the {way} rank"
        lines += [f"**{name}: {title}, states {how}**", "", *_markdown(heads, cells), ""]
    return lines


def _cell(figure: RankFigure, digits: int) -> str:
    return f"{figure.all:.{digits}f} ± {figure.error:.{digits}f} ({figure.half:.{digits}f})"


def _markdown(heads: list[str], cells: list[list[str]]) -> list[str]:
    rows = [["layer", *heads], ["---:"] * (len(heads) + 1)]
    rows += [[str(number), *row] for number, row in enumerate(cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["| " + " | ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]


def picture(analyses: Mapping[str, Analysis], cuts: Cuts, path: Path) -> None:
    """Plot ranks and shares by layer to ``path``, with a color for each matrix and a line style for each encoder.

    The upper row shows the states as they are, the lower row the states minus their mean.
    """
    from matplotlib.figure import Figure as Canvas  # takes half a second to import
    from matplotlib.lines import Line2D

    canvas = Canvas(figsize=(15, 9), layout="constrained")
    axes = canvas.subplots(2, 3)
    for row, centred in zip(axes, (False, True), strict=True):
        for number, (name, analysis) in enumerate(analyses.items()):
            layers = analysis.centred if centred else analysis.plain
            style = {"linestyle": LINES[number % len(LINES)], "marker": MARKS[number % len(MARKS)], "markersize": 4}
            for head in reversed(layers[-1].ranks):  # the control first, so that it covers no other line
                for ax, way in ((row[0], "effective"), (row[1], "energy")):
                    _line(ax, [layer.ranks[head][way] for layer in layers], color=COLOURS[head], label=name, **style)
            for head in layers[-1].outside:
                shares = [layer.outside[head]["energy"]["norm"] for layer in layers]
                _line(row[2], shares, color=COLOURS[head], label=name, **style)
        how = "states minus mean" if centred else "states as they are"
        row[0].set(title=f"effective rank, {how}", ylabel="dimensions", ylim=(0, None))
        row[1].set(title=f"dimensions with {cuts.energy:.0%} of the\nsquared norm, {how}", ylim=(0, None))
        row[2].set(title=f"squared norm outside the real tokens'\n{cuts.energy:.0%} span, {how}", ylim=(0, None))
        row[2].axhline(1 - cuts.energy, color="black", linewidth=0.8, linestyle=":")
        for ax in row:
            ax.set_xlabel("layer (0: embedding)")
            ax.grid(alpha=0.3)
    used = [head for head in MATRICES if any(head in analysis.plain[-1].ranks for analysis in analyses.values())]
    keys = [Line2D([], [], color=COLOURS[head], label=MATRICES[head]) for head in used]
    keys += [
        Line2D([], [], color="black", linestyle=LINES[n % len(LINES)], marker=MARKS[n % len(MARKS)], label=name)
        for n, name in enumerate(analyses)
    ]
    canvas.legend(handles=keys, loc="outside lower center", ncols=min(4, len(keys)))
    canvas.savefig(path, dpi=110)


def _line(ax, figures: list[RankFigure], **style) -> None:
    ax.errorbar(range(len(figures)), [f.all for f in figures], yerr=[f.error for f in figures], capsize=2, **style)
