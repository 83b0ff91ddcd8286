"""A report as Markdown, for repositories: the texts, tables and lists of the HTML page, and its charts in words."""

from __future__ import annotations

from megamask.study.report_blocks import Block, ChartGrid, Entry, ItemList, Report, ReportTable, Text


def render_markdown(report: Report) -> str:
    """The whole document."""
    lines = [f"# {report.title}", "", report.question, "", *(f"- {fact}" for fact in report.facts), ""]
    for section in report.sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            lines += [*_block(block), ""]
    return "\n".join(lines).rstrip() + "\n"


def _block(block: Block) -> list[str]:
    match block:
        case Text():
            return [block.text]
        case ReportTable():
            rows = [[_entry(entry) for entry in row] for row in block.rows]
            head = [_line(block.columns), _line(["---"] * len(block.columns))]
            return [f"**{block.caption}**", "", *head, *(_line(row) for row in rows)]
        case ItemList(code=True):
            return [f"**{block.caption}**", "", "```sh", *block.items, "```"]
        case ItemList():
            return [f"**{block.caption}**", "", *(f"- {item}" for item in block.items)]
        case ChartGrid():
            return [f"**{block.caption}**", "", *(f"- {chart.description}" for chart in block.charts)]


def _entry(entry: Entry) -> str:
    text = f"**{entry.text}**" if entry.strong else entry.text
    return f"{text} ({entry.small})" if entry.small else text


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
