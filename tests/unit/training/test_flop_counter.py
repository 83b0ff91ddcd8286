"""Tokens and FLOPs of a run: one case by hand, and the same sums however they are divided."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from megamask.batch import TokenIds
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.recipes import find_recipe
from megamask.entropy import probe
from megamask.entropy.settings import AuditConfig, EntropyConfig
from megamask.hf.masked_lm import HFMaskedLM
from megamask.masking.masker import Masker
from megamask.masking.settings import Corruption, MaskingConfig
from megamask.model.shape import EncoderShape
from megamask.schedules import Schedule
from megamask.teacher.settings import DistillConfig
from megamask.training import flops
from megamask.training.flop_counter import UNIT, FlopCounter, teacher_flops
from megamask.training.flops import ForwardFlops, PackFlops, forward_flops
from tests.batches import pack

IDS = TokenIds(1000, 0, 1, 2, 3, (0, 1, 2, 3))
SHAPE = EncoderShape("bert", 1000, 0, 2, 64, 1, 256, 64, 1e-12)
ALWAYS = MaskingConfig(Schedule(start=0.25), score="entropy", random_share=Schedule(start=0.0))
EXACT = replace(PretrainConfig(), masking=ALWAYS, entropy=EntropyConfig("exact", signal="clean"))


def count(
    config: PretrainConfig, source: str, *, with_teacher: bool = False, teacher: ForwardFlops | None = None
) -> dict:
    """The metrics after one step with a pack of two sequences of 10 and 6 tokens."""
    counter = FlopCounter(PackFlops.of(config, SHAPE, teacher))
    counter.count_step(0, [pack([10, 6])], 0.0, Masker(config.masking, IDS), source, with_teacher)
    return counter.metrics()


def test_one_step_by_hand() -> None:
    """4 of 16 tokens are targets; a layer has 4 D^2 weights of attention and 2 D 4D of the feed-forward block."""
    per_token = 2 * 2 * (4 * 64**2 + 2 * 64 * 256)  # two FLOPs a weight, two layers
    attention = 2 * 4 * 64 * (10**2 + 6**2)  # scores and weighted sums
    head = 2 * (64 * 64 + 64 * 1000)  # a dense layer, then the vocabulary
    student = 3 * (16 * per_token + attention + 4 * head)
    scoring = 16 * per_token + attention + 16 * head  # a forward pass, with the head at every token
    teacher = 16 * per_token + attention + 4 * head
    distill = replace(EXACT, distill=DistillConfig(weight=Schedule(start=0.5)))
    metrics = count(distill, "exact", with_teacher=True, teacher=forward_flops(SHAPE))
    assert metrics["total/tokens"] == 16
    expected = {"flops/student": student, "flops/scoring": scoring, "flops/teacher": teacher}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=UNIT / 2)


def test_a_run_without_entropies_and_teacher_counts_only_the_student() -> None:
    metrics = count(replace(PretrainConfig(), masking=replace(ALWAYS, score="uniform")), "")
    assert metrics["flops/scoring"] == metrics["flops/teacher"] == 0 < metrics["flops/student"]


def test_packs_with_the_same_text_share_a_scoring_pass() -> None:
    views = [replace(pack([10, 6]), number=number, source_pack=0) for number in range(3)]
    sums = []
    for batches in (views[:1], views):
        counter = FlopCounter(PackFlops.of(EXACT, SHAPE))
        counter.count_step(0, batches, 0.0, Masker(ALWAYS, IDS), "exact", False)
        sums.append(counter.metrics())
    assert sums[1]["flops/scoring"] == sums[0]["flops/scoring"] > 0
    assert sums[1]["flops/student"] == 3 * sums[0]["flops/student"]


def test_an_audit_of_the_masked_signal_costs_twice_its_passes() -> None:
    entropy = EntropyConfig("frequency", num_passes=4, audit=AuditConfig(every=1))
    counter = FlopCounter(PackFlops.of(replace(EXACT, entropy=entropy), SHAPE))
    counter.count_audit(pack([16]), "frequency")
    once = forward_flops(SHAPE).forward(16, 16**2, 4, 4)
    assert counter.metrics()["flops/scoring"] == pytest.approx(2 * 4 * once, abs=UNIT / 2)


def test_sums_do_not_depend_on_when_they_are_read_or_where_the_run_resumes() -> None:
    config = find_recipe("entropy-self-probe-tiny")
    masker, packs = Masker(config.masking, IDS), [pack([5, n]) for n in range(3, 15)]

    def counted(readings: set[int], resume: int = -1) -> dict[str, float]:
        counter = FlopCounter(PackFlops.of(config, SHAPE))
        for step, batch in enumerate(packs):
            counter.count_step(step, [batch], step / len(packs), masker, "probe", False)
            if step in readings:
                counter.metrics()
            if step == resume:
                counter = FlopCounter(PackFlops.of(config, SHAPE), counter.state())
        return counter.metrics()

    assert counted(set()) == counted({0, 1, 7}) == counted({3}, resume=6)


def test_late_masks_and_a_decoder_change_the_student() -> None:
    sizes = {"tokens": 100.0, "pairs": 1000.0, "targets": 50}
    costs = {
        name: PackFlops.of(find_recipe(name), SHAPE).student(**sizes, with_teacher=False)
        for name in ("random-tiny", "three-ml-tiny", "mae-lm-tiny")
    }
    assert costs["three-ml-tiny"] < costs["random-tiny"]
    assert len(set(costs.values())) == 3


def test_the_constants_are_those_of_the_probe() -> None:
    assert flops.PROBE == (probe.WIDTH, 2 * probe.REACH + 1)
    assert flops.PROBE_LEARNS == (probe.EAGER, probe.EVERY)


def test_the_teacher_of_another_library_costs_what_ours_does() -> None:
    """Transformers applies the dense layer of the head at every token, ours at the targets."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256, "vocab_size": 1000}
    model = BertForMaskedLM(BertConfig(**sizes, num_attention_heads=1))
    output = model.cls.predictions.decoder
    weight, model.cls.predictions.decoder = output.weight.detach(), torch.nn.Identity()
    foreign, ours = teacher_flops(HFMaskedLM(model, 0), weight), forward_flops(SHAPE)
    assert foreign.pair == ours.pair
    assert foreign.token == ours.token + 2 * 64**2
    assert foreign.target == ours.target - 2 * 64**2


def test_corruption_decides_how_many_tokens_enter_late() -> None:
    recipe = find_recipe("three-ml-tiny")
    configs = [
        replace(recipe, masking=replace(recipe.masking, corruption=corruption))
        for corruption in (Corruption(1.0, 0.0, 0.0), Corruption(0.8, 0.1, 0.1))
    ]
    costs = [PackFlops.of(each, SHAPE).student(100.0, 1000.0, 50, with_teacher=False) for each in configs]
    assert costs[0] < costs[1]  # a target that is not [MASK] passes through all layers
