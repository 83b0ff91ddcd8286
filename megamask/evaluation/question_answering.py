"""Answers as spans of a context (SQuAD 1.1): one linear layer on the states of the encoder scores the first and the
last token of an answer (Devlin et al. 2019, section 4.2).

The same head serves every family of encoders, over their states without a pooler. `fine_tune_spans` trains all weights
by the recipe of the other tasks; `frozen_spans` fits the layer alone, to features that are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from megamask.errors import DataError
from megamask.evaluation.encoder import EncoderFolder, load_encoder
from megamask.evaluation.features import pad_texts, reads_token_types
from megamask.evaluation.outcome import Outcome
from megamask.evaluation.settings import EvaluateConfig, FineTuningConfig
from megamask.evaluation.span_features import SpanFeatures, fit_span_layer, window_logits
from megamask.evaluation.span_windows import LENGTH, Windows, answer_tokens, make_windows, predicted_answers
from megamask.evaluation.squad_scores import answer_f1, exact_match
from megamask.evaluation.tasks import Examples, TaskData
from megamask.hf.masked_lm import pad_id
from megamask.hf.model_folder import load_hf_tokenizer
from megamask.runtime import ranks
from megamask.runtime.precision import DTYPES, precision_here
from megamask.runtime.progress_bar import ProgressBar

WARMUP = 0.1
"""Share of the updates in which the learning rate rises; then it falls linearly to 0."""
CHOICE_SEED = 0
"""Of the runs that choose a learning rate; the runs that are reported have seeds from 1 on."""
HELD_OUT = 0.1
"""Share of the training contexts on which the learning rate and the penalty are chosen."""
GROUPED_BATCHES = 50
"""Windows are sorted by length within this many batches of an epoch."""


def fine_tune_spans(encoder: EncoderFolder, data: TaskData, config: EvaluateConfig, seed: int) -> Outcome:
    """Train all weights and the span layer on ``data.train``; answers and scores for ``data.test``.

    The recipe is that of ``config.fine_tuning``; batches count windows. Equal seeds give equal results on one machine.
    """
    tokenizer, length = load_hf_tokenizer(encoder.folder), min(LENGTH, encoder.max_length)
    types = reads_token_types(load_encoder(encoder))
    test = make_windows(tokenizer, data.test, length, token_types=types)
    train = _Training.of(tokenizer, data.train, length, types)
    rate = config.fine_tuning.learning_rate
    if rate is None:
        rate = _choose_learning_rate(encoder, tokenizer, data, config.fine_tuning, length, types)
    model, loss, updates = _train(encoder, train, replace(config.fine_tuning, learning_rate=rate), seed)
    fit = {"learning_rate": rate, "updates": updates, "loss": loss}
    metrics = {**train.metrics(), **_window_metrics(test, length), **fit}
    if not math.isfinite(loss):
        return _outcome([""] * len(data.test), data.test, metrics, "The loss became NaN or Inf.")
    return _outcome(
        predicted_answers(test, data.test, window_logits(model.encoder, test, model.weights())), data.test, metrics
    )


def frozen_spans(encoder: EncoderFolder, data: TaskData, config: EvaluateConfig) -> Outcome:
    """Fit the span layer alone; the encoder stays as it is. Deterministic.

    The layer minimizes the mean cross-entropy of the first and the last token over standardised features of the
    context and of the first token, plus an L2 penalty that is chosen on a tenth of the training contexts. The features
    are in a temporary file (4 bytes x tokens x width).
    """
    model, tokenizer = load_encoder(encoder), load_hf_tokenizer(encoder.folder)
    length, types = min(LENGTH, encoder.max_length), reads_token_types(model)
    train = _Training.of(tokenizer, data.train, length, types)
    test = make_windows(tokenizer, data.test, length, token_types=types)
    features = SpanFeatures.of(model, train.windows, train.tokens)
    layer, fit = fit_span_layer(features, _held_out(data.train)[train.windows.example])
    metrics = {**train.metrics(), **_window_metrics(test, length), **fit}
    if not np.isfinite(layer).all():
        return _outcome([""] * len(data.test), data.test, metrics, "The features are NaN or Inf.")
    return _outcome(predicted_answers(test, data.test, window_logits(model, test, layer)), data.test, metrics)


# ---- training data and scores


@dataclass(frozen=True)
class _Training:
    """Windows with the first and last token of their answers."""

    windows: Windows
    tokens: Int[np.ndarray, "w 2"]
    examples: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, examples: Examples, length: int, types: bool) -> _Training:
        windows = make_windows(tokenizer, examples, length, token_types=types)
        return cls(windows, answer_tokens(windows, [answers[0] for answers in examples.answers]), len(examples))

    def metrics(self) -> dict[str, float]:
        """What was counted; an answer in no window is longer than the overlap of two."""
        answered = self.tokens[:, 1] > 0
        return {
            "train_windows": len(self.windows),
            "train_windows_without_answer": int((~answered).sum()),
            "train_answers_in_no_window": self.examples - len(np.unique(self.windows.example[answered])),
            "train_questions_truncated": self.windows.truncated_questions,
        }


def _window_metrics(test: Windows, length: int) -> dict[str, float]:
    return {
        "max_length": length,
        "overlap": test.overlap,
        "test_windows": len(test),
        "test_questions_truncated": test.truncated_questions,
    }


def _outcome(answers: Sequence[str], examples: Examples, metrics: dict[str, float], collapsed: str = "") -> Outcome:
    right = [[answer.text for answer in each] for each in examples.answers]
    pairs = list(zip(answers, right, strict=True))
    f1 = np.array([answer_f1(*pair) for pair in pairs])
    scores = {"exact_match": float(np.mean([exact_match(*pair) for pair in pairs])), "span_f1": float(f1.mean())}
    if not collapsed and not f1.any():
        collapsed = "No predicted answer shares a word with a right one."
    return Outcome(f1, scores, collapsed, metrics)


def _held_out(examples: Examples) -> Bool[np.ndarray, " n"]:
    """Which examples are of the tenth of the contexts that settings are chosen on; always the same ones."""
    contexts = sorted({context for _, context in examples.texts})
    if len(contexts) < 2:
        raise DataError(f"Settings are chosen on a tenth of the training contexts, but squad has {len(contexts)}.")
    count = max(1, round(HELD_OUT * len(contexts)))
    chosen = {contexts[number] for number in np.random.default_rng(0).permutation(len(contexts))[:count]}
    return np.array([context in chosen for _, context in examples.texts])


def _some(examples: Examples, chosen: Bool[np.ndarray, " n"]) -> Examples:
    numbers = np.flatnonzero(chosen).tolist()
    return replace(
        examples,
        texts=tuple(examples.texts[number] for number in numbers),
        labels=examples.labels[chosen],
        answers=tuple(examples.answers[number] for number in numbers),
    )


# ---- fine-tuning


class SpanModel(nn.Module):
    """An encoder with a linear layer for the first and the last token of an answer."""

    def __init__(self, encoder: PreTrainedModel, dropout: float):
        super().__init__()
        self.encoder, self.dropout = encoder, nn.Dropout(dropout)
        self.layer = nn.Linear(encoder.config.hidden_size, 2)
        nn.init.normal_(self.layer.weight, std=0.02)
        nn.init.zeros_(self.layer.bias)
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout

    def forward(self, batch: dict[str, Tensor]) -> Float[Tensor, "B L 2"]:
        """The logits of each token; -inf for padding."""
        logits = self.layer(self.dropout(self.encoder(**batch).last_hidden_state)).float()
        return logits.masked_fill(batch["attention_mask"][:, :, None] == 0, -torch.inf)

    def weights(self) -> Float[np.ndarray, "D 2"]:
        """Those of the layer."""
        return self.layer.weight.detach().float().cpu().numpy().T


def _train(
    encoder: EncoderFolder, train: _Training, recipe: FineTuningConfig, seed: int
) -> tuple[SpanModel, float, int]:
    """The trained model, the mean loss of the last tenth of the updates (NaN after a loss that was), and updates."""
    assert recipe.learning_rate is not None
    torch.manual_seed(seed)
    device = ranks.device()
    model = SpanModel(load_encoder(encoder), recipe.dropout).to(device).train()
    size = recipe.batch_size or (16 if train.examples < 4000 else 32)
    epochs = recipe.epochs or (10 if train.examples < 10_000 else 3)
    updates = max(recipe.min_updates, epochs * math.ceil(len(train.windows) / size))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, eps=1e-6, weight_decay=recipe.weight_decay
    )
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * updates), updates)
    batches = _shuffled_batches(train.windows.texts.lengths, size, np.random.default_rng(seed))
    dtype, losses = DTYPES[precision_here("auto", "").precision], []
    with ProgressBar(f"fine-tuning on squad, seed {seed}", updates) as bar:
        for _, rows in zip(range(updates), batches):  # noqa: B905
            batch = {name: values.to(device) for name, values in _pad(model.encoder, train.windows, rows).items()}
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(batch)
            loss = span_loss(logits, torch.from_numpy(train.tokens[rows]).to(device))
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return model, math.nan, len(losses)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
    return model.eval(), float(np.mean(losses[-math.ceil(updates / 10) :])), updates


def span_loss(logits: Float[Tensor, "B L 2"], tokens: Int64[Tensor, "B 2"]) -> Float[Tensor, ""]:
    """The mean cross-entropy of the first and the last token."""
    return nn.functional.cross_entropy(logits, tokens)


def _choose_learning_rate(
    encoder: EncoderFolder,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    recipe: FineTuningConfig,
    length: int,
    types: bool,
) -> float:
    """The rate with the largest F1 on the contexts that are held out; the smaller one of equals."""
    held_out = _held_out(data.train)
    train = _Training.of(tokenizer, _some(data.train, ~held_out), length, types)
    examples = _some(data.train, held_out)
    windows, scores = make_windows(tokenizer, examples, length, token_types=types), {}
    for rate in sorted(recipe.learning_rates):
        model, loss, _ = _train(encoder, train, replace(recipe, learning_rate=rate), CHOICE_SEED)
        answers = (
            predicted_answers(windows, examples, window_logits(model.encoder, windows, model.weights()))
            if math.isfinite(loss)
            else []
        )
        scores[rate] = _outcome(answers, examples, {}).scores["span_f1"] if answers else -1.0
    return max(scores, key=scores.__getitem__)


def _shuffled_batches(lengths: Sequence[int], size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Rows in batches without end, in another order in each epoch; windows of similar length are together."""
    while True:
        order = rng.permutation(len(lengths)).tolist()
        batches = []
        for begin in range(0, len(order), size * GROUPED_BATCHES):
            group = sorted(order[begin : begin + size * GROUPED_BATCHES], key=lengths.__getitem__)
            batches += [group[at : at + size] for at in range(0, len(group), size)]
        for number in rng.permutation(len(batches)):
            yield batches[number]


def _pad(model: PreTrainedModel, windows: Windows, rows: Sequence[int]) -> dict[str, Tensor]:
    return pad_texts(windows.texts, rows, pad_id(model))
