"""The memory of a training step on one device and on its host, by line: arithmetic on a few numbers, without torch.

Weights, gradients and moments are those that DeepSpeed 0.19 keeps (Rajbhandari et al. 2020, section 3), in fp32 without
masters, which are the weights then (`private_api.share_memory`). Activations are counted layer by layer: what autograd
saves for the backward pass of a layer (as Korthikanti et al. 2022, section 4.1, count it for GPT, here for our two
kinds of layer). Tests compare the state with the measured tensors of an engine, and the activations with what autograd
saves.

Not counted: the context of CUDA, the buffers of NCCL, and memory that the allocator cannot use (`RESERVE` is kept free
for them). Tensors that never exist at the same time are counted as if they did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

RESERVE = 0.08
"""Share of a device's memory that must stay free. An assumption."""
LIBRARIES = 5.6e8
"""Resident bytes of a process on a CPU that trains a model of almost no size: Python, torch, DeepSpeed, and what a
first step loads. Measured: 0.51 GB at stage 0, 0.56 GB at stages 1 to 3."""
GAPS, GAPS_WITH_OFFLOAD = 0.5, 1.0
"""What the heap of a process on a CPU keeps at stages 1 to 3 between blocks in use, below `LARGE_MODEL` weights, as a
share of the memory that only a step needs; more if state and weights are offloaded. Measured: 0.1 to 1.2."""
ALL_REDUCED = 500_000_000
"""Gradients that DeepSpeed copies into one message at stage 0, in elements."""
BLOCK = 2**25
"""Logits of one product of the loss, `model.cross_entropy_and_kl.BLOCK`."""
Lines = dict[str, float]
"""Bytes by what they are for."""


@dataclass(frozen=True)
class ModelSize:
    """Counts of a model's weights: all, those that Muon trains, and those of the largest tensor."""

    weights: int
    muon: int
    largest: int


@dataclass(frozen=True)
class Placement:
    """How DeepSpeed keeps the state of a run."""

    stage: int
    ranks: int
    bits16: bool
    """Weights and gradients in bf16, with masters in fp32."""
    offload_state: bool = False
    offload_weights: bool = False
    bucket: int = 500_000_000
    """`reduce_bucket_size`, in elements."""
    overlap: bool = False
    max_live: int = 1_000_000_000
    """`stage3_max_live_parameters`."""
    prefetch_bucket: int = 50_000_000
    """`stage3_prefetch_bucket_size`, in elements."""
    sub_group: int = 1_000_000_000
    """`sub_group_size`: weights that the optimizer moves at once at stage 3."""
    moment_buffers: int = 0
    """Buffers, each of the largest flat partition, between masters and moments and their files; 0: they are in memory.
    """
    weight_buffers: float = 0.0
    """Elements of the buffers between weights and their files; 0: they are in memory."""
    weights_in_memory: float = math.inf
    """`max_in_cpu`: the most weights of a rank that are in memory although they could be in files."""
    gpu: bool = True
    """Whether the memory of the device is not that of its host."""

    @property
    def name(self) -> str:
        """The stage and what is offloaded, as words."""
        places = {
            "moments": ("in files" if self.moment_buffers else "on the host") if self.offload_state else "",
            "weights": ("in files" if self.weight_buffers else "on the host") if self.offload_weights else "",
        }
        if len({*places.values()} - {""}) == 1:  # together
            places = {" and ".join(what for what, where in places.items() if where): max(places.values())}
        return ", ".join([f"ZeRO {self.stage}", *(f"{what} {where}" for what, where in places.items() if where)])


@dataclass(frozen=True)
class StateMemory:
    """Bytes of weights, gradients and moments on a device, and what one rank keeps on its host; on a CPU all is the
    device's."""

    device: Lines
    host: Lines


