"""The safetensors files of a model folder: read them, check them for NaN and Inf, write them.

The files are those that ``model.safetensors.index.json`` names, else ``model.safetensors``, as transformers chooses.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megamask.errors import CheckpointError, StorageError, listed, raise_all
from megamask.hf.tensor_names import WEIGHTS
from megamask.storage import strict_json
from megamask.storage.atomic_write import atomic_folder

INDEX = "model.safetensors.index.json"
CONVERSION = (
    "python -c 'from transformers import AutoModelForMaskedLM as M, AutoTokenizer as T; "
    """[part.from_pretrained("MODEL").save_pretrained("NEW") for part in (M, T)]'"""
)
"""The command with which users save a model of another format as safetensors."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of tensors that are accepted as weights."""


def read_hf_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the model in ``folder``; CheckpointError for a file that is missing or corrupt."""
    raise_all(CheckpointError, list(_unsafe(folder)))
    index = _read_index(folder)
    tensors: dict[str, Tensor] = {}
    for path in _files(folder, index):
        if not path.is_file():
            raise CheckpointError(f"{path} is not a regular file.")
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a valid safetensors file: {error}.") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    if missing := sorted(index.keys() - tensors.keys()):
        raise CheckpointError(f"{folder / INDEX} lists {listed(missing, 'tensor')}, but the files do not contain it.")
    return tensors


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """CheckpointError if some of the ``tensors`` contain NaN or Inf; the error says ``where`` they are."""
    broken = sorted(name for name, tensor in tensors.items() if tensor.dtype in FLOATS and not tensor.isfinite().all())
    if broken:
        raise CheckpointError(f"{where} has NaN or Inf in {listed(broken, 'tensor')}. Use an intact checkpoint.")


def save_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write ``model.safetensors`` with the permissions that other new files have."""
    path = folder / WEIGHTS
    save_file(tensors, path, metadata={"format": "pt"})
    probe = folder / f".tmp-{WEIGHTS}"
    probe.touch()
    shutil.copymode(probe, path)  # safetensors gives only the owner access, whatever the umask
    probe.unlink()


@contextmanager
def new_model_folder(output: Path) -> Iterator[Path]:
    """A folder that becomes ``output`` at the end, or disappears; StorageError if it cannot be written."""
    try:
        with atomic_folder(output) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # transformers raised it, not the storage
        raise StorageError(f"{output} cannot be written: {getattr(error, 'strerror', None) or error}.") from None


def _read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor by the index; empty if there is no index."""
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        index = {str(tensor): str(file) for tensor, file in strict_json.read_json(path)["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is not an index of safetensors files.") from None
    for name in sorted(set(index.values())):
        if not re.fullmatch(r"model[\w.-]*\.safetensors", name, re.ASCII):
            raise CheckpointError(f"{path} names {name!r}, which is not a safetensors file of a model in its folder.")
    return index


def _files(folder: Path, index: Mapping[str, str]) -> list[Path]:
    single, shards = folder / WEIGHTS, sorted(set(index.values()))
    if not shards:
        if single.exists():
            return [single]
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}. Other formats can run code when they are loaded. If you trust the model, "
            f"convert it once, with its name or folder for MODEL, and use the folder NEW: {CONVERSION} (with AutoModel "
            "instead of AutoModelForMaskedLM if it has no masked-language-model head)"
        )
    if single.exists() and shards != [WEIGHTS]:
        raise CheckpointError(
            f"{folder} has {WEIGHTS} and an index of other files ({shards[0]}), so it is not clear which is the "
            "model. Remove one of them."
        )
    if missing := [name for name in shards if not (folder / name).exists()]:
        raise CheckpointError(f"{folder / INDEX} names {listed(missing, 'file')}, but {folder} does not contain it.")
    return [folder / name for name in shards]


def _unsafe(folder: Path) -> Iterator[str]:
    """Sentences for files with which transformers would read other folders or wait forever."""
    if (folder / "adapter_config.json").exists():
        yield f"{folder} has an adapter (adapter_config.json) of another model. Merge them and save the whole model."
    for path in folder.glob("*.json"):
        if not path.is_file():
            yield f"{path} is not a regular file."
