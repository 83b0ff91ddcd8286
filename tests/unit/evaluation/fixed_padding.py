"""Fine-tune as `run_glue.py` of transformers does, beside `fine_tune`: CPU seconds and scores.

`python -m tests.unit.evaluation.fixed_padding MODEL TASKS_DATA TASK MAX_TRAIN EPOCHS` needs about 5 minutes of a core
for a model of 4 layers of width 128, `sst2`, 2,000 examples and 3 epochs. `run_glue.py` pads each text to 128 tokens,
draws the order of the examples itself and has the head of `AutoModelForSequenceClassification`; its Trainer, updates,
learning rate, batch size and test examples are those of `fine_tune`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PrinterCallback, Trainer

from megamask.evaluation.encoder import EncoderFolder, open_encoder
from megamask.evaluation.fine_tuning import UpdatePlan, fine_tune, trainer_arguments
from megamask.evaluation.formats.rows import limit_train
from megamask.evaluation.read_tasks import find_tasks, read_task
from megamask.evaluation.scores import compute_scores, task_score
from megamask.evaluation.settings import EvaluateConfig, FineTuningConfig
from megamask.evaluation.tasks import Examples, TaskData
from megamask.hf.model_folder import load_hf_tokenizer

LENGTH = 128
"""Tokens of each padded text: the default of `run_glue.py`."""
TEST_BATCH = 8
"""Texts of a batch without gradients: its default too."""


def score_with_fixed_padding(encoder: EncoderFolder, data: TaskData, config: EvaluateConfig, seed: int) -> float:
    """The score after as many updates as `fine_tune` makes."""
    tuning, plan = config.fine_tuning, UpdatePlan.of(len(data.train), config.fine_tuning)
    tokenizer = load_hf_tokenizer(encoder.folder)

    def padded(examples: Examples) -> list[dict[str, Any]]:
        columns = [list(column) for column in zip(*examples.texts, strict=True)]
        encoded = tokenizer(*columns, padding="max_length", max_length=LENGTH, truncation=True)
        inputs = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        return [each | {"labels": int(label)} for each, label in zip(inputs, examples.labels, strict=True)]

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(encoder.folder, num_labels=len(data.task.labels))
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer_arguments(folder, plan, tuning, seed, per_device_eval_batch_size=TEST_BATCH)
        trainer = Trainer(model, arguments, train_dataset=padded(data.train))  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logits = trainer.predict(padded(data.test)).predictions  # type: ignore[arg-type]
    return task_score(compute_scores(data.task, logits.argmax(1).astype(float), data.test.labels))


def main(model: str, tasks_data: str, task: str, max_train: int, epochs: int) -> None:
    """Print the CPU seconds and the score of each way, for two seeds."""
    (files,) = find_tasks(Path(tasks_data), (task,)).tasks
    data = limit_train(read_task(files), max_train)
    tuning = FineTuningConfig(learning_rate=2e-4, dropout=0.0, epochs=epochs, min_updates=1)
    config = EvaluateConfig(model=model, fine_tuning=tuning)
    mean = replace(config, pooling="mean")
    ways = {
        "fixed padding": lambda seed: score_with_fixed_padding(encoder, data, config, seed),
        "fine_tune, first token": lambda seed: task_score(fine_tune(encoder, data, config, seed).scores),
        "fine_tune, mean": lambda seed: task_score(fine_tune(encoder, data, mean, seed).scores),
    }
    with tempfile.TemporaryDirectory() as cache:
        encoder = open_encoder(model, Path(cache))
        for seed in (1, 2):
            for name, score_with in ways.items():
                begin = time.process_time()
                score = 100 * score_with(seed)
                print(f"{name:22}  seed {seed}  {time.process_time() - begin:6.1f} s  {score:.1f} %", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:6]))
