"""Import: a checkpoint of transformers, of one of the `families`, as initial weights, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megamask.batch import TokenIds
from megamask.data.compare_tokenizers import spare_rows_note
from megamask.data.tokenizer import TOKENIZER, load_tokenizer, token_ids
from megamask.errors import CheckpointError, ConfigError, must, raise_all
from megamask.hf.config_json import is_tied, read_shape
from megamask.hf.encoder_and_head import mismatches
from megamask.hf.model_folder import fetch_model
from megamask.hf.select_tensors import select_tensors
from megamask.hf.tensor_names import from_hf_weights
from megamask.hf.tokenizer_folder import import_tokenizer
from megamask.hf.weights import check_finite, new_model_folder, read_hf_tensors, save_weights
from megamask.model.shape import EncoderShape


@dataclass(frozen=True)
class Imported:
    """A checkpoint of transformers that was read."""

    shape: EncoderShape
    weights: dict[str, Tensor]
    """By our names, in their own precision. Without a head if the checkpoint has none, or a new one is wanted."""
    folder: Path
    """Where the checkpoint and its tokenizer are."""
    notes: tuple[str, ...]
    """A sentence for everything that is unusual."""


def import_model(source: str | Path, *, new_head: bool = False) -> Imported:
    """The checkpoint of one of the `families` at ``source``, a folder or the name of a model on the Hugging Face Hub.

    ``new_head`` leaves its head out. Raises CheckpointError with everything that no preset has.
    """
    folder = fetch_model(source, "model")
    shape = read_shape(folder, any_head=True)
    selected = select_tensors(read_hf_tensors(folder), shape, folder, tied=is_tied(folder), new_head=new_head)
    check_finite(selected.tensors, folder)
    weights = from_hf_weights(selected.tensors, shape)
    raise_all(CheckpointError, mismatches(weights, shape, str(folder), headless=not selected.has_head))
    notes = selected.notes
    if not selected.has_head:
        why = "The head was left out (`new_head`)" if new_head else f"{folder} has no masked-language head"
        notes = (f"{why}: training starts with a new one, drawn from its `seed`.", *notes)
    return Imported(shape, weights, folder, notes)


def save_start(source: str | Path, output: Path, *, new_head: bool = False) -> Imported:
    """Write the checkpoint at ``source`` as initial weights: ``model.safetensors``, ``shape.json``, ``tokenizer/``.

    Raises ConfigError or CheckpointError, with nothing written, for everything that preparation or training would
    refuse.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(must("output", "be a new or empty folder", str(output)))
    model = import_model(source, new_head=new_head)
    with new_model_folder(output.absolute()) as temporary:
        notes = import_tokenizer(model.folder, temporary / TOKENIZER, model.shape.vocab_size)
        ids = token_ids(load_tokenizer(temporary / TOKENIZER))
        raise_all(CheckpointError, _padding_problems(model, ids))
        model.shape.save(temporary)
        save_weights(model.weights, temporary)
    spare = spare_rows_note(model.folder, model.shape.vocab_size, ids.size)
    return replace(model, notes=(*model.notes, *notes, *([spare] if spare else [])))


def _padding_problems(model: Imported, ids: TokenIds) -> list[str]:
    """A sentence if transformers would not count the positions of a text as training does."""
    if not model.shape.position_offset or ids.pad == model.shape.pad_id:
        return []
    return [
        f"{model.folder / 'config.json'} says that the padding token, from which positions count, has the id "
        f"{model.shape.pad_id}, but its tokenizer says {ids.pad}: transformers would not count the tokens with the id "
        f"{model.shape.pad_id} of a text. Put the tokenizer of these weights there."
    ]
