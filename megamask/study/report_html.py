"""A report as one HTML file: no network, no script, light and dark, from a phone to a wide screen."""

from __future__ import annotations

from html import escape
from importlib import resources

from megamask.study.report_blocks import Block, ChartGrid, Entry, ItemList, LegendEntry, Report, ReportTable, Text


def render_html(report: Report) -> str:
    """The whole page."""
    style = resources.files("megamask.study").joinpath("report.css").read_text()
    links = "".join(f'<li><a href="#{each.anchor}">{escape(each.title)}</a></li>' for each in report.sections)
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in report.facts)
    sections = "\n".join(
        f'<section id="{each.anchor}"><h2>{escape(each.title)}</h2>\n'
        + "\n".join(_block(block) for block in each.blocks)
        + "</section>"
        for each in report.sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(report.title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(report.title)}</h1>
<p class="question">{escape(report.question)}</p>
<ul class="facts">{facts}</ul>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{sections}
</main>
</body>
</html>
"""


def _block(block: Block) -> str:
    match block:
        case Text():
            return f'<p class="{block.tone or "plain"}">{escape(block.text)}</p>'
        case ReportTable():
            return _folded(block.caption, _table(block, not block.folded), block.folded)
        case ItemList():
            return _item_list(block)
        case ChartGrid():
            return _folded(block.caption, _charts(block), block.folded)


def _folded(caption: str, content: str, folded: bool) -> str:
    if not folded:
        return content
    return f"<details><summary>{escape(caption)}</summary>\n{content}\n</details>"


def _table(table: ReportTable, with_caption: bool) -> str:
    caption = f"<caption><span>{escape(table.caption)}</span></caption>" if with_caption else ""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "\n".join(f"<tr>{''.join(_entry(entry, not n) for n, entry in enumerate(row))}</tr>" for row in table.rows)
    label = escape(table.caption)
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>{caption}\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _entry(entry: Entry, is_head: bool) -> str:
    text = escape(entry.text)
    if entry.tone in ("good", "bad", "warning"):
        text = f'<span class="badge {entry.tone}">{text}</span>'
    elif entry.tone == "muted":
        text = f'<span class="muted">{text}</span>'
    text = f"<strong>{text}</strong>" if entry.strong else text
    small = f"<small>{escape(entry.small)}</small>" if entry.small else ""
    return f'<th scope="row">{text}{small}</th>' if is_head else f"<td>{text}{small}</td>"


def _item_list(block: ItemList) -> str:
    if block.code:
        content = f'<pre tabindex="0"><code>{escape(chr(10).join(block.items))}</code></pre>'
    else:
        content = f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in block.items)}</ul>"
    return _folded(block.caption, content, True) if block.folded else f"<h3>{escape(block.caption)}</h3>{content}"


def _charts(grid: ChartGrid) -> str:
    figures = "\n".join(
        f"<figure><figcaption>{escape(chart.title)}</figcaption>{chart.svg}</figure>" for chart in grid.charts
    )
    legend = "".join(_legend_entry(entry) for entry in grid.legend)
    legend = f'<ul class="legend">{legend}</ul>' if legend else ""
    return f'<p class="caption">{escape(grid.caption)}</p>{legend}<div class="charts">{figures}</div>'


def _legend_entry(entry: LegendEntry) -> str:
    dashes = f' stroke-dasharray="{entry.dashes}"' if entry.dashes else ""
    line = (
        '<svg width="28" height="10" aria-hidden="true"><line x1="1" y1="5" x2="27" y2="5" stroke-width="3" '
        f'style="stroke: var(--arm-{entry.color})"{dashes}/></svg>'
    )
    return f"<li>{line} {escape(entry.title)}</li>"
