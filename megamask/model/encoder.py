"""The encoder: packed token ids in, one hidden state per token out.

Two presets, each a subset of a class of transformers, so that export is a renaming: ``bert`` is BertForMaskedLM (Devlin
et al. 2019), ``modern`` is ModernBertForMaskedLM (Warner et al. 2024). With other positions, token types and widths of
the tables, ``bert`` is also RoBERTa, DistilBERT and the generator of ELECTRA; with layers that share weights, ALBERT
(Lan et al. 2020), which has no dropout before the last norm of a layer. Cost of a forward pass per token, in multiply-
adds: layers x (12 x width^2 + 2 x width x length of the sequence).

Parameters are few and large (one for queries, keys and values; one for gate and value of the feed-forward block),
because DeepSpeed has a cost per tensor. They belong to leaf modules that are called, and no other module reads them
directly, because ZeRO-3 gathers them in the hooks of a call. An index of a token in its pack is called a row.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megamask.batch import Layout
from megamask.model.attention import QueryKeyLayout, attend
from megamask.model.initialisation import initialise, scale_initial
from megamask.model.shape import EncoderShape, ModelConfig
from megamask.model.sums import LayerNorm, Table
from megamask.runtime import private_api

Rotary = tuple[Tensor, Tensor]


class LayerStack(nn.Module):
    """A stack of layers; in `modern`, a final norm follows. Layers of a group are one module, called repeatedly.

    ``config`` decides how they run (dropout, attention, checkpointing, compilation) and how they are initialised;
    ``shape`` decides everything else. ``below`` is the module below the layers, if there is one. ``first`` is the
    position of the first layer in the pattern of local and global layers of ``shape``.
    """

    def __init__(self, shape: EncoderShape, config: ModelConfig, below: Embedding | None = None, first: int = 0):
        super().__init__()
        self.shape, self.config, self.first = shape, config, first
        self.checkpointing, self.keep_rng = config.activation_checkpointing, config.dropout > 0
        if below is not None:
            self.embedding = below
        kind: type[EncoderLayer] = BertLayer if shape.preset == "bert" else ModernLayer
        entries = [True] + [False] * (shape.own_layers - 1)
        self.layers = nn.ModuleList(kind(shape, config, place, entry) for place, entry in enumerate(entries, first))
        self.final_norm = norm(shape) if shape.preset == "modern" else nn.Identity()
        initialise(self, config.init_std)
        if shape.preset == "modern":
            self._scale_outputs()

    def _scale_outputs(self) -> None:
        # what each layer adds is scaled so that the sum keeps its size with depth, as in Megatron-LM and ModernBERT
        for name, parameter in self.named_parameters():
            if name.endswith(("attention_out.weight", "mlp_out.weight")):
                scale_initial(parameter, 1 / math.sqrt(2 * self.shape.num_layers))

    def run(
        self,
        x: Float[Tensor, "T D"],
        layout: Layout,
        layers: slice = slice(None),
        rows: Int64[Tensor, " N"] | None = None,
    ) -> Float[Tensor, "T D"]:
        """``x`` through the given ``layers``, and through the final norm if the last layer is among them.

        With ``rows``, only these tokens are updated: they attend to all tokens, and the others keep their input values.
        """
        depth = len(self.layers) * self.shape.num_layers // self.shape.own_layers
        numbers = range(*layers.indices(depth))
        turns = self._rotary(x, layout, numbers)
        shared = QueryKeyLayout(layout, rows)
        for number in numbers:
            rotary = turns.get(self.shape.theta(self.first + number))
            call = functools.partial(
                self.layers[self.shape.weights_of(number)],
                layout=shared,
                rotary=rotary,
            )
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(call, x, use_reentrant=False, preserve_rng_state=self.keep_rng)
            else:
                x = call(x)
        if depth - 1 not in numbers:
            return x
        return self.final_norm(x) if rows is None else x.index_copy(0, rows, self.final_norm(x.index_select(0, rows)))

    def _rotary(self, x: Tensor, layout: Layout, numbers: range) -> dict[float, Rotary]:
        if self.shape.preset == "bert":
            return {}
        width = self.shape.hidden_size // self.shape.num_heads
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        thetas = {self.shape.theta(self.first + number) for number in numbers}
        return {theta: rotary(layout, theta, width, dtype) for theta in thetas}


class Encoder(LayerStack):
    """The stack of layers with the embedding below it."""

    def __init__(self, shape: EncoderShape, config: ModelConfig | None = None):
        config = config or ModelConfig()
        super().__init__(shape, config, Embedding(shape, config))

    def embed(self, tokens: Int64[Tensor, " T"], layout: Layout) -> Float[Tensor, "T D"]:
        """The embeddings that enter the first layer."""
        return self.embedding(tokens, layout.positions)


class Embedding(nn.Module):
    """Token ids to vectors: the token table, in ``bert`` plus a learned position and token type 0, then a norm.

    If the tables have another width than the hidden states, a projection follows.
    """

    def __init__(self, shape: EncoderShape, config: ModelConfig):
        super().__init__()
        width = shape.table_width
        self.tokens = Table(shape.vocab_size, width)
        self.learned, self.offset = shape.preset == "bert", shape.position_offset
        self.has_types = self.learned and shape.token_types > 0
        if self.learned:
            self.positions = Table(shape.max_positions + self.offset, width)
        if self.has_types:
            self.token_types = Table(shape.token_types, width)
        self.norm = norm(shape, width)
        self.dropout = nn.Dropout(config.dropout)
        self.projection = nn.Identity() if shape.embedding_size is None else nn.Linear(width, shape.hidden_size)

    def forward(
        self, tokens: Int64[Tensor, " T"], positions: Tensor, vector: Float[Tensor, "1 E"] | None = None
    ) -> Float[Tensor, "T D"]:
        """The embeddings of ``tokens`` at ``positions``; ``vector``, if given, replaces each row of the token table."""
        x = self.tokens(tokens) if vector is None else vector.expand(len(tokens), -1)
        if self.has_types:
            x = x + self.token_types(positions.new_zeros(1))
        if self.learned:
            x = x + self.positions(positions + self.offset if self.offset else positions)
        return self.projection(self.dropout(self.norm(x)))


class QKV(nn.Linear):
    """Queries, keys and values of all tokens, from one parameter.

    With ``rows``, only these tokens have queries, which are a matrix product of their own.
    """

    def forward(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, ...]:  # type: ignore[override]
        if rows is None:
            return (super().forward(x),)
        sizes = (self.in_features, 2 * self.in_features)
        (q, kv), biases = self.weight.split(sizes), (None, None) if self.bias is None else self.bias.split(sizes)
        return F.linear(x.index_select(0, rows), q, biases[0]), F.linear(x, kv, biases[1])


class EncoderLayer(nn.Module):
    """Attention and a feed-forward block; subclasses define what comes before and after attention.

    The two sides have static shapes, and ``compile`` compiles them. Attention is not compiled: the number and lengths
    of the sequences change from pack to pack.
    """

    def __init__(self, shape: EncoderShape, config: ModelConfig, place: int, entry: bool):
        super().__init__()
        bert = shape.preset == "bert"
        width, inner = shape.hidden_size, shape.intermediate_size
        self.heads, self.backend, self.window = shape.num_heads, config.attention, shape.window(place)
        self.compile_sides = config.compile
        # ModernBERT's first layer has no norm here, because the embedding ends with one
        self.attention_norm = nn.Identity() if entry and not bert else norm(shape)
        self.width = width // shape.num_heads
        self.qkv = QKV(width, 3 * width, bias=bert)
        self.attention_out = nn.Linear(width, width, bias=bert)
        self.mlp_norm = norm(shape)
        self.mlp_in = nn.Linear(width, inner if bert else 2 * inner, bias=bert)
        self.mlp_out = nn.Linear(inner, width, bias=bert)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "T D"], layout: QueryKeyLayout, rotary: Rotary | None) -> Float[Tensor, "T D"]:
        """The output of the layer at the queries of ``layout``, and ``x`` at other tokens."""
        before, after = type(self).before, type(self).after
        if self.compile_sides:
            before, after = compiled(before), compiled(after)
        rows = layout.query_rows
        q, k, v = before(self, x, rotary, rows)
        dropout = self.dropout.p if self.training else 0.0
        attended = attend(q, k, v, layout, self.backend, window=self.window, dropout=dropout)
        if rows is None:
            return after(self, x, attended)
        return x.index_copy(0, rows, after(self, x.index_select(0, rows), attended))

    # Signatures from here on have no shapes: tests would check them with code that torch.compile cannot read.

    def _heads(self, x: Tensor) -> Tensor:
        """(N, n H E) -> (N, n, H, E), where n is how many of queries, keys and values there are."""
        return x.unflatten(1, (-1, self.heads, self.width))

    def before(self, x: Tensor, rotary: Rotary | None, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, H, E) of ``rows``, or of all tokens without them; keys and values (T, H, E) of all tokens."""
        raise NotImplementedError

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """The output of the layer for input ``x``."""
        raise NotImplementedError


