"""Fine-tuning equals a plain loop, repeats by its seeds, and chooses its learning rate on training examples."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, get_linear_schedule_with_warmup

from megamask.evaluation import fine_tuning
from megamask.evaluation.encoder import EncoderFolder, load_encoder, open_encoder
from megamask.evaluation.fine_tuning import TextClassifier, UpdatePlan, fine_tune, grouped_batches
from megamask.evaluation.outcome import Outcome
from megamask.evaluation.scores import compute_scores
from megamask.evaluation.settings import EvaluateConfig, FineTuningConfig
from tests.tolerances import assert_close
from tests.unit.evaluation.models import FAMILIES, save_model, word_task

TUNING = FineTuningConfig(learning_rate=3e-3, epochs=1, min_updates=40)
CONFIG = EvaluateConfig(model="model", fine_tuning=TUNING)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> EncoderFolder:
    folder = save_model(tmp_path_factory.mktemp("encoder") / "model", initializer_range=0.05)
    return open_encoder(str(folder), folder)


@pytest.fixture
def fp32(monkeypatch) -> None:
    """No bf16, as on a CPU without it."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("name", ["sst2", "qqp", "stsb"])
def test_an_easy_task_is_learned(encoder: EncoderFolder, name: str, pooling) -> None:
    data = word_task(200, 60, name)
    outcome = fine_tune(encoder, data, replace(CONFIG, pooling=pooling), 1)
    assert not outcome.collapsed and all(score > 0.6 for score in outcome.scores.values())
    assert outcome.scores == compute_scores(data.task, outcome.predictions, data.test.labels)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bert"])
def test_other_families_are_trained(tmp_path: Path, family: str) -> None:
    folder = save_model(tmp_path / "model", family)
    tuning = replace(TUNING, min_updates=2, epochs=1, batch_size=4)
    outcome = fine_tune(
        open_encoder(str(folder), folder), word_task(8, 4, "qqp"), replace(CONFIG, fine_tuning=tuning), 1
    )
    assert np.isfinite(outcome.predictions).all() and outcome.metrics["updates"] == 2


@pytest.mark.parametrize("name", ["sst2", "stsb"])
def test_predictions_are_those_of_a_plain_loop(encoder: EncoderFolder, fp32, name: str) -> None:
    data = word_task(64, 30, name)
    tuning = replace(TUNING, dropout=0.0, weight_decay=0.1, min_updates=10, batch_size=8, learning_rate=1e-3)
    outcome = fine_tune(encoder, data, replace(CONFIG, fine_tuning=tuning), 5)
    tokenizer, body = AutoTokenizer.from_pretrained(encoder.folder), AutoModel.from_pretrained(encoder.folder)
    for module in body.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    body.pooler = None
    torch.manual_seed(5)
    head = nn.Linear(32, len(data.task.labels) or 1)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    named = [*body.named_parameters(), *head.named_parameters()]
    decayed = [p for name, p in named if not name.endswith("bias") and "LayerNorm" not in name]
    kept = [p for name, p in named if name.endswith("bias") or "LayerNorm" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-6)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, 10)
    labels = torch.from_numpy(data.train.labels)
    mean, spread = (labels.mean(), labels.std(correction=0)) if name == "stsb" else (0.0, 1.0)
    labels = ((labels - mean) / spread).float()

    def logits(texts) -> torch.Tensor:
        pairs = [list(column) for column in zip(*texts, strict=True)]
        inputs = tokenizer(*pairs, padding=True, return_tensors="pt", return_token_type_ids=True)
        return head(body(**inputs).last_hidden_state[:, 0])

    lengths = [len(tokenizer(*text).input_ids) for text in data.train.texts]
    order = np.random.default_rng(5 + fine_tuning.ORDER_SEEDS)
    body.train()
    for rows in grouped_batches(lengths, UpdatePlan(8, 10), order):
        outputs = logits([data.train.texts[row] for row in rows])
        if name == "stsb":
            loss = nn.functional.mse_loss(outputs[:, 0], labels[rows])
        else:
            loss = nn.functional.cross_entropy(outputs, labels[rows].long())
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    body.eval()
    with torch.no_grad():
        outputs = logits(data.test.texts)
    expected = outputs[:, 0] * spread + mean if name == "stsb" else outputs.argmax(1)
    assert_close(torch.from_numpy(outcome.predictions), expected, torch.float32)
    assert loss.item() == pytest.approx(outcome.metrics["final_loss"], rel=1e-3)


