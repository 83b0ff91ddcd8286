"""transformers' example ``run_mlm``: ``BertForMaskedLM`` with head and loss at every position, under ``Trainer``.

Two forms of its input: texts concatenated and cut into full blocks, or each text alone, its end cut off, padded to the
longest of its batch. ``Trainer`` needs the package accelerate; without it the same step is taken by hand. Sequences
are lists in memory, which is faster than the example's Arrow files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling

from megamask.batch import TokenIds
from megamask.bench.measure import Clock, Round, Variant, is_text_file
from megamask.bench.settings import BenchConfig
from megamask.data import tokenizer
from megamask.data.formats.lines import BadDocument, FileWarning
from megamask.data.inputs import find_inputs
from megamask.data.read_documents import ReadOptions, normalize_text, read_documents
from megamask.data.shards import Shards
from megamask.errors import DataError
from megamask.model.shape import EncoderShape
from megamask.runtime import ranks
from megamask.runtime.precision import Precision

Example = dict[str, list[int]]
"""``input_ids`` and ``special_tokens_mask`` of a sequence with its [CLS] and [SEP]."""


def trainer_variants(
    config: BenchConfig,
    shards: Shards,
    lines: Iterable[np.ndarray],
    precisions: Sequence[Precision],
    *,
    trainer: bool,
) -> list[Variant]:
    """The forms in each of ``precisions``; ``lines`` are the texts to pad. ``trainer``: under Trainer, else by hand."""
    batch = config.rows // config.length
    wanted = config.needed * batch
    ids, kind, word = (
        shards.token_ids,
        (TrainerVariant if trainer else ManualVariant),
        ("Trainer" if trainer else "by hand"),
    )
    examples = {
        "concatenated": _examples(concatenated(bench_documents(shards), ids, config.length), ids, wanted),
        "padded": _examples(alone(lines, ids, config.length), ids, wanted),
    }
    kinds = [(form, precision, False) for precision in precisions for form in examples]
    if config.compile:
        kinds.append(("concatenated", precisions[-1], True))
    return [
        kind(
            f"{word}, {form}, {precision}" + ", compiled" * compiled,
            BertForMaskedLM(trainer_settings(config.model("bert").shape(ids), config.dropout)),
            examples[form],
            Collator(shards.folder / "tokenizer", config.ratio),
            batch,
            bf16=precision == "bf16",
            compiled=compiled,
        )
        for form, precision, compiled in kinds
    ]


def trainer_settings(shape: EncoderShape, dropout: float | None) -> BertConfig:
    said = BertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_positions,
        pad_token_id=shape.pad_id,
    )
    if dropout is not None:
        said.hidden_dropout_prob = said.attention_probs_dropout_prob = dropout
    return said


# ---- sequences


def bench_documents(shards: Shards) -> Iterator[Int64[np.ndarray, " n"]]:
    """The ids of each document."""
    for part, offsets in zip(shards.parts, shards.offsets(), strict=True):
        for begin, end in pairwise(offsets):
            yield part[begin:end].astype(np.int64)


def text_lines(path: Path, shards: Shards) -> Iterator[Int64[np.ndarray, " n"]]:
    """The ids of each line of a raw text that is not blank; raises DataError."""
    said = tokenizer.load_tokenizer(shards.folder / "tokenizer")
    for source in find_inputs([str(path)]).sources:
        with source.open() as raw:
            for found in read_documents(source, ReadOptions(), raw):
                if isinstance(found, BadDocument):
                    raise DataError(found.problem)
                if isinstance(found, FileWarning):
                    continue
                raw_text = found if isinstance(found, str) else found.text
                yield from said.encode([line for line in normalize_text(raw_text).splitlines() if line.strip()])


def concatenated(texts: Iterable[np.ndarray], ids: TokenIds, length: int) -> Iterator[Int64[np.ndarray, " L"]]:
    """All texts, each with [CLS] and [SEP], one behind the other and cut every ``length`` rows; no rest."""
    left = np.empty(0, np.int64)
    for one in texts:
        left = np.concatenate([left, [ids.cls], one, [ids.sep]])
        while len(left) >= length:
            yield left[:length]
            left = left[length:]


def alone(texts: Iterable[np.ndarray], ids: TokenIds, length: int) -> Iterator[Int64[np.ndarray, " l"]]:
    """Each text between [CLS] and [SEP], at most ``length`` rows; what is longer is lost."""
    return (np.concatenate([[ids.cls], one[: length - 2], [ids.sep]]) for one in texts)


def _examples(sequences: Iterator[np.ndarray], ids: TokenIds, wanted: int) -> list[Example]:
    """The first ``wanted``; fewer where the text has no more."""
    counted = is_text_file(ids)
    found = [
        {"input_ids": one.tolist(), "special_tokens_mask": (~counted[one]).astype(int).tolist()}
        for one in islice(sequences, wanted)
    ]
    if not found:
        raise DataError("The text does not fill one sequence. Give more text, or lower `length`.")
    return found


class Collator:
    """Theirs, with a note of what each batch held."""

    def __init__(self, folder: Path, ratio: float):
        said = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._collate = DataCollatorForLanguageModeling(said, mlm_probability=ratio)
        self._held: list[tuple[int, int, int]] = []

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        tokens = sum(len(one["input_ids"]) - sum(one["special_tokens_mask"]) for one in examples)
        batch = self._collate([dict(one) for one in examples])
        self._held.append((tokens, batch["input_ids"].numel(), int((batch["labels"] != -100).sum())))
        return batch

    def round(self, clock: Clock, steps: int) -> Round:
        """The ``steps`` after the first. Batches that were made ahead and never used do not count."""
        tokens, rows, targets = np.sum(self._held[1 : 1 + steps], axis=0).tolist()
        self._held.clear()
        return Round(tokens, rows, targets, clock.wall, clock.cpu)


# ---- steps


class TrainerVariant:
    """Under Trainer. Every round is a call of ``train``, which goes on with the weights but begins all else anew."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        examples: list[Example],
        collate: Collator,
        batch: int,
        *,
        bf16: bool,
        compiled: bool,
    ):
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        self.name, self._examples, self._collate, self._batch = name, examples, collate, batch
        self._turn, self._clock = 0, Clock()
        self._folder = tempfile.TemporaryDirectory(prefix="megamask-bench-")
        clock = self._clock

        class Stopwatch(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                if state.global_step == 1:
                    clock.start()
                elif state.global_step == state.max_steps:
                    clock.stop()

        arguments = TrainingArguments(
            self._folder.name,
            per_device_train_batch_size=batch,
            bf16=bf16,
            torch_compile=compiled,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,  # or the collator would have to look for special tokens itself
        )
        self._trainer = Trainer(
            model, arguments, data_collator=collate, train_dataset=examples, callbacks=[Stopwatch()]
        )
        self._trainer.remove_callback(PrinterCallback)

    def run(self, steps: int) -> Round:
        self._trainer.args.max_steps = steps + 1
        self._trainer.train_dataset = _part(self._examples, self._turn, (steps + 1) * self._batch)
        self._turn += 1
        self._trainer.train()
        return self._collate.round(self._clock, steps)


class ManualVariant:
    """The Trainer's step without it: autocast, its optimizer and clipping."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        examples: list[Example],
        collate: Collator,
        batch: int,
        *,
        bf16: bool,
        compiled: bool,
    ):
        self.name, self._examples, self._collate, self._batch, self._bf16 = name, examples, collate, batch, bf16
        self._turn = 0
        self._model = model.to(ranks.device()).train()
        self._run: Any = torch.compile(model) if compiled else model
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0, fused=True)

    def run(self, steps: int) -> Round:
        clock, device = Clock(), ranks.device()
        examples = _part(self._examples, self._turn, (steps + 1) * self._batch)
        self._turn += 1
        for step in range(steps + 1):
            batch = self._collate(examples[step * self._batch : (step + 1) * self._batch])
            with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
                loss = self._run(**{name: values.to(device) for name, values in batch.items()}).loss
            loss.backward()
            nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
            if step == 0:
                clock.start()
        clock.stop()
        return self._collate.round(clock, steps)


def _part(examples: list[Example], turn: int, number: int) -> list[Example]:
    """The examples of a round, from the beginning again when there are no more."""
    return [examples[at % len(examples)] for at in range(turn * number, (turn + 1) * number)]