def state_memory(size: ModelSize, place: Placement) -> StateMemory:
    """The memory of the state of a run, for one rank, when its gradients are complete."""
    width, share = (2 if place.bits16 else 4), 1 / place.ranks
    moments = 8.0 * (size.weights - size.muon) + 4.0 * size.muon
    if place.stage == 0:
        device = {"weights": 4.0 * size.weights, "gradients": 4.0 * size.weights, "moments": moments}
        return StateMemory(device, {})
    gradients = width * size.weights * (share if place.stage > 1 else 1.0)
    sharded = place.stage == 3
    moved = place.offload_state and place.gpu and not (sharded and place.offload_weights)
    optimizer = {"fp32 masters": 4.0 * size.weights * share} if place.bits16 or moved else {}
    optimizer["moments"] = moments * share
    if place.moment_buffers:
        partition = min(place.sub_group, size.weights * share)
        optimizer = {"buffers of moments in files": 4.0 * place.moment_buffers * partition}
    if size.muon:
        optimizer["Muon's gradients in fp32"] = 4.0 * size.muon * share
    if size.muon and not sharded:
        gradients = float(width * size.weights)  # DeepSpeed keeps them whole for Muon, at stage 2 too
        # of every tensor that touches its partition a rank keeps the whole momentum
        optimizer["moments"] += 4.0 * size.largest if place.ranks > 1 else 0.0
    device, host = Lines(), Lines()
    weights = width * size.weights * (share if sharded else 1.0)
    if sharded and place.offload_weights:
        host["weights"] = min(weights, width * place.weights_in_memory)
        if place.weight_buffers:
            host["buffers of weights in files"] = width * place.weight_buffers
    else:
        device["weights"] = weights
    if place.offload_state:
        host |= optimizer
        host["gradients in fp32"] = 4.0 * size.weights * share
        if sharded and place.bits16:
            host["gradients"] = gradients
        if place.stage == 2:
            host["copy of the weights to send"] = width * size.weights * share
            host["copy of a gradient"] = device["copy of a gradient"] = float(width * size.largest)
        if place.stage == 1:
            device["gradients"] = gradients
    else:
        device["gradients"] = gradients
        device |= optimizer
    if sharded:
        device["bucket"] = width * float(min(place.bucket, size.weights))
    if place.gpu:
        return StateMemory(device, host)
    return StateMemory({name: device.get(name, 0.0) + host.get(name, 0.0) for name in device | host}, {})


def gathered_weights(size: ModelSize, place: Placement) -> Lines:
    """Bytes of the weights that stage 3 gathers for a pass, and of the message that gathers them."""
    width, lines = (2 if place.bits16 else 4), Lines()
    if place.gpu or place.ranks > 1:  # else a rank uses its partitions where they are
        lines["gathered weights"] = width * float(min(size.weights, max(place.max_live, size.largest)))
    if place.ranks > 1:
        lines["message of gathered weights"] = width * float(
            min(size.weights, max(place.prefetch_bucket, size.largest))
        )
    return lines


def transient_memory(size: ModelSize, place: Placement, packs: int) -> Lines:
    """What DeepSpeed needs on a device for a part of a step only: gathered weights, messages, copies of gradients.

    ``packs`` is the number of packs of a step on a rank.
    """
    width, share = (2 if place.bits16 and place.stage else 4), 1 / place.ranks
    lines = Lines()
    if place.stage in (1, 2):
        bucket = min(place.bucket, size.weights)
        # a second one has no memory on a CPU where nothing was written to it
        second = (bucket if place.gpu else size.weights - bucket) if place.overlap else 0
        lines["buckets"] = width * float(bucket + min(bucket, second))
    if place.stage == 3:
        lines |= gathered_weights(size, place)
        lines["partitions of a bucket"] = width * float(min(place.bucket, size.weights))
    if place.stage == 2 and packs > 1 and not place.offload_state:
        lines["gradients of the packs before"] = width * size.weights * share
    return lines


def optimizer_copies(size: ModelSize, place: Placement) -> float:
    """Bytes of the copies of gradients that DeepSpeed makes after the last backward pass of a step.

    At stage 0 they are copied into one message; above, those of a rank into one tensor, and that into fp32.
    """
    if place.stage == 0:
        return 4.0 * min(size.weights, ALL_REDUCED)
    if place.offload_state:
        return 0.0
    elements = size.weights / place.ranks
    if place.stage == 3:
        elements = min(elements, place.sub_group)
    copies = elements * (6 if place.bits16 else 4)
    if place.stage == 1 and not size.muon:  # before, DeepSpeed frees the gradients of other ranks
        copies -= (2 if place.bits16 else 4) * (size.weights - elements)
    return max(0.0, copies)


Attention = Literal["varlen", "fused", "products"]
"""How attention is computed: torch's variable-length kernel; its fused kernel on padded grids; products around a
softmax on padded grids."""


@dataclass(frozen=True)
class LayerSize:
    """What the activations of a layer depend on: its sizes and the precision of its arithmetic."""

    width: int
    inner: int
    heads: int
    gated: bool
    """`modern`: gated feed-forward blocks, norms at the entry of each branch, rotated queries and keys."""
    attention: Attention
    bytes: int
    """Of an element in matrix products."""
    residual_bytes: int
    """Of an element between layers; under autocast these stay in fp32."""
    split_norms: bool = False
    """Whether norms save their normalised input too, as in bf16 on a CPU."""
    dropout: bool = False


