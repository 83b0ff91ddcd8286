"""transformers, imported when something is first asked of it, and the one way in which it loads what others made.

The import takes a second of every rank's start, and most launches of a run have no use for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megamask.errors import CheckpointError
from megamask.model.shape import MOST_LAYERS
from megamask.storage import strict_json
from megamask.storage.dotted import flatten


class Unloadable(CheckpointError):
    """transformers cannot load what lies in ``folder``; ``why`` is its reason, in a line."""

    def __init__(self, folder: Path, why: str):
        super().__init__(f"{folder} is no model that transformers can load: {why}")
        self.why = why


def load_model(kind: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A model of the Auto class ``kind``, in 32 bits, and what transformers says of tensors missing or too many.

    Missing ones have random numbers, and nothing is printed: the caller looks at the report. Only safetensors are
    read, nothing is fetched, no code that comes with the model is run. Raises Unloadable.
    """
    try:
        settings = strict_json.read_json(folder / "config.json")
    except (OSError, strict_json.BadRecord) as error:
        raise Unloadable(folder, f"its config.json cannot be read: {error}") from None
    if strange := impossible(settings):
        raise Unloadable(folder, f"its config.json cannot be: {'; '.join(strange)}")
    return _load(kind, folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)


def impossible(settings: Any) -> list[str]:
    """What no model has of numbers: transformers would build it until memory or patience ends."""
    found = []
    for name, n in flatten({"": settings}).items():
        least, most = (1, MOST_LAYERS) if name.endswith(("layers", "layer")) else (1 - 2**31, 2**31 - 1)
        if isinstance(n, int) and not isinstance(n, bool) and not least <= n <= most:
            found.append(f"{name.lstrip('.')} is {n}")
    return found


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``; nothing is fetched, no code that comes with it is run. Raises Unloadable."""
    return _load(__getattr__("AutoTokenizer"), folder)


def _load(kind: Any, folder: Path, **how: Any) -> Any:
    logging = __getattr__("logging")
    logging.disable_progress_bar()
    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # it would print a table of all tensors that are missing or too many
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **how)
    except Exception as error:  # whatever a strange configuration makes the library raise
        raise Unloadable(folder, " ".join(str(error).split())[:300]) from None
    finally:
        logging.set_verbosity(loud)


def __getattr__(name: str) -> Any:
    import transformers

    return getattr(transformers, name)
