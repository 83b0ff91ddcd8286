"""Read a model folder of transformers: download it, check it, load it.

Only safetensors are read, nothing is downloaded while a folder is loaded, and code that comes with a model never runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megamask.errors import CheckpointError, listed, must, raise_all
from megamask.hf import lazy_transformers
from megamask.hf.tensor_names import TOKENIZER_FILES
from megamask.hf.weights import check_finite, read_hf_tensors
from megamask.model.shape import MOST_LAYERS
from megamask.storage import strict_json
from megamask.storage.dotted import flatten


class ModelLoadError(CheckpointError):
    """transformers cannot load what is in ``folder``; ``reason`` is its message in one line."""

    def __init__(self, folder: Path, reason: str):
        super().__init__(f"transformers cannot load {folder}: {reason}")
        self.reason = reason


def fetch_model(source: str | Path, setting: str) -> Path:
    """The folder ``source``, or the folder to which the model of that name on the Hugging Face Hub was downloaded.

    Raises CheckpointError with the name of the ``setting``.
    """
    name, expected = str(source), "a folder or the name of a model on the Hugging Face Hub"
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file():
        raise CheckpointError(must(setting, f"be {expected}", name, "It is a file: name the folder of the model."))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        cure = "There is no such folder, and names on the Hub have at most one slash."
        raise CheckpointError(must(setting, f"be {expected}", name, cure)) from None
    except Exception as error:  # no such name, no network, no permission: one sentence for all
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"`{setting}` must be {expected}, but {name!r} is neither: {reason}") from None


def read_config_json(folder: Path) -> dict[str, Any]:
    """The config.json in ``folder``; CheckpointError if it is missing, corrupt or has sizes that no model has."""
    path = folder / "config.json"
    missing = f"{folder} has no config.json, so it is not a model of transformers."
    config = strict_json.read_object(path, CheckpointError, missing)
    if impossible := _impossible_sizes(config):
        raise CheckpointError(f"{path} does not describe a possible model: {'; '.join(impossible)}.")
    return config


def _impossible_sizes(config: dict[str, Any]) -> list[str]:
    """Numbers with which transformers would build a model until memory or patience ends."""
    problems = []
    for name, value in flatten(config).items():
        least, most = (1, MOST_LAYERS) if name.endswith(("layers", "layer")) else (1 - 2**31, 2**31 - 1)
        if isinstance(value, int) and not isinstance(value, bool) and not least <= value <= most:
            problems.append(f"{name} is {value}")
    return problems


def load_pretrained(
    auto_class: Any, folder: Path, *, optional: tuple[str, ...] = (), **settings: float | None
) -> lazy_transformers.PreTrainedModel:
    """The model in ``folder`` as ``auto_class`` loads it: in fp32 on the CPU, in evaluation mode.

    Raises CheckpointError for a file that is missing or corrupt, for NaN and Inf, and for missing tensors, which
    transformers would initialize with random values. Tensors whose names begin with ``optional`` may be missing.
    ``settings`` replace those of its config.json.
    """
    read_config_json(folder)
    check_finite(read_hf_tensors(folder), folder)
    model, report = _from_pretrained(
        auto_class, folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **settings
    )
    missing = sorted(name for name in map(str, report["missing_keys"]) if not name.startswith(optional))
    mismatched = sorted(map(str, report["mismatched_keys"]))
    what = f"{folder} does not hold a complete {type(model).__name__}"
    problems = [f"{what}: it lacks {listed(missing, 'tensor')}."] if missing else []
    problems += [f"{what}: the shape of {listed(mismatched, 'tensor')} is another."] if mismatched else []
    raise_all(CheckpointError, problems)
    return model.eval()


def load_hf_tokenizer(folder: Path) -> lazy_transformers.PreTrainedTokenizerBase:
    """The tokenizer in ``folder``. Raises ModelLoadError."""
    return _from_pretrained(lazy_transformers.AutoTokenizer, folder)


def _from_pretrained(auto_class: Any, folder: Path, **options: Any) -> Any:
    logging = lazy_transformers.logging
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would print a table of all missing and unexpected tensors
    try:
        return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # a malformed configuration can raise anything
        raise ModelLoadError(folder, " ".join(str(error).split())[:300]) from None
    finally:
        logging.set_verbosity(verbosity)
