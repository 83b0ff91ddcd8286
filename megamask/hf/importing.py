"""Import: a BERT or ModernBERT checkpoint of transformers as first weights, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megamask.data.tokenizer import TOKENIZER
from megamask.errors import CheckpointError, ConfigError, listed, must, raise_all
from megamask.hf.config_json import read_shape, says_tied
from megamask.hf.tensor_names import TOKENIZER_FILES, misfits, to_ours
from megamask.hf.tokenizer_files import import_tokenizer
from megamask.hf.weights import choose_tensors, read_hf_tensors, save_weights
from megamask.hf.whole import atomic_folder
from megamask.model.shape import EncoderShape


@dataclass(frozen=True)
class Imported:
    """A checkpoint of transformers, read."""

    shape: EncoderShape
    weights: dict[str, Tensor]
    """Under our names, in their own precision. Without a head if the checkpoint has none, or a new one is wanted."""
    folder: Path
    """Where it lies, with its tokenizer."""
    notes: tuple[str, ...]
    """A sentence for all that is not as it is in most checkpoints."""


def import_model(source: str | Path, *, new_head: bool = False) -> Imported:
    """The BERT or ModernBERT checkpoint at ``source``, a folder or the name of a model on the Hugging Face Hub.

    ``new_head`` leaves its head out. Raises CheckpointError with everything that a preset lacks.
    """
    folder = fetch_model(source, "model")
    shape, tied = read_shape(folder, any_head=True), says_tied(folder)
    chosen = choose_tensors(read_hf_tensors(folder), shape, folder, tied=tied, new_head=new_head)
    ours = to_ours(chosen.tensors, shape)
    raise_all(CheckpointError, misfits(ours, shape, str(folder), headless=not chosen.has_head))
    notes = list(chosen.notes)
    if not chosen.has_head:
        why = "Its head is left out, as asked" if new_head else f"{folder} has no masked-language head"
        notes.insert(0, f"{why}: training starts with a new one, drawn from its `seed`.")
    return Imported(shape, ours, folder, tuple(notes))


def fetch_model(source: str | Path, setting: str) -> Path:
    """The folder ``source``, or where the model of that name on the Hugging Face Hub was brought; no code comes along.

    Raises CheckpointError, which calls it by the name of the ``setting``.
    """
    if Path(source).is_dir():
        return Path(source)
    name = str(source)
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # no such name, no network, no permission: one sentence for all
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"`{setting}` must be a folder or the name of a model on the Hugging Face Hub, but {name!r} is "
            f"neither: {reason}"
        ) from None


def save_start(source: str | Path, output: Path, *, new_head: bool = False) -> Imported:
    """Write the checkpoint at ``source`` as first weights for pretraining: weights, ``shape.json``, ``tokenizer/``.

    Raises ConfigError or CheckpointError, with nothing written, for whatever preparation or training would refuse.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(must("output", "be a new or empty folder", str(output)))
    model = import_model(source, new_head=new_head)
    if broken := sorted(name for name, tensor in model.weights.items() if not tensor.isfinite().all()):
        raise CheckpointError(f"{model.folder} has NaN or Inf in {listed(broken, 'tensor')}. Use an intact checkpoint.")
    with atomic_folder(output.absolute()) as temporary:
        notes = import_tokenizer(model.folder, temporary / TOKENIZER, model.shape.vocab_size)
        model.shape.save(temporary)
        save_weights(model.weights, temporary)
    return replace(model, notes=(*model.notes, *notes))
