"""Tests of the three files: the same numbers, valid HTML that needs nothing else, a sentence for what is missing."""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megamask.study.charts import arm_legend
from megamask.study.comparison import compare_arms
from megamask.study.report import build_report, render_csv, write_report
from megamask.study.report_blocks import ReportTable
from megamask.study.report_html import render_html
from megamask.study.report_markdown import render_markdown
from megamask.study.report_provenance import provenance_section
from megamask.study.results import StudyResults
from tests.unit.study.simulated import ARMS, simulate_study

HEADINGS = [
    "Verdict",
    "Budgets",
    "Scores",
    "Paired differences",
    "Curves",
    "Mask audit",
    "Ablations",
    "Sensitivity",
    "References",
    "Comparability",
    "Provenance",
]
EMPTY = {"img", "meta", "link", "br", "hr", "line", "path", "use", "rect"}


class Page(HTMLParser):
    """What a browser reads: tags that balance, ids, headings, and the tables as texts of cells."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.captions: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link"):
            self.open.append(tag)
        match tag:
            case "table":
                self.tables.append([])
                self.captions.append("")
            case "tr":
                self.tables[-1].append([])
            case "td" | "th":
                self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            small = "small" in self.open
            self.tables[-1][-1][-1] += f" ({data})" if small else data
        elif "caption" in self.open:
            self.captions[-1] += data
        elif self.open and self.open[-1] == "h2":
            self.headings.append(data)

    def ids(self) -> Counter[str | None]:
        return Counter(attributes["id"] for _, attributes in self.tags if "id" in attributes)


@pytest.fixture(scope="module")
def results() -> StudyResults:
    """One arm of each role."""
    arms = tuple(arm for arm in ARMS if arm.name in ("random", "kd", "adaptive", "random-again", "random-half"))
    return simulate_study(
        tasks=("sst2", "blimp"), examples=60, seeds=3, arms=arms, effects={"kd": 0.2}, budgets=("tokens=1500000",)
    )


@pytest.fixture(scope="module")
def files(results: StudyResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(results, folder)
    return folder


@pytest.fixture(scope="module")
def page(files: Path) -> Page:
    return Page((files / "report.html").read_text())


def markdown_tables(source: str) -> list[list[list[str]]]:
    """Tables as texts of cells, without the line below the head."""
    groups = re.findall(r"(?:^\|.*\|\n)+", source, re.MULTILINE)
    split = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in group.splitlines()] for group in groups]
    return [[[cell.strip().replace("**", "") for cell in row] for row in (rows[0], *rows[2:])] for rows in split]


def test_sections_are_in_order(page: Page, files: Path) -> None:
    assert page.headings == HEADINGS
    assert re.findall(r"^## (.+)$", (files / "report.md").read_text(), re.MULTILINE) == HEADINGS


def test_html_and_markdown_have_the_same_tables(page: Page, files: Path) -> None:
    tables = markdown_tables((files / "report.md").read_text())
    assert len(tables) == len(page.tables) > 10
    assert tables == page.tables


def test_tables_have_the_numbers_of_the_csv(page: Page, files: Path) -> None:
    rows = list(csv.DictReader((files / "results.csv").read_text().splitlines()))
    budgets = {"tokens=1500000": "1,500,000 tokens"}
    titles = {"blimp": "BLiMP", "mean": "Mean of tasks", "loss": "Masked loss", "sst2": "SST-2", "subj": "SUBJ"}
    scores = {c.split(";")[0]: t for c, t in zip(page.captions, page.tables, strict=True) if c.startswith("Scores at")}
    verdicts = {c: t for c, t in zip(page.captions, page.tables, strict=True) if c.startswith("Difference from")}
    compared = 0
    for row in rows:
        if row["variant"] not in ("original", "mean", "") or row["mode"] == "fine_tuned":
            continue
        digits = 3 if row["measure"] == "loss" else 1
        half = (float(row["high"]) - float(row["low"])) / 2
        table = scores[f"Scores at {budgets[row['budget']]}"]
        line = next(line for line in table if line[0].startswith(row["title"] + " ("))
        shown = line[table[0].index(titles[row["measure"]])]
        assert shown.startswith(
            f"{float(row['mean']):.{digits}f} ± {half:.{digits}f} (median {float(row['median']):.{digits}f}"
        )
        compared += 1
        if row["role"] in ("method", "control") and row["measure"] in ("blimp", "mean", "loss"):
            digits = 3 if row["measure"] == "loss" else 2
            name = next(c for c in verdicts if budgets[row["budget"]] in c)
            line = next(line for line in verdicts[name] if line[0].startswith(row["title"] + " ("))
            ends = f"[{float(row['difference_low']):+.{digits}f}, {float(row['difference_high']):+.{digits}f}]"
            expected = f"{row['verdict']} ({float(row['difference']):+.{digits}f} {ends}, {row['paired_seeds']} seeds)"
            assert line[verdicts[name][0].index(titles[row["measure"]])] == expected
            compared += 1
    assert compared > 20


def test_page_needs_nothing_else(page: Page, files: Path) -> None:
    source = (files / "report.html").read_text()
    assert len(source) < 3_000_000
    assert not {"script", "iframe", "img", "link", "object"} & {tag for tag, _ in page.tags}
    links = [
        value for _, attributes in page.tags for name, value in attributes.items() if name.endswith(("href", "src"))
    ]
    assert links and all(value and value.startswith("#") for value in links)
    assert "url(http" not in source and "@import" not in source
    assert "prefers-color-scheme: dark" in source and "width=device-width" in source


def test_ids_are_unique_and_references_exist(page: Page) -> None:
    assert max(page.ids().values()) == 1
    used = [v for _, attributes in page.tags for name, v in attributes.items() if name.endswith("href") and v]
    assert {value[1:] for value in used} <= set(page.ids())


def test_page_is_accessible(page: Page) -> None:
    charts = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("aria-hidden") != "true"]
    assert len(charts) > 10
    assert all(chart["role"] == "img" and len(chart["aria-label"] or "") > 40 for chart in charts)
    regions = [attributes for _, attributes in page.tags if attributes.get("role") == "region"]
    assert len(regions) == len(page.tables) and all(region["aria-label"] for region in regions)
    assert {a.get("scope") for tag, a in page.tags if tag == "th"} == {"col", "row"}
    assert ("html", {"lang": "en"}) in page.tags


def test_pictures_follow_the_colors_of_the_page(files: Path) -> None:
    source = (files / "report.html").read_text()
    body = source[source.index("<body>") :]
    pictures = "".join(re.findall(r"<svg.*?</svg>", body, re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", pictures)
    defined = set(re.findall(r"(--[a-z]+(?:-\w+)?):", source))
    assert set(re.findall(r"var\((--[^)]+)\)", source)) <= defined


def test_the_report_of_a_study_without_results(results: StudyResults) -> None:
    empty = compare_arms(replace(results, runs=(), cells={}, references=()))
    text = render_markdown(build_report(empty))
    assert "The study has no results to compare yet." in text
    assert "No pretraining run has been recorded." in text
    assert "No reference was computed" in text
    assert text.count("not run") == 4 * 3  # arms with planned seeds x seeds
    assert render_csv(empty).count("\n") == 1
    Page(render_html(build_report(empty)))


def test_each_machine_is_named_with_its_runs(results: StudyResults) -> None:
    first, *others = results.runs
    moved = replace(first, provenance={**first.provenance, "machine: processor": "another"})
    table = provenance_section(compare_arms(replace(results, runs=(moved, *others)), draws=10)).blocks[2]
    assert isinstance(table, ReportTable)
    values = {name.text: value.text for name, value in table.rows}
    count = len(results.runs)
    assert f"another (in 1 of {count} runs)" in values["machine: processor"]
    assert f"simulated (in {count - 1} of {count} runs)" in values["machine: processor"]
    assert values["version of megamask"] == first.provenance["version of megamask"]


def test_legends_name_the_arms_that_have_runs(results: StudyResults) -> None:
    assert [entry.title for entry in arm_legend(results)] == [arm.title for arm in results.arms]
    first, *others = results.arms
    begun = replace(results, runs=tuple(run for run in results.runs if run.arm != first.name))
    assert [entry.title for entry in arm_legend(begun)] == [arm.title for arm in others]


def test_names_cannot_change_the_page(results: StudyResults) -> None:
    arms = (results.arms[0], replace(results.arms[1], title='<script>alert("a | b")</script>'))
    report = build_report(compare_arms(replace(results, arms=arms, question="a < b & c")))
    page = Page(render_html(report))
    assert "script" not in {tag for tag, _ in page.tags}
    assert markdown_tables(render_markdown(report))[0][1][0].startswith('<script>alert("a \\| b")')
