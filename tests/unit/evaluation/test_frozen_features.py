"""Features do not depend on the batch, and the linear model is scikit-learn's on the standardised features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from transformers import AutoModel, AutoTokenizer

from megamask.evaluation.encoder import EncoderFolder, open_encoder
from megamask.evaluation.features import EncodedTexts, encode_texts, length_batches, pad_texts, text_features
from megamask.evaluation.frozen_features import fit_frozen, held_out_split
from megamask.evaluation.settings import EvaluateConfig
from megamask.evaluation.tasks import TASKS, Examples, TaskData
from tests.tolerances import assert_close
from tests.unit.evaluation.models import FAMILIES, save_model, sentences, word_task

CONFIG = EvaluateConfig(model="model")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> EncoderFolder:
    folder = save_model(tmp_path_factory.mktemp("encoder") / "model")
    return open_encoder(str(folder), folder)


def plain_features(folder: Path, texts: tuple[tuple[str, ...], ...]) -> dict[str, np.ndarray]:
    """Each text on its own through transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    takes_types = getattr(model.config, "type_vocab_size", 0) > 1 and model.config.model_type != "distilbert"
    first, mean = [], []
    for text in texts:
        inputs = tokenizer(*text, return_tensors="pt", return_token_type_ids=takes_types)
        with torch.no_grad():
            states = model(**inputs).last_hidden_state[0]
        first.append(states[0].numpy())
        mean.append(states.mean(0).numpy())
    return {"first": np.array(first), "mean": np.array(mean)}


def linear_inputs(folder: Path, texts: tuple[tuple[str, ...], ...]) -> dict[str, np.ndarray]:
    """What the linear model reads: u, and of a pair also v, the distance in each dimension and the product."""
    each = [plain_features(folder, tuple((text,) for text in column)) for column in zip(*texts, strict=True)]
    if len(each) == 1:
        return each[0]
    pairs = {pooling: (each[0][pooling], each[1][pooling]) for pooling in each[0]}
    return {pooling: np.hstack([u, v, np.abs(u - v), u * v]) for pooling, (u, v) in pairs.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fields", [1, 2])
def test_features_do_not_depend_on_the_batch(tmp_path: Path, family: str, fields: int) -> None:
    folder = save_model(tmp_path / "model", family)
    texts = tuple(zip(*(sentences(20, seed) for seed in range(fields)), strict=True))
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    features = text_features(model, encode_texts(tokenizer, model, texts, 64))
    for pooling, expected in plain_features(folder, texts).items():
        assert_close(torch.from_numpy(features[pooling]), torch.from_numpy(expected))


@pytest.mark.parametrize(("family", "types"), [("bert", 2), ("bert", 1), ("roberta", 1), ("distilbert", 0)])
def test_token_types_are_given_to_models_that_distinguish_them(tmp_path: Path, family: str, types: int) -> None:
    folder = save_model(tmp_path / "model", family, **({"type_vocab_size": types} if types else {}))
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = encode_texts(tokenizer, model, (("the quick", "brown fox"),), 64)
    kinds = {0, 1} if types == 2 else set()
    assert {kind for row in texts.types for kind in row} == kinds
    assert ("token_type_ids" in pad_texts(texts, [0], 0)) == bool(kinds)


def test_a_long_text_is_truncated_and_counted(encoder: EncoderFolder) -> None:
    model, tokenizer = AutoModel.from_pretrained(encoder.folder), AutoTokenizer.from_pretrained(encoder.folder)
    short, long = "the fox", " ".join(["dog"] * 40)
    texts = encode_texts(tokenizer, model, ((short, long), (short, short), (long, short)), 16)
    assert texts.truncated == 2 and texts.lengths == [16, 7, 16]
    expected = tokenizer(short, long, truncation=True, max_length=16, return_token_type_ids=True)
    assert texts.ids[0] == expected["input_ids"] and texts.types[0] == expected["token_type_ids"]
    data = TaskData(TASKS["sst2"], *(Examples(((short,), (long,)) * 10, np.arange(20) % 2.0) for _ in range(2)))
    outcome = fit_frozen(encoder, data, replace(CONFIG, max_length=16))["first"]
    assert (outcome.metrics["truncated_train"], outcome.metrics["max_length"]) == (10, 16)
    assert fit_frozen(encoder, data, CONFIG)["first"].metrics["max_length"] == encoder.max_length == 64


def test_batches_hold_every_row_once_within_the_limit() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 100).tolist()
    batches = list(length_batches(lengths, 40))
    assert sorted(row for batch in batches for row in batch) == list(range(100))
    assert all(len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 40 for batch in batches)
    assert not list(length_batches([]))


