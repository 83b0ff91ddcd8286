"""Validation is the plain mean over the masked tokens of the held-out packs, on any number of ranks."""

from __future__ import annotations

import math

import pytest
import torch

from megamask.batch import Losses, MaskPlan, PackedBatch
from megamask.data.packs import Packs
from megamask.engine.engine import Engine
from megamask.entropy.frequency import unigram_surprisal
from megamask.masking.masker import EVALUATION, Masker
from megamask.masking.rng import PackRng
from megamask.objectives.mlm import MLM
from megamask.runtime import ranks
from megamask.training import validation
from megamask.training.validation import SEED, Validation, source_metrics, validate_sources
from tests.batches import IDS, pack
from tests.tolerances import TOLERANCES
from tests.unit.model.models import objective


class Bare(Engine):
    """A model without DeepSpeed."""

    def __init__(self, model: MLM):
        self.model, self.calls = model, 0

    def evaluate(self, batch: PackedBatch, plan: MaskPlan) -> Losses:
        self.calls += 1
        with torch.no_grad():
            return self.model(batch, plan)


class HeldOut(Packs):
    """Packs of uneven sequences."""

    bytes_per_token: float | None = None

    def __init__(self, count: int, bytes_per_token: float | None = None):
        self.count, self.bytes_per_token = count, bytes_per_token

    def __len__(self) -> int:
        return self.count

    def batch(self, number: int) -> PackedBatch:
        assert 0 <= number < self.count
        return pack([20 + number, 30 - number, 14], number=number, seed=number)


COUNTS = torch.arange(IDS.size)
GUESS = unigram_surprisal(COUNTS)


def by_hand(model: MLM, count: int) -> Validation:
    """Token by token."""
    nll, hits, guess, lucky = [], [], [], []
    for number in range(count):
        batch = HeldOut(count).batch(number)
        plan = Masker(EVALUATION, IDS)(batch, progress=0.0, rng=PackRng(SEED, number, "validate"))
        assert (plan.inputs[plan.targets] == IDS.mask).all()
        assert len(plan.targets) == round(0.15 * batch.layout.rows)
        with torch.no_grad():
            logits = model.head.logits(model.represent(batch, plan))
        for row, label in zip(logits, plan.labels.tolist(), strict=True):
            nll.append(-row.log_softmax(0)[label].item())
            hits.append(row.argmax().item() == label)
            share = (COUNTS[label].item() + 1) / (COUNTS.sum().item() + IDS.size)
            guess.append(-math.log(share))
            lucky.append(label == IDS.size - 1)  # the most frequent token
    size = len(nll)
    return Validation(sum(nll) / size, sum(hits) / size, sum(guess) / size, sum(lucky) / size, size)


def validate(engine: Bare, packs: HeldOut, count: int, *how) -> Validation:
    """The evaluation of a single source."""
    return validate_sources(engine, {"text": packs}, count, *how)[0]


def close(actual: Validation, expected: Validation) -> bool:
    relative, absolute = TOLERANCES[torch.float64]
    return all(
        vars(actual)[key] == (value if value is None else pytest.approx(value, relative, absolute))
        for key, value in vars(expected).items()
    )


def test_one_rank_is_the_mean_by_hand() -> None:
    model = objective("modern")
    assert close(validate(Bare(model), HeldOut(5), 5, IDS, GUESS), by_hand(model, 5))


def test_the_number_of_packs_is_the_setting_or_all() -> None:
    model = objective("bert")
    assert validate(Bare(model), HeldOut(5), 3, IDS, GUESS) == validate(Bare(model), HeldOut(3), 3, IDS, GUESS)
    assert validate(Bare(model), HeldOut(3), 99, IDS, GUESS) == validate(Bare(model), HeldOut(3), 3, IDS, GUESS)


