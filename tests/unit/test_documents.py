"""Links between documents lead to a file and a heading; the list of packages for a machine without network is whole."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The names by which GitHub links to the headings of ``document``: lowercase, hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", document.read_text()))
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document) == []


def test_broken_links_are_detected(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One, *two* `3`\n[x](#one-two-3) [x](b.md#four) [x](b.md) [x](c.md)\n")
    (tmp_path / "b.md").write_text("## Five\n```sh\n# four\n```\n")
    assert broken_links(tmp_path / "a.md") == ["b.md#four", "c.md"]


def test_the_wheels_for_a_machine_without_network_are_all_that_it_lacks() -> None:
    section = (ROOT / "docs" / "gpu.md").read_text().partition("## A machine without network")[2].partition("\n## ")[0]
    there = re.findall(r"[\w-]+", section.partition("that has ")[2].partition(":")[0].replace(" and ", " "))
    copied = set(re.findall(r"[\w-]+", section.partition("```sh")[2].partition("tar czf")[0]))
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    unused = {"datasets", "pyarrow", "pytorch-optimizer"}
    assert {"torch", "pytest"} <= set(there) and all(f"`{name}`" in section for name in unused)
    # DeepSpeed builds operators with these, and only for offloads
    needed = _required([*map(_name, ours), "hypothesis", "beartype"], unused | {"ninja", "py-cpuinfo"})
    assert needed - _required(there, set()) - copied == set()


def _name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def _required(names: Iterable[str], without: set[str]) -> set[str]:
    """``names`` and what they need here, without some and what only those need."""
    found: set[str] = set()
    waiting = [*names]
    while waiting:
        name = _name(waiting.pop())
        if name in found | without:
            continue
        try:
            requirements = requires(name) or []
        except PackageNotFoundError:  # of another platform
            continue
        found.add(name)
        waiting += [each for each in requirements if "extra ==" not in each]
    return found
