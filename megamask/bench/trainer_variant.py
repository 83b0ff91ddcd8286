"""transformers' example ``run_mlm``: ``BertForMaskedLM`` with head and loss at every position, under ``Trainer``.

Its input has two forms: texts concatenated and cut into full blocks, or each text for itself, truncated, and padded to
the longest of its batch. Sequences are lists in memory, which is faster than the Arrow files of the example.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling

from megamask.batch import TokenIds
from megamask.bench.measure import Clock, Round, Variant, text_token_mask
from megamask.bench.settings import COMPILED, BenchConfig
from megamask.data import tokenizer
from megamask.data.formats.lines import BadDocument, FileWarning
from megamask.data.inputs import find_inputs
from megamask.data.read_documents import ReadOptions, normalize_text, read_documents
from megamask.data.shards import Shards
from megamask.errors import DataError
from megamask.model.shape import EncoderShape
from megamask.runtime.cpu_memory import return_freed_memory
from megamask.runtime.precision import Precision

Example = dict[str, list[int]]
"""``input_ids`` and ``special_tokens_mask`` of a sequence with its [CLS] and [SEP]."""


def trainer_variants(
    config: BenchConfig, shards: Shards, texts: Iterable[np.ndarray], precisions: Sequence[Precision]
) -> list[Variant]:
    """Both forms of input in each of ``precisions``; ``texts`` are those to pad."""
    batch_size, ids = config.pack_tokens // config.length, shards.token_ids
    count = config.needed * batch_size
    examples = {
        "concatenated": _examples(concatenated(bench_documents(shards), ids, config.length), ids, count),
        "padded": _examples(truncated(texts, ids, config.length), ids, count),
    }
    kinds = [(form, precision, False) for precision in precisions for form in examples]
    if config.compile:
        kinds.append(("concatenated", precisions[-1], True))
    variants: list[Variant] = []
    for form, precision, compiled in kinds:
        setup = TrainerSetup(
            f"{form}, {precision}" + COMPILED * compiled,
            BertForMaskedLM(bert_config(config.model("bert").shape(ids), config.dropout)),
            examples[form],
            CountingCollator(shards.folder / "tokenizer", config.ratio),
            batch_size,
            bf16=precision == "bf16",
            compiled=compiled,
        )
        variants.append(TrainerVariant(setup))
    return variants


def bert_config(shape: EncoderShape, dropout: float | None) -> BertConfig:
    """BERT of the same ``shape``; without ``dropout`` it has BERT's own."""
    config = BertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_positions,
        pad_token_id=shape.pad_id,
    )
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    return config


# ---- sequences


def bench_documents(shards: Shards) -> Iterator[Int64[np.ndarray, " n"]]:
    """The ids of each document."""
    for part, offsets in zip(shards.parts, shards.offsets(), strict=True):
        for begin, end in pairwise(offsets):
            yield part[begin:end].astype(np.int64)


def text_lines(path: Path, shards: Shards) -> Iterator[Int64[np.ndarray, " n"]]:
    """The ids of each line of a raw text that is not blank; raises DataError."""
    encoder = tokenizer.load_tokenizer(shards.folder / "tokenizer")
    for source in find_inputs([str(path)]).sources:
        with source.open() as file:
            for document in read_documents(source, ReadOptions(), file):
                if isinstance(document, BadDocument):
                    raise DataError(document.problem)
                if isinstance(document, FileWarning):
                    continue
                text = normalize_text(document if isinstance(document, str) else document.text)
                yield from encoder.encode([line for line in text.splitlines() if line.strip()])


def concatenated(texts: Iterable[np.ndarray], ids: TokenIds, length: int) -> Iterator[Int64[np.ndarray, " L"]]:
    """All texts, each with [CLS] and [SEP], one after the other in blocks of ``length``; the last tokens are lost."""
    buffer = np.empty(0, np.int64)
    for text in texts:
        buffer = np.concatenate([buffer, [ids.cls], text, [ids.sep]])
        while len(buffer) >= length:
            yield buffer[:length]
            buffer = buffer[length:]


def truncated(texts: Iterable[np.ndarray], ids: TokenIds, length: int) -> Iterator[Int64[np.ndarray, " l"]]:
    """Each text between [CLS] and [SEP], truncated to ``length``."""
    return (np.concatenate([[ids.cls], text[: length - 2], [ids.sep]]) for text in texts)


