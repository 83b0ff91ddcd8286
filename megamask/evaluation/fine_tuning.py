"""Fine-tuning: train all weights of an encoder and a new linear layer on a task, by one recipe for all tasks.

The head is the same for every family of encoders: the state of the first token or the mean over all tokens, dropout,
one linear layer. The heads in transformers differ between families: those of BERT and ALBERT have a pooler, which a
masked language model lacks, so it would start from random values; those of RoBERTa, ELECTRA and DistilBERT have one
more random layer; that of ModernBERT reuses a pretrained one. Scores would compare heads instead of encoders.

The recipe is that of Mosbach et al. 2021 ("On the Stability of Fine-tuning BERT", section 6) with a shorter training:
AdamW with bias correction, linear warm-up over a tenth of the updates and linear decay, gradients clipped at 1. The
weights after the last update are evaluated; no setting is chosen on test examples. It runs in the Trainer of
transformers, in bf16 if the device multiplies in bf16. The texts of a batch have similar lengths. Equal seeds give
equal results on one machine with one number of threads.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from megamask.evaluation.encoder import EncoderFolder, load_encoder
from megamask.evaluation.features import EncodedTexts, encode_texts, length_batches, pad_texts, pool_states
from megamask.evaluation.frozen_features import held_out_split
from megamask.evaluation.outcome import Outcome
from megamask.evaluation.scores import collapse_reason, compute_scores, task_score
from megamask.evaluation.settings import EvaluateConfig, FineTuningConfig, Pooling
from megamask.evaluation.tasks import Examples, Task, TaskData
from megamask.hf.masked_lm import pad_id
from megamask.hf.model_folder import load_hf_tokenizer
from megamask.runtime import ranks
from megamask.runtime.precision import precision_here

WARMUP = 0.1
"""Share of the updates in which the learning rate rises."""
CHOICE_SEED = 0
"""Seed of the runs that choose a learning rate; reported runs have seeds from 1 on."""
ORDER_SEEDS = 10_000
"""Added to the seed of a run for the order of its examples, so that weights and order are separate draws (Dodge et al.
2020, "Fine-Tuning Pretrained Language Models")."""
GROUPED_BATCHES = 50
"""Texts are sorted by length within this many batches of an epoch."""


def fine_tune(encoder: EncoderFolder, data: TaskData, config: EvaluateConfig, seed: int) -> Outcome:
    """Train on ``data.train``, predict ``data.test``. ``seed`` draws the new layer, dropout and the order.

    Without a learning rate, each of ``learning_rates`` trains on nine tenths of the training examples and is scored on
    the rest; this is computed once in a process for all seeds. A run whose loss becomes NaN or Inf stops and is a
    collapse. Raises CheckpointError if the encoder cannot be loaded.
    """
    tuning, choice = config.fine_tuning, dict[float, float]()
    if tuning.learning_rate is None:
        choice = held_out_scores(encoder, data, config)
        tuning = replace(tuning, learning_rate=max(choice, key=lambda rate: (choice[rate], -rate)))
    outcome = _train_and_predict(encoder, data, replace(config, fine_tuning=tuning), seed)
    tried = {f"held_out_score/{rate:g}": score for rate, score in choice.items()}
    return replace(outcome, metrics={**outcome.metrics, **tried})


def held_out_scores(encoder: EncoderFolder, data: TaskData, config: EvaluateConfig) -> dict[float, float]:
    """The score of each of ``learning_rates`` on the held-out tenth of the training examples, with a fixed seed."""
    texts = hashlib.sha256(repr((data.train.texts, data.train.labels.tolist())).encode()).hexdigest()
    return dict(_compute_held_out_scores(_Choice(encoder, data.task, texts, config, data)))


@dataclass(frozen=True)
class _Choice:
    """What decides a learning rate; ``data`` is identified by ``texts``, its hash."""

    encoder: EncoderFolder
    task: Task
    texts: str
    config: EvaluateConfig
    data: TaskData = field(compare=False)


@lru_cache(maxsize=64)
def _compute_held_out_scores(choice: _Choice) -> tuple[tuple[float, float], ...]:
    train, scores = choice.data.train, []
    fit, choose = (_subset(train, rows) for rows in held_out_split(choice.task, train))
    for rate in choice.config.fine_tuning.learning_rates:
        config = replace(choice.config, fine_tuning=replace(choice.config.fine_tuning, learning_rate=rate))
        outcome = _train_and_predict(choice.encoder, replace(choice.data, train=fit, test=choose), config, CHOICE_SEED)
        scores.append((rate, task_score(outcome.scores)))
    return tuple(scores)


def _subset(examples: Examples, rows: np.ndarray) -> Examples:
    return Examples(tuple(examples.texts[row] for row in rows), examples.labels[rows])


# ---- one run


@dataclass(frozen=True)
class UpdatePlan:
    """The size of a run: how many updates of how many texts."""

    batch_size: int
    updates: int

    @classmethod
    def of(cls, examples: int, tuning: FineTuningConfig) -> UpdatePlan:
        """That of a task with ``examples`` training examples."""
        batch_size = tuning.batch_size or (16 if examples < 4000 else 32)
        epochs = tuning.epochs or (10 if examples < 10_000 else 3)
        return cls(batch_size, max(epochs * math.ceil(examples / batch_size), tuning.min_updates))


class TextClassifier(nn.Module):
    """An encoder, pooling, dropout and a linear layer; the loss of Trainer.

    The loss is the cross-entropy of the classes, each example with weight 1, or the squared error of one number.
    """

    accepts_loss_kwargs = False  # else Trainer would pass the number of labels to the encoder

    def __init__(self, encoder: PreTrainedModel, outputs: int, pooling: Pooling, dropout: float):
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.dropout, self.output = nn.Dropout(dropout), nn.Linear(encoder.config.hidden_size, outputs)
        nn.init.normal_(self.output.weight, std=0.02)
        nn.init.zeros_(self.output.bias)
        self.losses: list[Tensor] = []

    def forward(self, labels: Float[Tensor, " B"] | None = None, **inputs: Int64[Tensor, "B L"]) -> dict[str, Tensor]:
        """``logits`` (B, outputs), and ``loss`` if there are ``labels``. Raises FloatingPointError for NaN and Inf."""
        states = self.encoder(**inputs).last_hidden_state
        pooled = pool_states(states, inputs["attention_mask"].bool(), self.pooling)
        logits = self.output(self.dropout(pooled)).float()
        if labels is None:
            return {"logits": logits}
        if self.output.out_features == 1:
            loss = nn.functional.mse_loss(logits[:, 0], labels)
        else:
            loss = nn.functional.cross_entropy(logits, labels.long())
        if not loss.isfinite():
            raise FloatingPointError(f"the loss of update {len(self.losses) + 1} is NaN or Inf")
        self.losses.append(loss.detach())
        return {"loss": loss, "logits": logits}


def _train_and_predict(encoder: EncoderFolder, data: TaskData, config: EvaluateConfig, seed: int) -> Outcome:
    """One run with the learning rate of ``config``."""
    begin, tuning, labels = time.perf_counter(), config.fine_tuning, data.train.labels
    assert tuning.learning_rate is not None
    body, tokenizer = load_encoder(encoder, tuning.dropout), load_hf_tokenizer(encoder.folder)
    longest = min(config.max_length, encoder.max_length)
    train, test = (encode_texts(tokenizer, body, part.texts, longest) for part in (data.train, data.test))
    plan = UpdatePlan.of(len(data.train), tuning)
    torch.manual_seed(seed)
    # numbers are learned in units of their spread, so that one learning rate suits every task
    center, scale = (0.0, 1.0) if data.task.labels else (float(labels.mean()), float(labels.std()) or 1.0)
    model = TextClassifier(body, len(data.task.labels) or 1, config.pooling, tuning.dropout)
    model.to(ranks.device())
    bf16 = precision_here("auto", "precision").precision == "bf16"
    batches = grouped_batches(train.lengths, plan, np.random.default_rng(seed + ORDER_SEEDS))
    metrics: dict[str, float] = {
        "learning_rate": tuning.learning_rate,
        "batch_size": plan.batch_size,
        "updates": plan.updates,
        "max_length": longest,
        "truncated_train": train.truncated,
        "truncated_test": test.truncated,
        "weights_seed": seed,
        "order_seed": seed + ORDER_SEEDS,
        "bf16": bf16,
        "classes_without_training_example": len(data.task.labels) and len(data.task.labels) - len(np.unique(labels)),
    }
    stopped = ""
    try:
        _train(model, train, torch.from_numpy((labels - center) / scale).float(), batches, plan, tuning, seed, bf16)
    except FloatingPointError as error:
        stopped, predictions = str(error), np.full(len(data.test), np.nan)
    else:
        predictions = _predict(model, test, bf16) * scale + center
    last = model.losses[-max(1, plan.updates // 10) :]
    metrics["final_loss"] = float(torch.stack(last).mean()) if last and not stopped else math.nan
    metrics["train_seconds"] = time.perf_counter() - begin
    scores = compute_scores(data.task, predictions, data.test.labels)
    reason = stopped or collapse_reason(data.task, predictions, data.test.labels, labels)
    return Outcome(predictions, scores, reason, metrics)


def grouped_batches(lengths: Sequence[int], plan: UpdatePlan, order: np.random.Generator) -> list[list[int]]:
    """The rows of each update. An epoch has every row once, in batches of similar length in random order."""
    batches: list[list[int]] = []
    while len(batches) < plan.updates:
        rows = order.permutation(len(lengths))
        size, epoch = plan.batch_size * GROUPED_BATCHES, []
        for begin in range(0, len(rows), size):
            group = sorted(rows[begin : begin + size].tolist(), key=lengths.__getitem__)
            epoch += [group[at : at + plan.batch_size] for at in range(0, len(group), plan.batch_size)]
        batches += [epoch[at] for at in order.permutation(len(epoch))]
    return batches[: plan.updates]


class _OrderedTrainer(Trainer):
    """Trainer with batches in a given order; its own sampler would draw it from the generator of the weights."""

    def __init__(self, model: nn.Module, arguments: TrainingArguments, loader: DataLoader):
        super().__init__(model, arguments, train_dataset=loader.dataset)
        self.loader = loader
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader:
        return self.loader


def _train(
    model: TextClassifier,
    texts: EncodedTexts,
    labels: Float[Tensor, " n"],
    batches: list[list[int]],
    plan: UpdatePlan,
    tuning: FineTuningConfig,
    seed: int,
    bf16: bool,
) -> None:
    pad = pad_id(model.encoder)

    def collate(rows: list[int]) -> dict[str, Tensor]:
        return {**pad_texts(texts, rows, pad), "labels": labels[rows]}

    loader: DataLoader = DataLoader(batches, batch_size=None, collate_fn=collate)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="megamask-fine-tuning-") as folder:
        arguments = trainer_arguments(folder, plan, tuning, seed, bf16=bf16, remove_unused_columns=False)
        _OrderedTrainer(model, arguments, loader).train()


def trainer_arguments(
    folder: str, plan: UpdatePlan, tuning: FineTuningConfig, seed: int, **more: Any
) -> TrainingArguments:
    """What the Trainer of a run must know, with ``more`` of its arguments; ``folder`` stays empty."""
    assert tuning.learning_rate is not None
    return TrainingArguments(
        folder,
        max_steps=plan.updates,
        per_device_train_batch_size=plan.batch_size,
        learning_rate=tuning.learning_rate,
        weight_decay=tuning.weight_decay,
        adam_epsilon=1e-6,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        warmup_steps=round(WARMUP * plan.updates),
        seed=seed,
        use_cpu=ranks.device().type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )


@torch.inference_mode()
def _predict(model: TextClassifier, texts: EncodedTexts, bf16: bool) -> Float[np.ndarray, " n"]:
    """A class or a number for each text; NaN where an output is not finite."""
    device, pad = ranks.device(), pad_id(model.encoder)
    outputs = torch.empty(len(texts.ids), model.output.out_features)
    model.eval()
    for rows in length_batches(texts.lengths):
        batch = {name: values.to(device) for name, values in pad_texts(texts, rows, pad).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            outputs[rows] = model(**batch)["logits"].cpu()
    best = outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(1).float()
    return torch.where(outputs.isfinite().all(1), best, torch.nan).double().numpy()
