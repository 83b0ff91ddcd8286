"""The model and the weights that a run begins with: random, or those that `init` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megamask.batch import TokenIds
from megamask.checkpoint.format import find_checkpoint, read_weights
from megamask.checkpoint.run_folder import RunFolder
from megamask.config.pretrain_config import PretrainConfig
from megamask.data.compare_tokenizers import spare_rows_note, tokenizer_cure, tokenizer_differences
from megamask.data.tokenizer import TOKENIZER
from megamask.errors import ConfigError, raise_all
from megamask.hf.layer_subset import pick_layers
from megamask.hf.weights import read_hf_tensors as read_safetensors
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.initialisation import initial_value
from megamask.model.shape import EncoderShape
from megamask.objectives.mlm import MLM
from megamask.objectives.objective import build_objective, load_objective_weights


@dataclass(frozen=True)
class InitialModel:
    """The model of a run before its first step, without memory for its weights (on the device `meta`)."""

    shape: EncoderShape
    objective: MLM
    weights: Mapping[str, Tensor]
    """Those of `init`, mapped from files; none if the first weights are random."""


def initial_model(config: PretrainConfig, ids: TokenIds, tokenizer: Path) -> InitialModel:
    """The model of a run with ``config``; the arguments are those of `initial_weights`.

    Raises ConfigError, and CheckpointError if the weights of `init` are not those of this model.
    """
    shape, weights = initial_weights(config, ids, tokenizer)
    with torch.device("meta"):
        encoder = Encoder(shape, config.model)
        head = MaskedLMHead(encoder, config.model)
        objective = build_objective(config.objective, encoder, head, config.entropy.measure)
    if weights:
        load_objective_weights(objective, weights)  # compares names and shapes; `meta` has no values
    return InitialModel(shape, objective, weights)


def initial_weights(config: PretrainConfig, ids: TokenIds, tokenizer: Path) -> tuple[EncoderShape, dict[str, Tensor]]:
    """The encoder's shape and weights: those of `init`, else the shape of `model` and no weights.

    ``ids`` and ``tokenizer``, a folder, are those of the text. Raises ConfigError if they are not those of `init`.
    `config.sizes_of_init` compares the settings with it.
    """
    if config.init is None:
        return config.model.shape(ids), {}
    if RunFolder(config.init).checkpoints.is_dir():
        weights = read_weights(find_checkpoint(config.init))
    else:
        weights = read_safetensors(config.init)
    shape = EncoderShape.load(config.init)
    if config.init_layers is not None:
        shape, weights = pick_layers(weights, shape, config.init_layers)
    problems: list[str] = []
    own = config.init / TOKENIZER
    if own.is_dir():
        problems += tokenizer_differences(own, "init", tokenizer, "data's tokenizer")
    if not problems and shape.vocab_size < ids.size:
        problems.append(
            f"`data` has a vocabulary of {ids.size} tokens, but the weights of `init` have {shape.vocab_size}."
        )
    if problems:
        problems.append(tokenizer_cure(own, "init"))
    raise_all(ConfigError, problems)
    return shape, weights


def initial_notes(config: PretrainConfig, model: InitialModel, ids: TokenIds) -> list[str]:
    """A sentence for everything that is unusual in the weights of `init`; none for random weights."""
    if config.init is None:
        return []
    notes = []
    if not any(name.startswith("head.") for name in model.weights):
        notes.append(f"{config.init} has no masked-language head: a new one is drawn from `seed`.")
    if spare := spare_rows_note(config.init, model.shape.vocab_size, ids.size):
        notes.append(spare)
    return notes


def first_values(
    objective: nn.Module, weights: Mapping[str, Tensor], seed: int, *, restored: bool
) -> Callable[[str], Tensor | None]:
    """The first value of each weight of an ``objective`` by its name: of ``weights``, or drawn from ``seed``.

    None for all of them if they are ``restored`` from a checkpoint later.
    """
    parameters = dict(objective.named_parameters())

    def first_value(name: str) -> Tensor | None:
        if restored:
            return None
        return weights[name] if name in weights else initial_value(name, parameters[name], seed)

    return first_value