@dataclass(frozen=True)
class PackSize:
    """The numbers of a pack: tokens, cells of its padded grids, and scores (query x key, over all sequences)."""

    tokens: int
    cells: int
    scores: int

    @property
    def dense(self) -> bool:
        """Whether all sequences have the same length, so that a grid is a view of the pack."""
        return self.cells == self.tokens

    def scaled(self, share: float) -> PackSize:
        """The numbers if a ``share`` of the tokens of each sequence is left."""
        return PackSize(round(self.tokens * share), round(self.cells * share), round(self.scores * share**2))


def layer_activations(layer: LayerSize, pack: PackSize, *, entry: bool = False) -> float:
    """Bytes that autograd saves for the backward pass of a layer.

    ``entry``: the first layer of `modern`, which begins without a norm.
    """
    tokens, width, inner = pack.tokens, layer.width, layer.inner
    norms = 1 if entry and layer.gated else 2
    # the input of each norm (`bert` normalises sums) and its output, which is the input of a product
    residual, saved = float(norms * tokens * width), 2.0 * tokens * width
    saved += norms * tokens * width if layer.split_norms else 0
    if layer.gated:
        saved += 4 * tokens * inner  # both halves, the activated one, and their product
    else:
        saved += 2 * tokens * inner
    saved += _attention(layer, pack)
    statistics = 8.0 * norms * tokens
    masks = (tokens * (width + inner if layer.gated else 2 * width)) if layer.dropout else 0
    return layer.residual_bytes * residual + layer.bytes * saved + statistics + masks


def outside_layers(layer: LayerSize, pack: PackSize) -> float:
    """Bytes that autograd saves for the norm of the embedding; in `modern` also for the norm after the last layer, and
    the cosines and sines of the positions."""
    row = float(pack.tokens * layer.width * (layer.residual_bytes + (layer.bytes if layer.split_norms else 0)))
    if not layer.gated:
        return row
    return 2 * row + 1.5 * layer.bytes * layer.width / layer.heads * pack.tokens


def _attention(layer: LayerSize, pack: PackSize) -> float:
    """Elements saved for attention: queries, keys, values, the weights or their sums, and the input of the product."""
    tokens, width = pack.tokens, layer.width
    if layer.attention == "products":
        copies = 3 if pack.dense else 6  # a grid of one sequence keeps the cells of all grids in memory
        return (copies * pack.cells + tokens) * width + layer.heads * pack.scores
    sums = 4 / layer.bytes * layer.heads  # log-sum-exp in fp32
    if layer.attention == "varlen":
        return (4 * width + sums) * tokens
    if pack.dense:
        # values are a view of the product of queries, keys and values
        return ((6 if layer.gated else 4) * width + sums) * tokens
    return (4 * width + sums) * pack.cells + tokens * width


def backward_working_set(layer: LayerSize, pack: PackSize) -> float:
    """Bytes of the gradients of activations that exist at once in the backward pass of a layer; estimated."""
    return float(layer.bytes * pack.tokens * ((5 if layer.gated else 3) * layer.inner + 3 * layer.width))


def forward_working_set(layer: LayerSize, pack: PackSize) -> float:
    """Bytes of the activations that exist at once in a pass without gradients; estimated."""
    return float(layer.bytes * pack.tokens * ((3 if layer.gated else 2) * layer.inner + 3 * layer.width))


def head_activations(layer: LayerSize, targets: int, table_width: int) -> float:
    """Bytes that autograd saves for the head at ``targets`` tokens: its inputs, and the gradient of its output."""
    saved = targets * (layer.width + 3 * table_width) + (targets * table_width if layer.split_norms else 0)
    return float(layer.bytes * saved + 8 * targets)


def loss_chunk(layer: LayerSize, targets: int, vocab: int, table_width: int, *, teacher: bool = False) -> float:
    """Bytes of the logits that exist at once, and of the gradient of the output matrix.

    A block of logits in the precision of products, and in fp32 logits, probabilities and one more; with a ``teacher``
    its logits and probabilities too.
    """
    block = float(min(BLOCK, targets * vocab))
    blocks = -(-targets * vocab // BLOCK)
    gradient = vocab * table_width * (layer.bytes + (8 if blocks > 1 else 0))
    return block * (layer.bytes + 12 + (layer.bytes + 8 if teacher else 0)) + gradient