class BertLayer(EncoderLayer):
    """Norm after each sum."""

    def __init__(self, shape: EncoderShape, config: ModelConfig, place: int, entry: bool):
        super().__init__(shape, config, place, entry)
        self.gelu = gelu_of(shape)

    def before(self, x, rotary, rows):
        return tuple(part for parts in self.qkv(x, rows) for part in self._heads(parts).unbind(1))

    def after(self, x, attended):
        x = self.attention_norm(x + self.dropout(self.attention_out(attended.flatten(1))))
        return self.mlp_norm(x + self.dropout(self.mlp_out(self.gelu(self.mlp_in(x)))))


class ModernLayer(EncoderLayer):
    """Norm at the entry of each branch, rotated queries and keys, a gated feed-forward block."""

    def before(self, x, rotary, rows):
        assert rotary is not None
        parts = [self._heads(part) for part in self.qkv(self.attention_norm(x), rows)]
        if rows is None:
            return rotate(parts[0], rotary, 2)
        own = tuple(part.index_select(0, rows) for part in rotary)
        return *rotate(parts[0], own, 1), *rotate(parts[1], rotary, 1)

    def after(self, x, attended):
        x = x + self.dropout(self.attention_out(attended.flatten(1)))
        value, gate = self.mlp_in(self.mlp_norm(x)).chunk(2, -1)
        return x + self.mlp_out(self.dropout(F.gelu(value) * gate))


