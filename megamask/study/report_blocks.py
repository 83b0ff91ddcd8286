"""What a report consists of: sections of texts, tables, charts and lists, which HTML and Markdown render alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tone = Literal["", "good", "bad", "muted", "warning"]


@dataclass(frozen=True)
class Entry:
    """A cell of a table."""

    text: str
    small: str = ""
    """A second line in small print."""
    strong: bool = False
    tone: Tone = ""
    """good, bad and warning are shown as a badge, so they never depend on color alone."""


@dataclass(frozen=True)
class ReportTable:
    """A table whose first column names the rows."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    folded: bool = False
    """Whether HTML shows it only on request."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class ItemList:
    """A list of short texts."""

    caption: str
    items: tuple[str, ...]
    folded: bool = False
    code: bool = False
    """Whether they are commands."""


@dataclass(frozen=True)
class Chart:
    """A picture with what it shows in words."""

    title: str
    svg: str
    description: str


@dataclass(frozen=True)
class LegendEntry:
    """The color and line style of an arm; ``color`` is its number in the palette."""

    title: str
    color: int
    dashes: str
    """As in the SVG attribute stroke-dasharray; empty for a solid line."""


@dataclass(frozen=True)
class ChartGrid:
    """Charts side by side with one caption and legend."""

    caption: str
    charts: tuple[Chart, ...]
    legend: tuple[LegendEntry, ...] = ()
    folded: bool = False


Block = Text | ReportTable | ItemList | ChartGrid


@dataclass(frozen=True)
class Section:
    """A part of the report with a heading."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Report:
    """A whole report."""

    title: str
    question: str
    facts: tuple[str, ...]
    """One line each: how many arms, seeds, runs."""
    sections: tuple[Section, ...]