def test_equal_seeds_give_equal_results_and_others_do_not(encoder: EncoderFolder) -> None:
    data, config = word_task(40, 20, "stsb"), replace(CONFIG, fine_tuning=replace(TUNING, min_updates=5))
    first, again, other = (fine_tune(encoder, data, config, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.predictions, again.predictions)
    assert not np.array_equal(first.predictions, other.predictions)
    assert first.metrics["weights_seed"] != first.metrics["order_seed"] != other.metrics["order_seed"]


def test_an_epoch_has_every_text_once_in_batches_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500).tolist()
    plan = UpdatePlan(8, 126)  # two epochs of 63
    batches = grouped_batches(lengths, plan, np.random.default_rng(1))
    assert len(batches) == 126 and Counter(row for batch in batches for row in batch) == dict.fromkeys(range(500), 2)
    assert max(map(len, batches)) == 8 and batches[:63] != batches[63:]
    assert batches != grouped_batches(lengths, plan, np.random.default_rng(2))
    tokens = sum(lengths) * 2
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.2 * tokens
    longest = [max(lengths[row] for row in batch) for batch in batches[:50]]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


@pytest.mark.parametrize(
    ("examples", "changes", "expected"),
    [
        (3999, {}, UpdatePlan(16, 2500)),
        (4000, {}, UpdatePlan(32, 1250)),
        (10_000, {}, UpdatePlan(32, 939)),
        (500, {}, UpdatePlan(16, 600)),
        (500, {"min_updates": 1, "epochs": 2, "batch_size": 50}, UpdatePlan(50, 20)),
    ],
)
def test_the_number_of_updates_follows_the_recipe(examples: int, changes: dict, expected: UpdatePlan) -> None:
    assert UpdatePlan.of(examples, replace(FineTuningConfig(), **changes)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_set_in_the_encoder(tmp_path: Path, family: str) -> None:
    encoder = open_encoder(str(save_model(tmp_path / "model", family)), tmp_path)
    rates = {module.p for module in load_encoder(encoder, 0.3).modules() if isinstance(module, nn.Dropout)}
    assert rates == {0.3}


def test_a_loss_that_is_not_finite_stops_the_run(encoder: EncoderFolder, fp32) -> None:
    tuning = replace(TUNING, learning_rate=1e38, min_updates=20)
    outcome = fine_tune(encoder, word_task(40, 10), replace(CONFIG, fine_tuning=tuning), 1)
    assert outcome.collapsed.startswith("the loss of update") and outcome.scores == {"accuracy": 0}
    assert np.isnan(outcome.predictions).all()


def test_the_learning_rate_is_chosen_on_a_tenth_of_the_training_examples(encoder: EncoderFolder, monkeypatch) -> None:
    scores = {1e-5: 0.7, 1e-4: 0.9, 3e-4: 0.9}
    tuning = replace(TUNING, learning_rate=None, learning_rates=tuple(scores))
    config, data, runs = replace(CONFIG, fine_tuning=tuning), word_task(100, 20), []

    def train(encoder, data, config, seed) -> Outcome:
        rate = config.fine_tuning.learning_rate
        runs.append((data.train.texts, data.test.texts, rate, seed))
        return Outcome(data.test.labels, {"accuracy": scores[rate]}, "", {"learning_rate": rate})

    monkeypatch.setattr(fine_tuning, "_train_and_predict", train)
    outcome = fine_tune(encoder, data, config, 1)
    assert [run[2:] for run in runs] == [(1e-5, 0), (1e-4, 0), (3e-4, 0), (1e-4, 1)]  # the smaller of two equal ones
    for fit, choose, _, _ in runs[:3]:
        assert len(choose) == 10 and sorted(fit + choose) == sorted(data.train.texts)
    assert runs[3][:2] == (data.train.texts, data.test.texts)
    tried = {name: value for name, value in outcome.metrics.items() if name.startswith("held_out_score")}
    assert tried == {"held_out_score/1e-05": 0.7, "held_out_score/0.0001": 0.9, "held_out_score/0.0003": 0.9}
    fine_tune(encoder, replace(data, test=data.train), config, 2)
    assert [run[2:] for run in runs[4:]] == [(1e-4, 2)]  # chosen once for all seeds


def test_long_texts_are_counted(encoder: EncoderFolder) -> None:
    data = word_task(20, 10)
    long = replace(data.test, texts=((" ".join(["dog"] * 100),), *data.test.texts[1:]))
    outcome = fine_tune(
        encoder, replace(data, test=long), replace(CONFIG, fine_tuning=replace(TUNING, min_updates=1)), 1
    )
    assert (outcome.metrics["truncated_train"], outcome.metrics["truncated_test"]) == (0, 1)
    assert outcome.metrics["max_length"] == 64


def test_a_nonfinite_output_predicts_none_of_the_classes(encoder: EncoderFolder) -> None:
    model = TextClassifier(load_encoder(encoder), 2, "first", 0.0)
    nn.init.constant_(model.output.bias, torch.inf)
    texts = fine_tuning.encode_texts(AutoTokenizer.from_pretrained(encoder.folder), model.encoder, [("the fox",)], 64)
    assert np.isnan(fine_tuning._predict(model, texts, False)).all()
