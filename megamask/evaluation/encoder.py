"""Open what `--model` names as a folder of transformers, and refuse what cannot be evaluated.

A run or checkpoint of megamask is exported once into a cache; anything else is read where it is. Each encoder is loaded
and run on one short text, so opening costs a second or two for a small model, and an export a few more.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from megamask.checkpoint import format
from megamask.errors import CheckpointError, must, raise_all
from megamask.hf.masked_lm import max_length
from megamask.hf.model_folder import ModelLoadError, fetch_model, load_hf_tokenizer, load_pretrained, read_config_json
from megamask.hf.tensor_names import TOKENIZER_FILES
from megamask.hf.tokenizer_folder import VOCABULARIES
from megamask.hf.weights import new_model_folder
from megamask.runtime import ranks
from megamask.storage import file_list

POOLER = ("pooler.",)
"""Tensors that a masked language model lacks; transformers initializes them at random, and nothing here uses them."""
DROPOUT = ("dropout", "dropout_prob", "dropout_rate")
"""Ends of the names of rates of dropout in the configuration of a model."""
OF_HEADS = ("classifier", "seq_classif", "qa", "summary")
"""Beginnings of the names of settings of heads."""
WITHOUT_LIMIT = 512
"""Tokens of a text for a model that names no maximum."""
NO_MAXIMUM = 1_000_000
"""A tokenizer with a larger ``model_max_length`` has no limit of its own."""


@dataclass(frozen=True)
class EncoderFolder:
    """An encoder that can be evaluated."""

    label: str
    """The name of the run, RUN/step-N for one of its checkpoints, else the name of the folder or of the model."""
    folder: Path
    """What ``from_pretrained`` loads: config.json, safetensors, a fast tokenizer."""
    weights: str
    """SHA-256 of the safetensors file; of the list of hashes if there are several files."""
    max_length: int
    """Tokens of the longest text that it reads, with special tokens."""


def open_encoder(model: str, cache: Path) -> EncoderFolder:
    """The encoder at ``model``: a run, one of its checkpoints, or a folder or Hub name of transformers.

    Runs and checkpoints are exported below ``cache``, and a later call finds the export. A Hub name is looked up in the
    local Hugging Face cache first and downloaded only if it is not there. Raises CheckpointError with all reasons why
    the model cannot be evaluated: files that are missing or damaged, no fast tokenizer, more tokens than embeddings, a
    decoder.
    """
    label, folder = _locate(model, cache)
    if not (folder / "config.json").is_file():
        in_run = folder.name == "checkpoints"
        raise CheckpointError(
            f"`model` is {folder}, which is neither a run or checkpoint of megamask nor a model of transformers "
            "(it has no config.json)." + f" Name the run, {folder.parent}, or one of its checkpoints." * in_run
        )
    length = _check(folder)
    return EncoderFolder(label, folder, _hash_weights(folder), length)


def with_random_weights(encoder: EncoderFolder, cache: Path, seed: int) -> EncoderFolder:
    """The same architecture and tokenizer with new weights, drawn as transformers initializes the class.

    That follows config.json (``initializer_range``), which is not the initialization of megamask's pretraining. The
    masked-language-model head is included where the class has one. A later call finds the folder below ``cache``.
    """
    output = cache / f"{_file_name(encoder.label)}-random-{seed}-{_hash_config(encoder.folder)}"
    if not output.exists():
        config = AutoConfig.from_pretrained(encoder.folder, local_files_only=True, trust_remote_code=False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                model = AutoModelForMaskedLM.from_config(config, trust_remote_code=False)
            except ValueError:  # the class has no such head
                model = AutoModel.from_config(config, trust_remote_code=False)
        with new_model_folder(output) as temporary:
            model.save_pretrained(temporary)
            for name in {*TOKENIZER_FILES, *VOCABULARIES, "merges.txt"}:
                if (encoder.folder / name).is_file():
                    shutil.copyfile(encoder.folder / name, temporary / name)
    label = f"{encoder.label}, random weights {seed}"
    return EncoderFolder(label, output, _hash_weights(output), encoder.max_length)


def load_encoder(encoder: EncoderFolder, dropout: float | None = None) -> PreTrainedModel:
    """The encoder without any head, in fp32 on the device of this process, in evaluation mode.

    ``dropout`` replaces every rate of dropout that its configuration has, except those of heads.
    """
    settings = {}
    if dropout is not None:
        config = AutoConfig.from_pretrained(encoder.folder, local_files_only=True, trust_remote_code=False)
        rates = [name for name in config.to_dict() if name.endswith(DROPOUT) and not name.startswith(OF_HEADS)]
        settings = dict.fromkeys(rates, dropout)
    model = load_pretrained(AutoModel, encoder.folder, optional=POOLER, **settings)
    nn.Module.to(model, ranks.device())
    return model


# ---- where a model is


def _locate(model: str, cache: Path) -> tuple[str, Path]:
    """The label of a model and a folder of transformers."""
    problem = must("model", "be a folder or the name of a model on the Hugging Face Hub", model)
    if not model:
        raise CheckpointError(problem)
    path = Path(model)
    if (path / format.MANIFEST).is_file():
        checkpoint = path.resolve()
        run = checkpoint.parent.parent  # a checkpoint is in RUN/checkpoints/step-N
        return f"{run.name}/{checkpoint.name}", _export(run, checkpoint, cache)
    if (path / "checkpoints").is_dir():
        run = path.resolve()
        return run.name, _export(run, format.find_checkpoint(run), cache)
    if path.is_dir():
        folder = path.resolve()
        in_run = folder.name == "export" and (folder.parent / "checkpoints").is_dir()
        return folder.parent.name if in_run else folder.name, folder
    if not path.exists() and (path.is_absolute() or model.startswith(".")):
        raise CheckpointError(problem)
    return model, _cached(model) or fetch_model(model, "model")


def _cached(name: str) -> Path | None:
    """The folder of a Hub model in the local cache; None if it is not there, or not with its weights."""
    from huggingface_hub import try_to_load_from_cache  # only for names

    try:
        paths = [try_to_load_from_cache(name, file) for file in ("config.json", "tokenizer_config.json")]
        weights = (try_to_load_from_cache(name, f"model.safetensors{end}") for end in ("", ".index.json"))
        paths.append(next((path for path in weights if isinstance(path, str)), None))
    except ValueError:  # no Hub model has such a name; `fetch_model` says so
        return None
    folders = {Path(path).parent for path in paths if isinstance(path, str)}
    return folders.pop() if len(folders) == 1 and all(isinstance(path, str) for path in paths) else None


def _export(run: Path, checkpoint: Path, cache: Path) -> Path:
    """The checkpoint as a folder of transformers, exported unless an earlier call did; named after its manifest."""
    from megamask.training.export import (
        export_checkpoint,  # imports the whole of training, which other models do not need
    )

    manifest = file_list.sha256(checkpoint / format.MANIFEST)
    step = format.read_manifest(checkpoint).step
    output = cache / f"{_file_name(run.name)}-step-{step}-{manifest[:16]}"
    if not output.exists():
        try:
            export_checkpoint(run, output, step)
        except CheckpointError:
            raise
        except Exception:
            if not (output / "config.json").is_file():  # else another process was first
                raise
    return output


def _file_name(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in label)


# ---- hashes


def _hash_weights(folder: Path) -> str:
    files = sorted(path for path in folder.glob("model*.safetensors"))
    if len(files) == 1:
        return file_list.sha256(files[0])
    hashes = "".join(f"{path.name} {file_list.sha256(path)}\n" for path in files)
    return hashlib.sha256(hashes.encode()).hexdigest()


def _hash_config(folder: Path) -> str:
    return file_list.sha256(folder / "config.json")[:16]


# ---- what can be evaluated


def _check(folder: Path) -> int:
    """The longest text in tokens; raises CheckpointError with everything that makes the model unfit."""
    problems: list[str] = []
    tokenizer, model = None, None
    try:
        tokenizer = _tokenizer(folder)
    except CheckpointError as error:
        problems += error.problems
    try:
        model = _encoder(folder)
    except CheckpointError as error:
        problems += error.problems
    if tokenizer is not None and model is not None:
        problems += _mismatches(tokenizer, model, folder)
    raise_all(CheckpointError, problems)
    assert tokenizer is not None and model is not None
    if not problems and _reads_left_to_right(model, folder):
        raise CheckpointError(
            f"{folder} ({model.config.model_type}) is not an encoder: the state of the first token does not depend on "
            "the tokens after it, as in a decoder."
        )
    return _longest(tokenizer, model)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(
            f"{folder} has no tokenizer ({', '.join(VOCABULARIES[:2])}). Put the files of its tokenizer there."
        )
    try:
        tokenizer = load_hf_tokenizer(folder)
    except ModelLoadError as error:
        raise CheckpointError(f"transformers cannot load the tokenizer in {folder}: {error.reason}") from None
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"The tokenizer in {folder} is not a fast one, and transformers cannot convert it. Spans and words need "
            "the positions of tokens, which only fast tokenizers give."
        )
    return tokenizer


def _encoder(folder: Path) -> PreTrainedModel:
    config = read_config_json(folder)
    if config.get("is_encoder_decoder") or config.get("is_decoder"):
        kind = "an encoder with a decoder" if config.get("is_encoder_decoder") else "a decoder"
        raise CheckpointError(f"{folder} ({config.get('model_type')}) is {kind}. Evaluate an encoder, such as BERT.")
    return load_pretrained(AutoModel, folder, optional=POOLER)


def _mismatches(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, folder: Path) -> list[str]:
    problems = []
    rows = _vocabulary(model)
    if len(tokenizer) > rows:
        problems.append(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens, but the model only {rows} embeddings: they do "
            "not belong together. Use the tokenizer of the model, or call `resize_token_embeddings` and train."
        )
    special = tokenizer("a", add_special_tokens=True)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    if len(special) == len(plain) or special[0] == (plain or [None])[0]:
        problems.append(
            f"The tokenizer in {folder} puts no special token before a text, and the encoder is read at that token. "
            "Add a post-processor for [CLS] and [SEP] to its tokenizer.json."
        )
    return problems


def _vocabulary(model: PreTrainedModel) -> int:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


@torch.no_grad()
def _reads_left_to_right(model: PreTrainedModel, folder: Path) -> bool:
    """Whether the first state stays the same if the last of eight tokens changes."""
    tokens = torch.randint(_vocabulary(model), (2, 8), generator=torch.Generator().manual_seed(0))
    tokens[1, :-1] = tokens[0, :-1]
    try:
        states = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    except Exception as error:  # sizes that do not fit together fail only in the forward pass
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"The forward pass of the model in {folder} failed: {reason}") from None
    return torch.equal(states[0, 0], states[1, 0])


def _longest(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    limits = [max_length(model), tokenizer.model_max_length]
    known = [limit for limit in limits if limit is not None and limit < NO_MAXIMUM]
    return min(known, default=WITHOUT_LIMIT)