@pytest.mark.parametrize("world", [2, 3, 4, 7])
def test_ranks_share_the_packs_and_run_equally_many(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates each rank in turn, and adds up what they would."""
    model, count = objective("modern"), 5
    monkeypatch.setattr(ranks, "world", lambda: world)
    parts, calls = [], []
    for rank in range(world):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)

        def keep(values):
            parts.append(values)
            return torch.ones_like(values)

        monkeypatch.setattr(ranks, "sum", keep)
        engine = Bare(model)
        validate(engine, HeldOut(count), count, IDS, GUESS)
        calls.append(engine.calls)
    assert calls == [-(-count // world)] * world  # or a collective of the engine would wait for ever
    monkeypatch.setattr(ranks, "sum", lambda values: sum(parts))
    total = validate(Bare(model), HeldOut(count), count, IDS, GUESS)
    assert close(total, by_hand(model, count))


def test_each_source_is_evaluated_and_the_total_is_the_mean_over_targets() -> None:
    engine, held_out = Bare(objective("modern")), {"wiki": HeldOut(5), "code": HeldOut(2)}
    whole, by_source = validate_sources(engine, held_out, 4, IDS, GUESS)
    assert by_source == {name: validate(engine, packs, 4, IDS, GUESS) for name, packs in held_out.items()}
    wiki, code = by_source.values()
    assert whole.targets == wiki.targets + code.targets
    for name in ("loss", "accuracy", "unigram_loss", "unigram_accuracy"):
        total = getattr(wiki, name) * wiki.targets + getattr(code, name) * code.targets
        assert getattr(whole, name) == pytest.approx(total / whole.targets)
    metrics = source_metrics(by_source)
    assert (metrics["valid/code/loss"], metrics["valid/wiki/accuracy"]) == (code.loss, wiki.accuracy)


def test_nats_per_byte_are_the_loss_times_tokens_over_bytes() -> None:
    engine = Bare(objective("modern"))
    held_out = {"de": HeldOut(5, 4.5), "zh": HeldOut(2, 2.5)}
    whole, by_source = validate_sources(engine, held_out, 4, IDS, GUESS)
    for name, packs in held_out.items():
        # tokens / bytes of the split, whatever part of it was evaluated
        assert by_source[name].nats_per_byte == pytest.approx(by_source[name].loss / packs.bytes_per_token)
        assert source_metrics(by_source)[f"valid/{name}/nats_per_byte"] == by_source[name].nats_per_byte
    nats = sum(each.loss * each.targets for each in by_source.values())
    sizes = sum(each.targets * held_out[name].bytes_per_token for name, each in by_source.items())
    assert whole.nats_per_byte == pytest.approx(nats / sizes)


def test_unknown_bytes_of_one_source_leave_those_of_the_others() -> None:
    engine = Bare(objective("modern"))
    whole, by_source = validate_sources(engine, {"de": HeldOut(5, 4.5), "old": HeldOut(2)}, 4, IDS, GUESS)
    assert (whole.nats_per_byte, by_source["old"].nats_per_byte) == (None, None)
    assert by_source["de"].nats_per_byte is not None
    assert "valid/old/nats_per_byte" not in source_metrics(by_source)


def test_the_total_of_a_single_source_is_bitwise_equal() -> None:
    engine = Bare(objective("bert"))
    whole, by_source = validate_sources(engine, {"wiki": HeldOut(5)}, 5, IDS, GUESS)
    assert whole == by_source["wiki"] == validate(engine, HeldOut(5), 5, IDS, GUESS)


def test_the_mask_does_not_depend_on_the_run() -> None:
    assert SEED == validation.SEED == 0
    assert EVALUATION.corruption.mask == 1.0
    assert EVALUATION.ratio(0.0) == EVALUATION.ratio(1.0) == 0.15


def test_perplexity_is_exp_of_the_loss() -> None:
    assert Validation(math.log(50), 0, 0, 0, 1).perplexity == pytest.approx(50)
    assert Validation(1e4, 0, 0, 0, 1).perplexity == math.inf
