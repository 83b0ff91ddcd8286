"""The memory of a planned run by ZeRO stage and offload: `memory` for its settings and a typical pack."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megamask.config.phases import most_phase_targets, run_phases
from megamask.config.pretrain_config import PretrainConfig
from megamask.doctor import memory
from megamask.doctor.memory import LayerSize, Lines, ModelSize, PackSize, Placement, StateMemory
from megamask.engine.ds_file import bucket_size, zero_stage
from megamask.engine.offloads import moment_buffers, offload_devices, weight_buffers
from megamask.engine.writers import MAX_WRITERS, WINDOW
from megamask.model.shape import EncoderShape
from megamask.runtime.cpu_memory import LARGE_MODEL

MOST_TOKENS = 2**21
"""The largest pack that is tried."""


@dataclass(frozen=True)
class TeacherSize:
    """A teacher's weights, the width of its states, the bytes of its numbers, and how its DeepSpeed file keeps it."""

    size: ModelSize
    width: int
    bytes: int
    place: Placement | None = None
    """None: whole on every device."""


@dataclass(frozen=True)
class PlannedMemory:
    """What the memory of a run depends on."""

    config: PretrainConfig
    shape: EncoderShape
    size: ModelSize
    pack: PackSize
    """Of a typical pack."""
    place: Placement
    """As the DeepSpeed file says."""
    gpu: bool
    bf16: bool
    """Whether matrix products are in bf16; weights too, unless they stay in fp32 under autocast, as at stage 0."""
    teacher: TeacherSize | None = None

    @property
    def packs_per_rank(self) -> int:
        """The most packs of a step on one rank."""
        return max(phase.per_step for phase in run_phases(self.config).phases) // self.place.ranks

    def layer(self, place: Placement) -> LayerSize:
        """The arithmetic of a layer at ``place``."""
        products_in_16 = place.bits16 or self.bf16
        dropout = self.config.model.dropout > 0
        attention: memory.Attention = "fused"
        if self.config.model.attention == "reference" or (products_in_16 and not self.gpu):
            attention = "products"
        elif products_in_16 and not dropout and self.config.model.attention != "padded":
            attention = "varlen"
        return LayerSize(
            width=self.shape.hidden_size,
            inner=self.shape.intermediate_size,
            heads=self.shape.num_heads,
            gated=self.shape.preset == "modern",
            attention=attention,
            bytes=2 if products_in_16 else 4,
            residual_bytes=2 if place.bits16 else 4,
            split_norms=place.bits16 and not self.gpu,
            dropout=dropout,
        )

    def with_tokens(self, tokens: int) -> PlannedMemory:
        """The run with packs of ``tokens`` of the same kind of text."""
        packs = replace(self.config.packs, tokens=tokens)
        share = tokens / self.pack.tokens
        # the reference computes the scores of all pairs of a pack
        of_scores = share**2 if self.config.model.attention == "reference" else share
        pack = PackSize(tokens, round(self.pack.cells * share), round(self.pack.scores * of_scores))
        return replace(self, config=replace(self.config, packs=packs), pack=pack)


def placement_of(ds: dict[str, Any], ranks: int, gpu: bool = True) -> Placement:
    """How a DeepSpeed file, with its `auto` resolved, keeps the state of a run, on GPUs or on a CPU."""
    zero, default = ds.get("zero_optimization", {}), Placement(zero_stage(ds), ranks, False)
    offloads = offload_devices(zero)
    weights_in_files = offloads["offload_param"] == "nvme"

    def stage_3(name: str, otherwise: int) -> int:
        return int(zero.get(f"stage3_{name}", zero.get(name, otherwise)))

    return replace(
        default,
        bits16=ds.get("bf16", {}).get("enabled") is True,
        offload_state=offloads["offload_optimizer"] != "none",
        offload_weights=offloads["offload_param"] != "none",
        moment_buffers=moment_buffers(zero),
        weight_buffers=weight_buffers(zero),
        weights_in_memory=zero["offload_param"].get("max_in_cpu", 1e9) if weights_in_files else math.inf,
        bucket=bucket_size(ds),
        overlap=bool(zero.get("overlap_comm")) and default.stage < 3,
        max_live=stage_3("max_live_parameters", default.max_live),
        prefetch_bucket=stage_3("prefetch_bucket_size", default.prefetch_bucket),
        sub_group=int(zero.get("sub_group_size", default.sub_group)),
        gpu=gpu,
    )


