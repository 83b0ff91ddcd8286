"""Counted activations against what autograd saves, and relations between placements."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megamask.doctor import memory
from megamask.doctor.memory import LayerSize, ModelSize, PackSize, Placement
from megamask.model.padded_grids import PaddedGrids
from megamask.runtime.precision import device_support
from tests.batches import pack
from tests.unit.model.models import PRESETS, objective, plan

EQUAL, MIXED = [32] * 16, [60, 50, 33, 20, 64, 10, 64, 64, 40, 61, 12, 34]
MEASURED = ModelSize(weights=455_649, muon=425_984, largest=98_304)
"""The model whose engine was measured."""
BYTES_PER_WEIGHT = [
    ("adamw", 1, False, False, 8.00), ("adamw", 1, True, False, 8.00), ("adamw", 2, False, False, 8.00),
    ("adamw", 2, True, False, 8.00), ("adamw", 3, False, False, 8.88), ("adamw", 3, True, False, 8.44),
    ("muon", 1, False, False, 6.42), ("muon", 2, True, False, 6.42),
    ("adamw", 2, False, True, 13.73), ("adamw", 2, True, True, 11.86), ("adamw", 3, False, True, 8.88),
    ("adamw", 3, True, True, 10.44),
]  # fmt: skip
"""Optimizer, stage, bf16, offload, and the bytes of all tensors of the engine before its first step, over the number of
weights.

Measured on two ranks with DeepSpeed 0.19.8, `reduce_bucket_size` 100,000: every storage of a tensor that lives after
`Engine(...)` and not before. Stage 3 has its buffers for gradients by then, stages 1 and 2 make them in a step. With an
offload, the moments are on the host, at stage 3 also the weights; on a CPU both are one memory."""
SIZE = ModelSize(weights=1000, muon=0, largest=100)


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """The bytes of the tensors that autograd saves in ``forward``, each storage once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        kept = forward()
    assert kept is not None
    return sum(t.untyped_storage().nbytes() for at, t in storages.items() if at not in weights)


def pack_size(lengths: list[int]) -> PackSize:
    grids = PaddedGrids.by_length(pack(lengths).layout).grids
    scores = sum(grid.index.shape[0] * grid.index.shape[1] ** 2 for grid in grids)
    return PackSize(sum(lengths), sum(grid.index.numel() for grid in grids), scores)


@pytest.mark.parametrize("lengths", [EQUAL, MIXED], ids=["equal", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_activations_are_what_autograd_saves_within_a_tenth(preset, dtype, lengths) -> None:
    if dtype == torch.bfloat16 and not device_support(torch.device("cpu")).bf16:
        pytest.skip("attention is in fp32 on this CPU")
    model = objective(preset, dtype=dtype, num_layers=4, hidden_size=64, num_heads=2)
    batch, shape, narrow = pack(lengths), model.encoder.shape, dtype == torch.bfloat16
    targets = plan(batch)
    layer = LayerSize(
        shape.hidden_size, shape.intermediate_size, shape.num_heads, preset == "modern",
        "products" if narrow else "fused", dtype.itemsize, dtype.itemsize, split_norms=narrow,
    )  # fmt: skip
    size = pack_size(lengths)
    counted = memory.head_activations(layer, len(targets.targets), shape.table_width)
    counted += memory.outside_layers(layer, size)
    counted += sum(memory.layer_activations(layer, size, entry=number == 0) for number in range(shape.num_layers))
    assert counted == pytest.approx(saved_bytes(model, lambda: model(batch, targets, None)), rel=0.1)


def test_a_higher_stage_keeps_no_more_and_one_more_rank_less() -> None:
    def state(stage: int, ranks: int, bits16: bool) -> float:
        place = Placement(stage, ranks, bits16, bucket=0, max_live=0)
        return sum(memory.state_memory(SIZE, place).device.values())

    for bits16, ranks in itertools.product((False, True), (2, 8)):
        sums = [state(stage, ranks, bits16) for stage in (1, 2)]
        assert sums[0] > sums[1]
        assert all(state(stage, ranks, bits16) > state(stage, ranks + 1, bits16) for stage in (1, 2, 3))


def test_offloading_moves_bytes_and_drops_none() -> None:
    for stage in (2, 3):
        plain = Placement(stage, 4, True, bucket=0)
        moved = replace(plain, offload_state=True, offload_weights=stage == 3)
        before, after = memory.state_memory(SIZE, plain), memory.state_memory(SIZE, moved)
        assert not before.host
        for name in ("fp32 masters", "moments"):
            assert after.host[name] == before.device[name]
            assert name not in after.device


def test_a_step_holds_messages_and_copies_of_what_its_stage_partitions() -> None:
    def passing(stage: int, ranks: int, packs: int = 1, bucket: int = 400) -> dict[str, float]:
        return memory.transient_memory(SIZE, Placement(stage, ranks, True, bucket=bucket, gpu=False), packs)

    assert passing(0, 4) == {}
    assert passing(1, 4) == {"buckets": 2 * 400}
    assert passing(2, 4, packs=2) == {"buckets": 2 * 400, "gradients of the packs before": 2 * 250}
    assert passing(1, 4, bucket=10**9) == {"buckets": 2 * 1000}  # no more than the model has
    assert "message of gathered weights" in passing(3, 4) and "gathered weights" not in passing(3, 1)


def test_muon_keeps_one_moment_of_its_weights() -> None:
    one = Placement(1, 1, True, bucket=0)
    moments = [memory.state_memory(ModelSize(1000, muon, 100), one).device["moments"] for muon in (0, 600)]
    assert moments[0] - moments[1] == 4 * 600


@pytest.mark.parametrize(("kind", "stage", "bits16", "offload", "measured"), BYTES_PER_WEIGHT)
def test_the_state_is_that_of_a_real_engine(
    kind: str, stage: int, bits16: bool, offload: bool, measured: float
) -> None:
    size = MEASURED if kind == "muon" else replace(MEASURED, muon=0)
    place = Placement(
        stage, 2, bits16, offload_state=offload, offload_weights=offload and stage == 3, bucket=100_000, gpu=False
    )
    lines = memory.state_memory(size, place).device
    later = {"gradients", "Muon's gradients in fp32"} if stage < 3 else set()
    counted = sum(value for name, value in lines.items() if name not in later) / size.weights
    # under Muon a partition touches whole tensors: at most one tensor more than its share
    spare = 4 * size.largest / size.weights if size.muon else 0.0
    assert measured - 0.01 <= counted <= measured + 0.01 + spare
