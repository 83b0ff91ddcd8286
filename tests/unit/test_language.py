"""Plain English and standard names in sources, tests and documents: constructions and variables that are refused."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CODE = [*sorted((ROOT / "megamask").rglob("*.py")), *sorted((ROOT / "tools").rglob("*.py"))]
TEXTS = [
    *CODE,
    *(path for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__)),
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "slurm").glob("*.sh")),
    ROOT / "Makefile",
]
REFUSED = {
    r"(?<!there )(is|are|was|were) no (?!longer\b|more\b)": "is not a",
    r"what is no\b": "a value that is not",
    r"anew\b": "again",
    r"afresh\b": "again, from the beginning",
    r"foret(ell|old)": "predict",
    r"shall\b": "must, will",
    r"told of\b": "reported",
    r"dearer\b": "more expensive",
    r"whoever\b": "a user who",
    r"for want of\b": "because there is no",
    r"held against\b": "compared with",
    r"no numbers?\b": "NaN or Inf, not finite",
    r"not an? number\b": "NaN",
    r"\d+\. time\b": "an ordinal as a cardinal: rewind 1 of 3",
    r"passed over\b": "skipped",
    r"set aside\b": "moved to, skipped",
    r"(be|was|were|is|are) had\b": "is available",
    r"come to\b": "reach",
    r"says? of\b": "says about, predicts",
    r"to the bit\b": "bit for bit",
    r"in the midst\b": "in the middle of, during",
    r"goe?s? before\b": "overrides",
    r"the moment it is\b": "as soon as",
    r"(is|was|were|are) not at hand\b": "is not available",
    r"(the|a|this|that) (house|door|floor)s?\b": "package, module, layer, boundary",
}
"""A construction, and what to write instead."""
VAGUE = ("found", "said", "told", "asked", "held", "mine")
"""Variables that do not say what their value is; fewer than 10 assignments of each, tests included."""


def names_of_tests() -> set[str]:
    return {
        node.name
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("construction", REFUSED)
def test_construction_does_not_occur(construction: str) -> None:
    pattern = re.compile(rf"(?<![\w`]){construction}", re.IGNORECASE)
    places = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in TEXTS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    places += [name for name in sorted(names_of_tests()) if pattern.search(name.replace("_", " "))]
    assert not places, f"write instead: {REFUSED[construction]}"


def test_variables_say_what_their_value_is() -> None:
    assigned = Counter(
        node.id
        for path in [*CODE, *sorted((ROOT / "tests").rglob("*.py"))]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )
    assert {name: assigned[name] for name in VAGUE if assigned[name] >= 10} == {}


def test_a_test_name_is_short() -> None:
    assert [name for name in sorted(names_of_tests()) if len(name) > 80] == []
