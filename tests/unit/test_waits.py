"""A step never waits for the device before the one place where it must: no masks, losses, gradients or metrics do."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from megamask.batch import Losses, MaskPlan, PackedBatch
from megamask.config.pretrain_config import PretrainConfig
from megamask.engine.engine import Measured
from megamask.entropy.exact import Exact
from megamask.entropy.frequency import Frequency
from megamask.entropy.probe import Probe
from megamask.health.loss_spikes import SpikePolicy
from megamask.health.settings import SpikesConfig
from megamask.masking.masker import Masker
from megamask.masking.rng import PackRng
from megamask.masking.settings import EntropyScoreConfig, MaskingConfig
from megamask.metrics.mask_metrics import MaskMetrics
from megamask.metrics.meters import Meters
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import Backend, ModelConfig
from megamask.objectives.objective import build_objective
from megamask.objectives.settings import DecoderConfig, ObjectiveConfig
from megamask.runtime import private_api, ranks
from megamask.schedules import Schedule
from megamask.training.entropy_sources import EntropySources
from megamask.training.flop_counter import FlopCounter
from megamask.training.flops import PackFlops
from megamask.training.step import Trainer, take_step
from tests.batches import IDS, pack
from tests.stand_in import DEVICE, Copies, stand_in

TAGS = ("noun", "verb", "other")
SCORES = {
    "uniform": {},
    "entropy": {},
    "top": {"entropy": EntropyScoreConfig(temperature=0.0)},
    "ranks": {"entropy": EntropyScoreConfig("both", skip_top=0.1)},
    "shuffled": {"entropy": EntropyScoreConfig("proportional", shuffle="type")},
    "moving": {"entropy": EntropyScoreConfig(effective_sample_size=0.7), "correction": 1.0},
    "part_of_speech": {},
    "token_type": {},
}
OBJECTIVES = {
    "mlm": ObjectiveConfig(),
    "three_ml": ObjectiveConfig("three_ml", depth=1, mask_vector="own"),
    "mae_lm": ObjectiveConfig("mae_lm", decoder=DecoderConfig(1)),
    "mae_lm, cross": ObjectiveConfig("mae_lm", decoder=DecoderConfig(1, "cross")),
}


def text() -> PackedBatch:
    batch = pack([60, 3, 31, 64, 20], padding=7)
    return dataclasses.replace(batch, tags=(batch.tokens % 4).to(torch.uint8) * batch.maskable)


def masker(unit: str, name: str) -> Masker:
    """A masker whose score has learned something, so that it is asked."""
    kind = name if name in ("uniform", "part_of_speech", "token_type") else "entropy"
    share = {} if kind == "uniform" else {"random_share": Schedule(start=0.1)}
    config = MaskingConfig(Schedule(start=0.3), unit, kind, **share, **SCORES[name])
    maker = Masker(config, IDS, tags=TAGS)
    if kind in ("part_of_speech", "token_type"):
        maker.score._steps = 1000
    return maker


def objective_of(name: str, attention: Backend = "varlen") -> torch.nn.Module:
    model = ModelConfig("modern", "tiny", num_layers=2, hidden_size=64, attention=attention)
    encoder = Encoder(model.shape(IDS), model)
    return build_objective(OBJECTIVES[name], encoder, MaskedLMHead(encoder, model)).bfloat16()


class MicroStep:
    """What a step does with one pack, from the masks to the metrics."""

    def __init__(self, maker: Masker, objective: torch.nn.Module):
        self.maker, self.objective, self.meters = maker, objective, Meters()
        self.metrics = MaskMetrics(torch.ones(IDS.size, dtype=torch.long), tags=TAGS, max_weight=2.0)

    def __call__(self, batch: PackedBatch, entropy: torch.Tensor) -> MaskPlan:
        plan = self.maker(batch, progress=0.5, rng=PackRng(0, batch.number), entropy=entropy)
        losses = self.objective(batch, plan)
        losses.total.backward()
        losses = dataclasses.replace(losses, total=losses.total.detach())
        self.maker.score.update(batch, plan, losses)
        self.maker.score.sync()
        self.meters.add(batch, plan, losses, entropy)
        self.metrics.add(batch, plan, losses, entropy)
        return plan


def check(maker: Masker, objective: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> Copies:
    """The copies of a micro-step on the stand-in, whose plan must have the shapes of that on the host."""
    batch = text()
    entropy = torch.rand(batch.layout.rows)
    expected = maker(batch, progress=0.5, rng=PackRng(0, 0), entropy=entropy)
    assert batch.on_host.tokens.size == batch.layout.host_lengths.sum()  # views, which fake tensors cannot give
    monkeypatch.setattr(ranks, "device", lambda: DEVICE)
    with stand_in(monkeypatch) as copies:
        moved, entropy = batch.to(DEVICE), entropy.to(DEVICE)
        step = MicroStep(maker, objective.to(DEVICE))
        step(moved, entropy)  # learned state moves to the device, once in a run
        copies.waits.clear()
        copies.sent = 0
        plan = step(dataclasses.replace(moved, layout=dataclasses.replace(moved.layout)), entropy)
    for field in dataclasses.fields(plan):
        one, other = getattr(expected, field.name), getattr(plan, field.name)
        assert (one is None) == (other is None)
        assert one is None or (one.shape, one.dtype, DEVICE) == (other.shape, other.dtype, other.device)
    return copies


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_masks_of_any_unit_and_score_do_not_wait(unit, name, monkeypatch):
    copies = check(masker(unit, name), objective_of("mlm"), monkeypatch)
    assert copies.waits == []
    # random numbers of the choice and of the replacements; where pieces are; entropies at wrong places
    assert copies.sent == 2 + (unit != "token") + (name == "part_of_speech") + (name == "shuffled")


@pytest.mark.parametrize("attention", ["varlen", "padded"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_waits(name, attention, monkeypatch):
    assert check(masker("word", "uniform"), objective_of(name, attention), monkeypatch).waits == []


def test_no_entropy_source_and_no_count_of_flops_waits(monkeypatch):
    config, batch, counts = PretrainConfig(), text(), torch.ones(IDS.size, dtype=torch.long)
    assert batch.on_host.tokens.size == batch.layout.rows
    monkeypatch.setattr(ranks, "device", lambda: DEVICE)
    with stand_in(monkeypatch) as copies:
        moved, frequency = batch.to(DEVICE), Frequency(counts)
        plan = masker("token", "uniform")(moved, progress=0.0, rng=PackRng(0, 0))
        at_targets = torch.ones(len(plan.targets), device=DEVICE)
        losses = Losses(at_targets.sum(), at_targets, at_targets, at_targets > 0)
        exact = {"mask_id": IDS.mask, "passes": 3, "seed": 0}

        def ask(_, plan: MaskPlan) -> torch.Tensor:
            return torch.ones(len(plan.targets), device=DEVICE)

        sources = [
            frequency,
            Probe(lambda batch: torch.ones(batch.layout.rows, 8, device=DEVICE), 8, counts, seed=0, device=DEVICE),
            Exact(ask, signal="clean", **exact),
            Exact(ask, signal="masked", **exact),
            Exact(ask, signal="masked", propose=frequency, candidates=40, **exact),
        ]
        flops = FlopCounter(PackFlops.of(config, config.model.shape(IDS), None))
        frequency([moved])  # moves its table, once in a run
        copies.waits.clear()
        for source in sources:
            assert [entropy.shape for entropy in source([moved])] == [batch.tokens.shape]
            source.update(moved, plan, losses)
            source.sync()
        flops.count_step(0, [moved], 0.0, Masker(config.masking, IDS), "", False)
        assert copies.waits == []


class QueueingEngine:
    """An engine that notes the order of what a step asks for, and whose micro-steps are those of an objective."""

    def __init__(self, objective: torch.nn.Module, events: list[str]):
        self.objective, self.events = objective, events

    def train_micro(self, batch: PackedBatch, plan: MaskPlan, soft: None = None, *, targets: int) -> Losses:
        losses = self.objective(batch, plan)
        losses.total.backward()
        self.events.append(f"queue {batch.number}")
        return losses

    def measure(self, loss: torch.Tensor) -> Measured:
        self.events.append("wait")
        return Measured(1.0, 1.0)

    def step(self, rate: float) -> None:
        self.events.append("update")

    def drop(self) -> None:
        self.events.append("drop")

    def nonfinite_gradients(self) -> list[str]:
        self.events.append("look for NaN")
        return []


class NotingMasker(Masker):
    """A masker that notes when it is asked."""

    events: list[str]

    def __call__(self, batch: PackedBatch, **given) -> MaskPlan:
        self.events.append(f"mask {batch.number}")
        return super().__call__(batch, **given)


@pytest.mark.parametrize("name", ["uniform", "entropy"])
def test_a_step_waits_once_and_masks_a_pack_while_the_pack_before_it_is_queued(name, monkeypatch):
    events: list[str] = []
    monkeypatch.setattr(ranks, "device", lambda: DEVICE)
    batches = [dataclasses.replace(text(), number=number) for number in range(3)]
    assert all(batch.on_host.tokens.size for batch in batches)
    maker, objective = masker("word", name), objective_of("mlm")
    maker.__class__, maker.events = NotingMasker, events
    with stand_in(monkeypatch) as copies:
        engine = QueueingEngine(objective.to(DEVICE), events)
        sources = {"frequency": Frequency(torch.ones(IDS.size, dtype=torch.long))} if name == "entropy" else {}
        trainer = Trainer(engine, maker, Meters(), SpikePolicy(SpikesConfig()), 0, EntropySources(sources))
        trainer.meters._started = True  # or it reads the numbers of the first step, once in a launch
        moved = [batch.to(DEVICE) for batch in batches]
        [*trainer.sources(moved)] if sources else []
        copies.waits.clear()
        take_step(trainer, 0, moved, progress=0.5, rate=0.1)
    assert events == ["mask 0", "queue 0", "mask 1", "queue 1", "mask 2", "queue 2", "wait", "update"]
    assert copies.waits == []  # but for that of `measure`


def test_the_norms_of_an_offloaded_optimizer_are_one_copy(monkeypatch):
    weights = {name: torch.nn.Parameter(torch.ones(2)) for name in "abc"}
    norms = {id(weights["a"]): torch.tensor(3.0), id(weights["c"]): torch.tensor(4.0)}
    zero = SimpleNamespace(cpu_offload=True, norm_for_param_grads=norms, get_param_id=id)
    with stand_in(monkeypatch) as copies:
        known = private_api.gradient_norms(zero, 2, weights, DEVICE)
        assert [(name, norm.device, norm.shape) for name, norm in known] == [("a", DEVICE, ()), ("c", DEVICE, ())]
    assert len(copies.waits) == 1
    known = private_api.gradient_norms(zero, 2, weights, torch.device("cpu"))
    assert [(name, float(norm)) for name, norm in known] == [("a", 3.0), ("c", 4.0)]


def test_the_stand_in_finds_waits(monkeypatch):
    with stand_in(monkeypatch) as copies:
        values = torch.ones(4, device=DEVICE)
        for wait in (values.sum().item, lambda: bool(values.any()), values.nonzero, lambda: values[values > 0]):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                wait()
        assert copies.waits == []
        values.cpu()
        values[:1].copy_(torch.ones(1))
        torch.tensor(1.0, device=DEVICE)
        torch.ones(1).to(DEVICE, non_blocking=True)
    assert (len(copies.waits), copies.sent) == (3, 1)
