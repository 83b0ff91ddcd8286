"""TOML files, read whole or refused with a reason. What JSON cannot represent is refused too."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from megamask.storage.strict_json import DEEPEST, LARGEST_SETTINGS, BadRecord, check_depth, parse_finite, read_text


def read_toml(path: Path) -> dict[str, Any]:
    """The content of the TOML file at ``path``. Raises BadRecord, or OSError if it cannot be read."""
    try:
        content = tomllib.loads(read_text(path, LARGEST_SETTINGS), parse_float=parse_finite)
        json.dumps(content)
    except BadRecord:
        raise
    except TypeError:
        raise BadRecord("it contains a date or a time, but no setting has such a value: write text in quotes") from None
    except RecursionError:
        raise BadRecord(f"it is nested more than {DEEPEST} levels deep") from None
    except ValueError as error:
        raise BadRecord(str(error)) from None
    check_depth(content)
    return content
