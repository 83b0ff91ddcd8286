"""Draw with matplotlib and return SVG that follows the colors and the font of the page that contains it.

Text stays text. Every color is a placeholder that becomes a CSS variable, so one picture serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID = "#010101", "#020202", "#030303"
"""Placeholders of the colors of text, of secondary marks and of grid lines."""
COLORS = 12
"""Of arms; a study with more of them uses colors twice, with other line styles."""
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


def arm_color(number: int) -> str:
    """The placeholder of the color of arm ``number``."""
    return f"#0401{number % COLORS:02x}"


def draw_svg(
    name: str,
    description: str,
    size: tuple[float, float],
    draw: Callable[[Axes], None],
    margins: tuple[float, float, float] = (0.62, 0.52, 0.12),
) -> str:
    """The picture that ``draw`` makes on a canvas of ``size`` inches, as an SVG element for HTML.

    ``name`` must be unique on the page: it begins the ids inside the picture. ``margins`` (left, bottom, top) are
    inches for labels; they are given because matplotlib takes as long to find them as to draw.
    """
    import matplotlib
    from matplotlib.figure import Figure  # takes half a second to import

    with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": name}):
        (width, height), (left, bottom, top) = size, margins
        figure = Figure(figsize=size)
        draw(figure.add_axes((left / width, bottom / height, 1 - (left + 0.15) / width, 1 - (bottom + top) / height)))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _embed(buffer.getvalue(), name, description)


def _embed(svg: str, name: str, description: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(r"#0401([0-9a-f]{2})", lambda match: f"var(--arm-{int(match[1], 16)})", svg)
    svg = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    view = re.search(r'viewBox="[^"]+"', svg)
    if view is None:
        raise RuntimeError("matplotlib wrote an SVG without a viewBox")
    head = f'<svg role="img" aria-label="{escape(description)}" {view[0]} xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + svg[svg.index(">") + 1 :].strip()
