"""The numbers of an encoder: the settings (`ModelConfig`), and the shape that follows from them (`EncoderShape`).

A shape contains all that is needed to load the weights, so it is stored beside them. How the model runs (dropout,
attention back end, compilation) is only in the config.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le, MultipleOf

from megamask.basic_types import TokenIds
from megamask.errors import CheckpointError, Removable, must
from megamask.errors.setting_rules import Count, OnlyFor, ShareBelowOne, ShareInside, field_problem, setting_of
from megamask.storage import strict_json

Backend = Literal["auto", "reference", "padded", "varlen"]
Family = Literal["roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert"]
Activation = Literal["gelu", "gelu_tanh"]
SHAPE = "shape.json"
HEAD_WIDTH = 64
LARGEST = 2**40
"""Largest number of elements of a matrix."""
MOST_LAYERS = 4096
Layers = Annotated[int, Ge(1), Le(MOST_LAYERS)]
Width = Annotated[int, Ge(1), Le(2**20)]
"""Rows or columns of a matrix that the settings size: at most the root of `LARGEST`."""
# layers and width; base and large are BERT's (Devlin et al. 2019), xl and xxl are Megatron-LM's 1.3B and 3.9B BERT
# (Shoeybi et al. 2020). Heads are 64 wide everywhere.
SIZES = {
    "tiny": (4, 256),
    "small": (6, 384),
    "base": (12, 768),
    "large": (24, 1024),
    "xl": (24, 2048),
    "xxl": (48, 2560),
}


@dataclass(frozen=True)
class EncoderShape:
    """Every number that decides the names and shapes of the weights and what they compute."""

    preset: Literal["bert", "modern"]
    """How layers compute: as BERT's or as ModernBERT's."""
    vocab_size: int
    """Rows of the embedding table."""
    pad_id: int
    """Id of the padding token; written on export, not used in computations."""
    num_layers: int
    """Layers."""
    hidden_size: int
    """Width of the hidden states."""
    num_heads: int
    """Attention heads."""
    intermediate_size: int
    """Width inside the feed-forward block; of each half of the gate in `modern`."""
    max_positions: int
    """Longest sequence; with ``position_offset`` the rows of the position table in `bert`."""
    norm_eps: float
    """Added to the variance in layer norms."""
    token_types: int = 2
    """Rows of the token-type table of `bert`, of which row 0 is used; 0 in DistilBERT, which has no such table."""
    global_every: int = 1
    """Every n-th layer, from the first, attends to the whole sequence; `modern` only."""
    local_window: int = 128
    """Tokens that the other layers attend to, half on each side; `modern` only."""
    rope_theta: float = 10_000.0
    """Base of the rotary wave lengths in global layers; `modern` only."""
    local_rope_theta: float = 10_000.0
    """Base of the rotary wave lengths in local layers; `modern` only."""
    family: Family | None = None
    """Which class of transformers the weights fit, by its `model_type`, if not the one of ``preset`` (BertForMaskedLM,
    ModernBertForMaskedLM)."""
    position_offset: int = 0
    """Rows of the position table before that of a sequence's first token; RoBERTa's table has them up to the row of
    the padding token's id."""
    embedding_size: int | None = None
    """Width of the tables of `bert` and of what the head multiplies with the token table, if it is not the width of a
    row (ELECTRA, ALBERT)."""
    layer_groups: int | None = None
    """Groups of consecutive layers that have the same weights (ALBERT); None: each layer has its own."""
    activation: Activation = "gelu"
    """Of `bert`: GELU by the error function, or its approximation by tanh (ALBERT version 2)."""

    @property
    def own_layers(self) -> int:
        """Layers with weights of their own."""
        return self.layer_groups or self.num_layers

    def weights_of(self, layer: int) -> int:
        """Which of the ``own_layers`` ``layer`` computes with; groups are as in transformers' AlbertTransformer."""
        return layer * self.own_layers // self.num_layers

    @property
    def table_width(self) -> int:
        """Width of the token table."""
        return self.embedding_size or self.hidden_size

    def window(self, layer: int) -> int | None:
        """How many tokens to either side ``layer`` attends to; None: the whole sequence."""
        return self.local_window // 2 if layer % self.global_every else None

    def theta(self, layer: int) -> float:
        """The rotary base of ``layer``."""
        return self.local_rope_theta if layer % self.global_every else self.rope_theta

    def save(self, folder: Path) -> None:
        """Write ``shape.json`` beside the weights."""
        (folder / SHAPE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> EncoderShape:
        """The shape in ``folder``; raises CheckpointError if there is none or it is of another version."""
        from pydantic import TypeAdapter, ValidationError

        path = folder / SHAPE
        try:
            shape = TypeAdapter(cls).validate_json(
                strict_json.to_json(values := strict_json.read_json(path)), strict=True
            )
        except FileNotFoundError:
            raise CheckpointError(f"{folder} holds no {SHAPE}, so the shape of its weights is not known.") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
        except ValidationError as error:
            wrong = [field_problem(cls, one, setting_of(cls, one) or SHAPE) for one in error.errors()]
            raise CheckpointError(f"{path} does not describe an encoder: {' '.join(wrong)}") from None
        except strict_json.BadRecord as error:
            raise CheckpointError(f"{path} does not describe an encoder: {error}.") from None
        if strange := sorted(set(values) - {field.name for field in fields(cls)}):
            known = sorted(field.name for field in fields(cls))
            raise CheckpointError(f"{path} must hold {', '.join(known)}, but holds {', '.join(strange)} too.")
        if wrong := shape.problems():
            raise CheckpointError(f"{path} describes an impossible encoder: {' '.join(wrong)}")
        return shape

    def problems(self) -> list[str]:
        """Sentences for numbers that no encoder has."""
        counts = {name: value for name, value in vars(self).items() if isinstance(value, int) and name != "pad_id"}
        least = {"token_types": int(self.family != "distilbert"), "position_offset": 0}
        problems = [
            must(name, f"lie between {low} and 2**31", n)
            for name, n in counts.items()
            if not (low := least.get(name, 1)) <= n < 2**31
        ]
        if self.layer_groups and self.num_layers % self.layer_groups:
            problems.append(must("num_layers", f"be divisible by layer_groups ({self.layer_groups})", self.num_layers))
        if self.num_layers > MOST_LAYERS:
            problems.append(must("num_layers", f"be at most {MOST_LAYERS}", self.num_layers))
        if not 0 <= self.pad_id < self.vocab_size:
            problems.append(must("pad_id", f"lie below vocab_size ({self.vocab_size})", self.pad_id))
        if not problems and self.hidden_size % self.num_heads:
            problems.append(must("hidden_size", f"be divisible by num_heads ({self.num_heads})", self.hidden_size))
        rows = max(self.vocab_size, self.max_positions, self.intermediate_size, self.hidden_size)
        if not problems and rows * self.hidden_size > LARGEST:
            rule = f"make no matrix of more than {LARGEST} numbers"
            problems.append(must("hidden_size", rule, f"{self.hidden_size} with {rows} rows"))
        return problems


@dataclass(frozen=True)
class ModelConfig:
    """The encoder. `size` sets the numbers; each can be overridden."""

    preset: Literal["bert", "roberta", "modern"] = "modern"
    """`bert`: learned positions, post-norm, biases, GELU. `roberta`: the same with one token type and RoBERTa's
    table of positions. `modern`: rotary positions, pre-norm, gated GELU, no bias."""
    size: Literal["tiny", "small", "base", "large", "xl", "xxl"] = "tiny"
    """Layers x width: tiny 4x256 (11M parameters with 30,522 tokens), small 6x384 (23M), base 12x768 (109M),
    large 24x1024 (335M), xl 24x2048 (1.3B), xxl 48x2560 (3.9B)."""
    num_layers: Layers | None = None
    """Layers; from `size` if not given."""
    hidden_size: Width | None = None
    """Width of the hidden states; from `size` if not given."""
    num_heads: Count | None = None
    """Attention heads; if not given, as many as a head width of 64 allows."""
    intermediate_size: Width | None = None
    """Width inside the feed-forward block; 4 times the width if not given, in `modern` 8/3 times, up to a multiple of
    64, which costs the same."""
    max_positions: Width | None = None
    """Longest sequence in tokens; 1024 in `modern` and 512 in the others if not given."""
    layer_groups: Annotated[Count | None, OnlyFor("preset", "bert")] = None
    """Groups of consecutive layers that share their weights, as in ALBERT, whose models have 1; exported as ALBERT. If
    not given, each layer has its own."""
    embedding_size: Annotated[Count | None, OnlyFor("preset", "bert")] = None
    """Width of the token table, which is then followed by a projection; exported as ELECTRA's generator, or as ALBERT
    with `layer_groups`. The width of the hidden states if not given."""
    dropout: ShareBelowOne = 0.0
    """Share of hidden values and of attention weights dropped in training. Above 0, training is 20 to 30 % slower."""
    global_every: Annotated[Count, OnlyFor("preset", "modern")] = 1
    """Every n-th layer, from the first, attends to the whole sequence, the others locally; 1 makes all global."""
    local_window: Annotated[int, Ge(2), MultipleOf(2), OnlyFor("preset", "modern")] = 128
    """Tokens that a local layer attends to, half on each side."""
    init_std: ShareInside = 0.02
    """Standard deviation of the initial weights, a normal distribution truncated at twice that."""
    attention: Backend = "auto"
    """How attention is computed: `varlen` (CUDA, 16 bits, no dropout), `padded`, `reference` (slow, for tests)."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer for the backward pass and compute the rest again: less memory, 1/3 slower."""
    compile: bool = False
    """Compile each layer except its attention with torch.compile: some minutes at the start, faster steps after it."""

    def shape(self, token_ids: TokenIds) -> EncoderShape:
        """All numbers, for the vocabulary of ``token_ids``."""
        layers, width = SIZES[self.size]
        width = self.hidden_size or width
        bert, roberta = self.preset != "modern", self.preset == "roberta"
        family: Family | None = "roberta" if roberta else None
        if self.layer_groups or self.embedding_size:
            family = "albert" if self.layer_groups else "electra"
        return EncoderShape(
            preset="bert" if bert else "modern",
            vocab_size=token_ids.size,
            pad_id=token_ids.pad,
            num_layers=self.num_layers or layers,
            hidden_size=width,
            num_heads=self.num_heads or width // HEAD_WIDTH,
            intermediate_size=self.intermediate_size or (4 * width if bert else 64 * math.ceil(width / 24)),
            max_positions=self.max_positions or (512 if bert else 1024),
            norm_eps=1e-5 if roberta or not bert else 1e-12,
            token_types=1 if roberta else 2,
            position_offset=token_ids.pad + 1 if roberta else 0,
            global_every=self.global_every,
            local_window=self.local_window,
            family=family,
            # ALBERT has a projection even between equal widths
            embedding_size=self.embedding_size or (width if self.layer_groups else None),
            layer_groups=self.layer_groups,
        )

    def problems(self, name: str) -> list[str]:
        """Sentences for what two settings cannot do together."""
        problems = self._division_problems(name)
        layers = self.num_layers or SIZES[self.size][0]
        if self.layer_groups and layers % self.layer_groups:
            problems.append(must(f"{name}.layer_groups", f"divide the number of layers ({layers})", self.layer_groups))
        if self.local_window != ModelConfig.local_window and self.preset == "modern" and self.global_every == 1:
            why = f"has an effect only where `{name}.global_every` is above 1"
            problems.append(Removable(f"{name}.local_window", why, ModelConfig.local_window))
        if self.attention == "varlen" and self.dropout:
            problems.append(must(f"{name}.dropout", f"be 0 when `{name}.attention` is 'varlen'", self.dropout))
        return problems

    def _division_problems(self, name: str) -> list[str]:
        width = self.hidden_size or SIZES[self.size][1]
        if self.num_heads is None and width % HEAD_WIDTH:
            return [
                must(f"{name}.hidden_size", f"be divisible by {HEAD_WIDTH}", width, f"Or set `{name}.num_heads` too.")
            ]
        heads = self.num_heads or width // HEAD_WIDTH
        if width % heads:
            return [must(f"{name}.hidden_size", f"be divisible by `{name}.num_heads` ({heads})", width)]
        if self.preset == "modern" and width // heads % 2:
            rule = "be an even multiple of `num_heads`, because positions rotate pairs"
            return [must(f"{name}.hidden_size", rule, width)]
        return []