def _examples(sequences: Iterator[np.ndarray], ids: TokenIds, count: int) -> list[Example]:
    """The first ``count``; fewer if the text has no more."""
    counted = text_token_mask(ids)
    examples = [
        {"input_ids": sequence.tolist(), "special_tokens_mask": (~counted[sequence]).astype(int).tolist()}
        for sequence in islice(sequences, count)
    ]
    if not examples:
        raise DataError("The text does not fill one sequence. Give more text, or lower `length`.")
    return examples


class CountingCollator:
    """The collator of the example, which counts the contents of each batch."""

    def __init__(self, folder: Path, ratio: float):
        fast_tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._collate = DataCollatorForLanguageModeling(fast_tokenizer, mlm_probability=ratio)
        self._counts: list[tuple[int, int, int]] = []

    def __call__(self, examples: list[Example]) -> Any:
        tokens = sum(len(example["input_ids"]) - sum(example["special_tokens_mask"]) for example in examples)
        batch = self._collate([dict(example) for example in examples])
        self._counts.append((tokens, batch["input_ids"].numel(), int((batch["labels"] != -100).sum())))
        return batch

    def round(self, clock: Clock, steps: int) -> Round:
        """The ``steps`` after the first. Batches that were loaded ahead and never used do not count."""
        tokens, rows, targets = np.sum(self._counts[1 : 1 + steps], axis=0).tolist()
        self._counts.clear()
        return Round(tokens, rows, targets, clock.wall, clock.cpu)


# ---- steps


def one_device_arguments() -> Any:
    """`TrainingArguments` of one GPU, as megamask in one process: the Trainer would use all that it sees."""
    from transformers import TrainingArguments

    class OneDeviceArguments(TrainingArguments):
        @property
        def n_gpu(self) -> int:
            return min(1, super().n_gpu)

    return OneDeviceArguments


@dataclass(frozen=True)
class TrainerSetup:
    """What a variant trains."""

    name: str
    model: nn.Module
    examples: list[Example]
    collate: CountingCollator
    batch_size: int
    bf16: bool
    compiled: bool

    def examples_of(self, number: int, steps: int) -> list[Example]:
        """The examples of round ``number``, from the beginning again when there are no more."""
        count = steps * self.batch_size
        return [self.examples[at % len(self.examples)] for at in range(number * count, (number + 1) * count)]


class TrainerVariant:
    """Under Trainer. Every round is a call of ``train``, which keeps the weights but nothing else.

    accelerate has one state in a process, with the precision of the newest Trainer and whether it is compiled, and
    reads it when ``train`` begins. So each variant puts its own state back before each round.
    """

    def __init__(self, setup: TrainerSetup):
        from transformers import PrinterCallback, Trainer, TrainerCallback

        self.name, self._setup, self._round = f"Trainer, {setup.name}", setup, 0
        self._folder = tempfile.TemporaryDirectory(prefix="megamask-bench-")
        self._clock = clock = Clock()

        class Stopwatch(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                if state.global_step == 1:
                    clock.start()
                elif state.global_step == state.max_steps:
                    clock.stop()

        arguments = one_device_arguments()(
            self._folder.name,
            per_device_train_batch_size=setup.batch_size,
            bf16=setup.bf16,
            torch_compile=setup.compiled,
            tf32=False,  # `torch_compile` would turn it on for all variants of this process
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,  # or the collator would have to find special tokens itself
        )
        self._trainer = Trainer(
            setup.model, arguments, data_collator=setup.collate, train_dataset=setup.examples, callbacks=[Stopwatch()]
        )
        self._trainer.remove_callback(PrinterCallback)
        self._state = dict(vars(self._trainer.accelerator.state))

    def run(self, steps: int) -> Round:
        return_freed_memory()  # a run of megamask keeps it, and the Trainer in a process of its own would not
        vars(self._trainer.accelerator.state).update(self._state)
        self._trainer.args.max_steps = steps + 1
        self._trainer.train_dataset = self._setup.examples_of(self._round, steps + 1)
        self._round += 1
        self._trainer.train()
        return self._setup.collate.round(self._clock, steps)