def gelu_of(shape: EncoderShape) -> nn.GELU:
    """The activation function of ``shape``."""
    return nn.GELU("tanh" if shape.activation == "gelu_tanh" else "none")


def norm(shape: EncoderShape, width: int | None = None) -> LayerNorm:
    """A layer norm of hidden states, or of vectors of another ``width``; ModernBERT's have no bias."""
    return LayerNorm(width or shape.hidden_size, eps=shape.norm_eps, bias=shape.preset == "bert")


def rotary(layout: Layout, theta: float, width: int, dtype: torch.dtype) -> Rotary:
    """Cosines (T, 1, E) and sines (T, 1, E/2) of the angle of each pair at each token's position (Su et al. 2021).

    Pairs are (i, i + E/2), as in transformers. Angles are always computed in fp32, as in transformers: in 16 bits,
    different positions above 256 would have the same angle.
    """
    exponents = torch.arange(0, width, 2, device=layout.positions.device, dtype=torch.float32) / width
    angles = (layout.positions.float()[:, None] * (1.0 / theta**exponents))[:, None]
    return angles.cos().to(dtype).repeat(1, 1, 2), angles.sin().to(dtype)


def rotate(x: Tensor, turn: Rotary, count: int) -> tuple[Tensor, ...]:
    """The n parts of ``x`` (T, n, H, E), with rotated pairs in each head of the first ``count`` parts."""
    return _Rotate.apply(x, *turn, count)


class _Rotate(torch.autograd.Function):
    """Rotation whose backward pass rotates back and writes the gradients of all parts into one tensor."""

    @staticmethod
    def forward(ctx, x, cos, sin, count):
        ctx.save_for_backward(cos, sin)
        ctx.count = count
        return *(_turn(part, cos, sin, 1) for part in x[:, :count].unbind(1)), *x[:, count:].unbind(1)

    @staticmethod
    def backward(ctx, *upstream):
        cos, sin = ctx.saved_tensors
        turned = [_turn(part, cos, sin, -1) for part in upstream[: ctx.count]]
        return torch.stack((*turned, *upstream[ctx.count :]), 1), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    (first, second), turned = x.chunk(2, -1), x * cos
    one, other = turned.chunk(2, -1)
    one.addcmul_(second, sin, value=-sign)
    other.addcmul_(first, sin, value=sign)
    return turned


@functools.cache
def compiled(function: Callable) -> Callable:
    """``function`` compiled once for all layers: parameters are inputs of its graph, not constants in it."""
    # a graph for each kind of layer, length of the input (65 where [MASK] enters late and the masking rate moves), with
    # and without gradients
    private_api.allow_recompiles(1024)
    # PyTorch's compiler calls a function of PyTorch that is deprecated
    warnings.filterwarnings("ignore", message=r"`torch\._prims_common\.check` is deprecated", category=FutureWarning)
    return torch.compile(function, dynamic=False)
