"""The library transformers is imported only when it is used."""

from __future__ import annotations

import ast
from pathlib import Path

import transformers

from megamask.hf import exporting

assert transformers  # the import that the test must find in this file


def test_no_module_imports_transformers_at_the_top() -> None:
    """Importing transformers takes a second of every rank's start."""

    def at_once(path: Path) -> bool:
        return any(
            ast.unparse(line).startswith(("import transformers", "from transformers"))
            for line in ast.parse(path.read_text()).body
        )

    assert at_once(Path(__file__))
    assert not [path for path in Path(exporting.__file__).parent.glob("*.py") if at_once(path)]