@pytest.mark.parametrize("name", ["sst2", "trec", "qqp", "stsb"])
def test_the_linear_model_is_that_of_scikit_learn(encoder: EncoderFolder, name: str) -> None:
    data = word_task(80, 50, name)
    features = {part: linear_inputs(encoder.folder, getattr(data, part).texts) for part in ("train", "test")}
    for pooling, outcome in fit_frozen(encoder, data, CONFIG).items():
        train, test = (features[part][pooling].astype(np.float64) for part in ("train", "test"))
        center, scale = train.mean(0), train.std(0)
        penalty = outcome.metrics["penalty"]
        model = Ridge(penalty) if name == "stsb" else LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=10_000)
        expected = model.fit((train - center) / scale, data.train.labels).predict((test - center) / scale)
        if name == "stsb":
            np.testing.assert_allclose(outcome.predictions, expected, rtol=1e-3, atol=1e-3)
        else:
            assert np.mean(outcome.predictions == expected) >= 0.96  # close decisions may differ in fp32
        assert outcome.metrics["converged"] == 1


@pytest.mark.parametrize("name", ["sst2", "stsb"])
def test_an_easy_task_is_learned_the_same_way_twice(encoder: EncoderFolder, name: str) -> None:
    data = word_task(400, 100, name)
    outcomes = [fit_frozen(encoder, data, CONFIG)["mean"] for _ in range(2)]
    assert np.array_equal(outcomes[0].predictions, outcomes[1].predictions)
    assert not outcomes[0].collapsed and all(score > 0.8 for score in outcomes[0].scores.values())


def test_labels_without_relation_choose_a_strong_penalty(encoder: EncoderFolder) -> None:
    data = word_task(200, 50)
    labels = np.random.default_rng(3).integers(0, 2, 200).astype(float)
    noise = replace(data, train=replace(data.train, labels=labels))
    learned, random = (fit_frozen(encoder, each, CONFIG)["mean"] for each in (data, noise))
    assert random.metrics["penalty"] > 10 * learned.metrics["penalty"] and random.collapsed


def test_the_held_out_tenth_is_fixed_and_in_proportion() -> None:
    labels = np.array([0.0] * 80 + [1.0] * 20)
    train = Examples(tuple((str(row),) for row in range(100)), labels)
    fit, choose = held_out_split(TASKS["sst2"], train)
    assert sorted([*fit, *choose]) == list(range(100))
    assert labels[choose].sum() == 2 and len(choose) == 10
    assert np.array_equal(np.concatenate(held_out_split(TASKS["sst2"], train)), [*fit, *choose])
    rare = replace(train, labels=np.array([0.0] * 99 + [1.0]))
    assert len(held_out_split(TASKS["sst2"], rare)[1]) == 10


def test_features_that_are_not_finite_are_a_collapse(encoder: EncoderFolder, monkeypatch) -> None:
    def overflow(model, texts: EncodedTexts):
        return {"first": np.full((len(texts.ids), 4), np.inf, np.float32)}

    monkeypatch.setattr("megamask.evaluation.frozen_features.text_features", overflow)
    outcome = fit_frozen(encoder, word_task(20, 10), CONFIG)["first"]
    assert "NaN or Inf" in outcome.collapsed and outcome.scores == {"accuracy": 0}


def test_without_two_classes_to_choose_on_the_penalty_is_one(encoder: EncoderFolder) -> None:
    data = word_task(2, 10)
    data = replace(data, train=replace(data.train, labels=np.array([0.0, 1.0])))
    assert {outcome.metrics["penalty"] for outcome in fit_frozen(encoder, data, CONFIG).values()} == {1.0}