def placements(plan: PlannedMemory) -> list[Placement]:
    """The stages and offloads that the optimizer allows, that of the DeepSpeed file among them; in its precision."""
    listed = [*_placements(plan)]
    return listed if plan.place in listed else [*listed, plan.place]


def _placements(plan: PlannedMemory) -> Iterator[Placement]:
    kind, own = plan.config.optimizer.kind, plan.place
    bits16 = plan.bf16 and (own.bits16 or own.stage == 0)
    stages = {"lamb": [0], "muon": [1, 2, 3]}.get(kind, [0, 1, 2, 3])
    in_memory = replace(own, moment_buffers=0, weight_buffers=0.0, weights_in_memory=math.inf)
    for stage in stages:
        yield replace(
            in_memory, stage=stage, bits16=bits16 and stage > 0, offload_state=False, offload_weights=False,
            overlap=own.overlap and stage < 3,
        )  # fmt: skip
    if kind == "adamw":
        host = replace(in_memory, bits16=bits16, offload_state=True)
        yield replace(host, stage=2, offload_weights=False)
        yield replace(host, stage=3, offload_weights=True, overlap=False)


def fastest_placement(plan: PlannedMemory, limit: float) -> tuple[Placement, bool] | None:
    """The lowest stage that fits into ``limit`` bytes, and whether with activation checkpointing; None: none does.

    The lowest stage communicates least, so it is the fastest; except stage 0 in bf16, which casts fp32 weights in each
    pass.
    """
    listed = sorted(placements(plan), key=lambda place: (place.offload_weights, place.offload_state, place.stage))
    if plan.bf16 and len(listed) > 1:
        listed = [place for place in listed if place.stage > 0]
    for checkpointing in (False, True):
        for place in listed:
            if peak_memory(plan, place, checkpointing) <= limit:
                return place, checkpointing
    return None


def activations(plan: PlannedMemory, place: Placement, checkpointing: bool) -> float:
    """Bytes that autograd saves for the backward pass of all layers and of the embedding.

    With ``checkpointing``: the inputs of the layers, and what is saved of the one that is computed again.
    """
    layer, residual = plan.layer(place), plan.layer(place).residual_bytes
    by_layer = [
        (memory.layer_activations(layer, pack, entry=number == 0), residual * pack.tokens * layer.width)
        for number, pack in enumerate(_packs_of_layers(plan))
    ]
    outside = memory.outside_layers(layer, plan.pack)
    if checkpointing:
        return outside + sum(kept for _, kept in by_layer) + max(whole for whole, _ in by_layer)
    return outside + sum(whole for whole, _ in by_layer)


def _packs_of_layers(plan: PlannedMemory) -> list[PackSize]:
    """What each layer computes: where [MASK] enters late, the layers before that have the visible tokens only."""
    config = plan.config
    layers = plan.shape.num_layers
    if not config.objective.late:
        return [plan.pack] * layers
    hidden = config.masking.ratio.lowest * config.masking.corruption.mask
    visible = plan.pack.scaled(1 - hidden)
    if config.objective.kind == "mae_lm":
        return [visible] * layers + [plan.pack] * config.objective.decoder.layers
    depth = config.objective.depth or 0
    return [visible] * depth + [plan.pack] * (layers - depth)


def peak_memory(plan: PlannedMemory, place: Placement, checkpointing: bool) -> float:
    """The most bytes on one device: in a training step or, with a large token table, at the start."""
    return max(math.fsum(device_lines(plan, place, checkpointing).values()), startup_memory(plan, place))


def startup_memory(plan: PlannedMemory, place: Placement) -> float:
    """Bytes on one device while the engine is built: its state, and one tensor as a value and as a parameter."""
    state = state_memory_of(plan, place).device
    built = math.fsum(value for name, value in state.items() if name != "gradients" or place.stage == 3)
    return built + 8.0 * plan.size.largest + (0.0 if plan.gpu else memory.LIBRARIES)


