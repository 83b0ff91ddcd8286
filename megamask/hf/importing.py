"""Import: a BERT or ModernBERT checkpoint of transformers as first weights, bit for bit."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megamask import records
from megamask.data.tokenizer import TOKENIZER
from megamask.errors import CheckpointError, ConfigError, must, raise_all
from megamask.hf.names import LEFT_OUT, TIED, TOKENIZER_FILES, WEIGHTS, misfits, names, to_ours
from megamask.hf.settings import read_shape
from megamask.model.shape import EncoderShape


def import_model(source: str | Path) -> tuple[EncoderShape, dict[str, Tensor], Path]:
    """Shape, weights under our names, and the folder of the tokenizer of a BERT or ModernBERT checkpoint.

    ``source`` is a folder or the name of a model on the Hugging Face Hub. Weights keep their precision. Raises
    CheckpointError with everything that a preset lacks.
    """
    folder = fetch(source, "model")
    shape = read_shape(folder)
    theirs = read_tensors(folder)
    for name in [name for name in theirs if name.endswith((".gamma", ".beta"))]:
        # BERT's first checkpoints call the two vectors of a norm so
        renamed = name.replace(".gamma", ".weight").replace(".beta", ".bias")
        theirs[renamed] = theirs.pop(name)
    theirs = {name: tensor for name, tensor in theirs.items() if not name.startswith(LEFT_OUT)}
    problems = []
    for copy, original in TIED[shape.preset].items():
        if copy in theirs and original in theirs and not torch.equal(theirs[copy], theirs[original]):
            problems.append(f"{folder} must have one tensor as {copy} and {original}, but they differ.")
        theirs.pop(copy, None)
    wanted = {name for parts in names(shape).values() for name in parts}
    problems += [f"{folder} lacks the tensor {name}." for name in sorted(wanted - set(theirs))]
    problems += [
        f"{folder} has the tensor {name}, for which there is no place." for name in sorted(set(theirs) - wanted)
    ]
    raise_all(CheckpointError, problems)
    ours = to_ours(theirs, shape)
    raise_all(CheckpointError, misfits(ours, shape, str(folder)))
    return shape, ours, folder


def fetch(source: str | Path, setting: str) -> Path:
    """The folder ``source``, or where the model of that name on the Hugging Face Hub was brought; no code comes along.

    Raises CheckpointError, which calls it by the name of the ``setting``.
    """
    if Path(source).is_dir():
        return Path(source)
    name = str(source)
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # no such name, no network, no permission: one sentence for all
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"`{setting}` must be a folder or the name of a model on the Hugging Face Hub, but {name!r} is "
            f"neither: {reason}"
        ) from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in ``folder``; CheckpointError for none or a damaged one."""
    raise_all(CheckpointError, list(_leads_away(folder)))
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise CheckpointError(
            f"{folder} holds no model.safetensors. Other formats can run code when they are read; load the model with "
            "transformers where you trust it and `save_pretrained` it."
        )
    found: dict[str, Tensor] = {}
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} is no regular file.")
        try:
            found |= load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no safetensors file: {error}.") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    return found


def _leads_away(folder: Path) -> Iterator[str]:
    """Sentences for files by which transformers would go on to other folders, or wait for ever."""
    if (folder / "adapter_config.json").exists():
        yield f"{folder} holds an adapter (adapter_config.json) of another model. Merge them, and save the whole."
    for path in folder.glob("*.json"):
        if not path.is_file():
            yield f"{path} is no regular file."
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            parts = set(records.read_json(index)["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            yield f"{index} is no index of safetensors files."
            return
        for name in sorted(map(str, parts)):
            if not re.fullmatch(r"model[\w.-]*\.safetensors", name, re.ASCII):
                yield f"{index} names {name!r}, which is no safetensors file of a model in its folder."


def save_start(source: str | Path, output: Path) -> EncoderShape:
    """Write the checkpoint at ``source`` as first weights for pretraining: weights, ``shape.json``, ``tokenizer/``."""
    shape, weights, tokenizer = import_model(source)
    if output.exists() and any(output.iterdir()):
        raise ConfigError(must("output", "be a new or empty folder", str(output)))
    (output / TOKENIZER).mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, output / TOKENIZER / name)
    shape.save(output)
    save_file(weights, output / WEIGHTS)
    return shape
