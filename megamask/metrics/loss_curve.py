"""The picture of the losses of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megamask.metrics.metrics_file import read_metrics

CURVES = 10
"""Sources of a mixture in the picture of the losses."""


def plot_curve(metrics: Path, picture: Path) -> None:
    """Draw training and validation loss against steps, with the unigram baseline, from a ``metrics.jsonl``.

    Of a mixture also the validation loss of each source, at most of the `CURVES` with the highest.
    """
    from matplotlib.figure import Figure  # takes half a second, and only the end of a run needs it

    lines = read_metrics(metrics)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, label, style in (
        ("train/loss", "training", {"linewidth": 1.0, "alpha": 0.6}),
        ("valid/loss", "validation", {"marker": "o", "markersize": 3.5}),
        ("valid/unigram_loss", "unigram guess", {"linestyle": "--", "color": "grey"}),
    ):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    for name in _sources(lines):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        axes.plot(*zip(*points, strict=True), label=name.split("/", 1)[1].rpartition("/")[0], linewidth=0.8)
    axes.set(title="Masked-language-model loss", xlabel="step", ylabel="loss (nats per masked token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture, dpi=150)


def _sources(lines: list[dict[str, Any]]) -> list[str]:
    """The metrics with the validation loss of each source of a mixture: at most `CURVES`, those with the highest."""
    last: dict[str, float] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("valid/") and name.endswith("/loss") and name.count("/") > 1 and value is not None:
                last[name] = value
    return sorted(sorted(last, key=last.__getitem__, reverse=True)[:CURVES])