def device_lines(plan: PlannedMemory, place: Placement, checkpointing: bool) -> Lines:
    """Bytes on one device in a training step, by line."""
    config, layer = plan.config, plan.layer(place)
    targets = most_phase_targets(config)
    with_teacher = config.distill.active
    rows = targets + (config.packs.tokens if with_teacher and config.distill.positions == "all" else 0)
    lines = dict(state_memory_of(plan, place).device)
    if not plan.gpu:
        lines["Python and libraries"] = memory.LIBRARIES
    if config.entropy.ema_decay is not None:
        lines["moving average"] = 4.0 * plan.size.weights
    if plan.teacher is not None:
        lines["teacher"] = _teacher_bytes(plan, plan.teacher)
    transient = memory.transient_memory(plan.size, place, plan.packs_per_rank)
    if plan.bf16 and not place.bits16:
        transient["weights in bf16 (autocast)"] = 2.0 * plan.size.weights
    compute = {
        "activations": activations(plan, place, checkpointing),
        "head and loss": memory.head_activations(layer, rows, plan.shape.table_width)
        + memory.loss_chunk(layer, rows, plan.shape.vocab_size, plan.shape.table_width, teacher=with_teacher),
        "backward pass": memory.backward_working_set(layer, plan.pack),
    }
    copies = memory.optimizer_copies(plan.size, place)
    small = plan.size.weights < LARGE_MODEL
    if plan.gpu or not small:  # they take the memory that the backward pass freed
        freed = compute | (memory.gathered_weights(plan.size, place) if place.stage == 3 else {})
        copies = max(0.0, copies - sum(freed.values()))
    transient |= compute | {"copies for the optimizer": copies}
    lines |= transient
    if not plan.gpu and place.stage > 0 and small:
        share = memory.GAPS_WITH_OFFLOAD if place.offload_state and place.offload_weights else memory.GAPS
        lines["gaps of the heap"] = share * sum(transient.values())
    return lines


def _teacher_bytes(plan: PlannedMemory, teacher: TeacherSize) -> float:
    """A teacher's weights on one device, what a pass of it gathers, and its states for all packs of a step."""
    distill, packs, place = plan.config.distill, plan.config.packs, teacher.place
    weights = float(teacher.size.weights * teacher.bytes)
    if place is not None:
        gathered = math.fsum(memory.gathered_weights(teacher.size, place).values())
        share = weights / place.ranks - _teacher_on_host(plan)
        # the output matrix is whole on every rank
        weights = share + plan.shape.vocab_size * teacher.width * teacher.bytes + gathered
    if not distill.active or distill.stored is not None:
        return weights
    rows = packs.tokens if distill.positions == "all" else most_phase_targets(plan.config)
    return weights + rows * teacher.width * teacher.bytes * plan.packs_per_rank


def _teacher_on_host(plan: PlannedMemory) -> float:
    """Bytes of a rank's share of a teacher that is offloaded from a GPU to its host; 0 if it is not."""
    teacher = plan.teacher
    if not plan.gpu or teacher is None or teacher.place is None or not teacher.place.offload_weights:
        return 0.0
    return teacher.size.weights * teacher.bytes / teacher.place.ranks


def entropy_pass(plan: PlannedMemory, place: Placement) -> float:
    """Bytes of the pass that finds entropies, before a step, while its activations do not exist yet; 0 without one."""
    if not {"exact", "teacher"}.intersection(plan.config.entropy.kinds):
        return 0.0
    layer = plan.layer(place)
    states = layer.bytes * plan.pack.tokens * layer.width
    return memory.forward_working_set(layer, plan.pack) + states + 2**22 * (layer.bytes + 4.0)


def state_memory_of(plan: PlannedMemory, place: Placement) -> StateMemory:
    """Weights, gradients and moments at ``place``."""
    return memory.state_memory(plan.size, place)


def host_peaks(plan: PlannedMemory, place: Placement) -> Lines:
    """Bytes of one rank in the memory of its host, at three times; without libraries and the text.

    On a CPU the state is counted as memory of the device, so these bytes are added to it.
    """
    weights = plan.size.weights
    steady = sum(state_memory_of(plan, place).host.values()) + _teacher_on_host(plan)
    moments = 8.0 * (weights - plan.size.muon) + 4.0 * plan.size.muon
    copy = (4.0 * weights + moments) / min(place.ranks, MAX_WRITERS)
    window = min(copy, WINDOW + 4.0 * plan.size.largest)
    background = plan.config.checkpoint.background
    return {
        # the value of one tensor
        "start": steady + (4.0 * plan.size.largest if plan.gpu else 0.0),
        "training": steady + (copy if background else 0.0),
        "save": steady + (copy if background else window),
    }


def largest_pack(plan: PlannedMemory, place: Placement, checkpointing: bool, limit: float) -> int:
    """The largest `packs.tokens` in steps of `packs.length` whose step fits into ``limit`` bytes; 0: none does."""
    length = plan.config.packs.length

    def fits(count: int) -> bool:
        return peak_memory(plan.with_tokens(count * length), place, checkpointing) <= limit

    low, high = 0, MOST_TOKENS // length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * length
