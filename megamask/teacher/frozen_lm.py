"""Read any masked language model: a module for its last states, and the matrix and bias that make logits of them.

The path may name

- a run of megamask (``checkpoints/``), whose newest checkpoint is read, or one checkpoint (``MANIFEST.json``). Encoder
  and head of any objective are read. With 3ML in one stack that is an ordinary model, although its first layers were
  trained without [MASK]; with MAE-LM its predictions mean nothing, which ``other_modules`` shows;
- initial weights (``shape.json`` beside ``model.safetensors``, as `megamask import` writes them);
- a folder or Hub name of transformers: BERT and ModernBERT run in our own encoder, any other class in transformers
  (`hf.masked_lm`).

Only safetensors are read, and code that comes with a model never runs. Tensors are mapped from their
files, except those that are joined or have another type; transformers reads a whole model into memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from megamask import hf
from megamask.batch import Layout
from megamask.checkpoint import format
from megamask.data.tokenizer import TOKENIZER
from megamask.errors import CheckpointError
from megamask.hf.config_json import has_preset
from megamask.hf.encoder_and_head import encoder_and_head
from megamask.hf.masked_lm import load_hf_masked_lm
from megamask.hf.model_folder import fetch_model
from megamask.hf.weights import read_hf_tensors
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import SHAPE, EncoderShape


@dataclass(frozen=True)
class MaskedLM:
    """``states``: (tokens (T,), layout, rows (Q,)) -> (Q, D). States times ``weight``' plus ``bias`` are the logits.

    ``longest`` is the longest sequence it can read, None without a limit; ``tokenizer`` is the folder of its tokenizer.
    """

    states: nn.Module
    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"]
    longest: int | None
    tokenizer: Path
    other_modules: tuple[str, ...] = ()
    """Modules of a run's objective that are left out. If there are any, they processed [MASK], and the encoder never
    saw it."""

    def fingerprint(self) -> str:
        """sha256 of all parameters in their present precision; it does not depend on where the model came from."""
        return fingerprint(self.states.state_dict() | {"weight": self.weight, "bias": self.bias})


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class HiddenStatesFn(nn.Module):
    """Our encoder and head, without the output matrix."""

    def __init__(self, encoder: Encoder, head: MaskedLMHead):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, tokens: Int64[Tensor, " T"], layout: Layout, rows: Int64[Tensor, " Q"]) -> Float[Tensor, "Q D"]:
        """The states at ``rows`` from which the output matrix makes logits."""
        x = self.encoder.run(self.encoder.embed(tokens, layout), layout)
        return self.head.transform(x.index_select(0, rows))

    def at_few_rows(
        self, tokens: Int64[Tensor, " T"], layout: Layout, rows: Int64[Tensor, " Q"]
    ) -> Float[Tensor, "Q D"]:
        """What ``forward`` returns, up to rounding; the last layer updates ``rows`` alone, which must be sorted.

        This saves up to three quarters of that layer. A layer with a window updates all tokens.
        """
        depth = self.encoder.shape.num_layers
        if self.encoder.shape.window(depth - 1) is not None:
            return self(tokens, layout, rows)
        x = self.encoder.run(self.encoder.embed(tokens, layout), layout, slice(depth - 1))
        x = self.encoder.run(x, layout, slice(depth - 1, depth), rows)
        return self.head.transform(x.index_select(0, rows))


def read_masked_lm(path: str | Path, setting: str) -> MaskedLM:
    """The model at ``path``, the value of ``setting``; in fp32 on the CPU.

    Raises CheckpointError for everything that is missing, corrupt or unknown, and for NaN and Inf; ConfigError for a
    model that ends in more than one matrix and its bias.
    """
    folder = Path(path)
    if (folder / format.MANIFEST).exists() or (folder / "checkpoints").is_dir():
        checkpoint = format.find_checkpoint(folder)
        run = checkpoint.parent.parent  # a checkpoint is in RUN/checkpoints/step-N
        return _own(EncoderShape.load(run), format.read_weights(checkpoint), run / TOKENIZER, checkpoint)
    if (folder / SHAPE).exists():
        return _own(EncoderShape.load(folder), read_hf_tensors(folder), folder / TOKENIZER, folder)
    folder = fetch_model(path, setting)
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"`{setting}` is {folder}, which is neither a run of megamask (checkpoints), nor initial weights "
            f"({SHAPE}), nor a model of transformers (config.json)."
        )
    if has_preset(folder):
        model = hf.import_model(folder)
        return _own(model.shape, model.weights, folder, folder)
    return MaskedLM(*load_hf_masked_lm(folder), tokenizer=folder)


def _own(shape: EncoderShape, weights: Mapping[str, Tensor], tokenizer: Path, where: Path) -> MaskedLM:
    encoder, head = encoder_and_head(weights, shape, str(where))
    weight, bias = head.decoder.weight.detach(), head.decoder.bias.detach()
    other_modules = tuple(sorted({name.split(".")[0] for name in weights} - {"encoder", "head"}))
    return MaskedLM(HiddenStatesFn(encoder, head), weight, bias, shape.max_positions, tokenizer, other_modules)
