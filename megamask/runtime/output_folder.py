"""Whether a folder could be created and written, without doing so."""

from __future__ import annotations

import os
from pathlib import Path


def existing_parent(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def output_problems(output: Path, inside: str = "") -> list[str]:
    """A sentence if ``output``, or the folder ``inside`` of it, cannot be written; writes nothing."""
    folder = existing_parent(output / inside)
    if not folder.is_dir():
        return [f"`output` is {output}, but {folder} is not a folder. Choose another output folder."]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [f"`output` is {output}, but {folder} cannot be written. Choose another output folder."]
    return []
