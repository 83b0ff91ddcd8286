"""The settings of `megamask evaluate`; without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, MinLen

from megamask.errors import must, unknown
from megamask.errors.setting_rules import Count, OnlyFor, Positive, Share, removable

Pooling = Literal["first", "mean"]
Reference = Literal["majority", "bag_of_words", "random_weights"]
TASK_NAMES = (
    "cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "mnli_mismatched", "qnli", "rte", "wnli", "snli", "trec", "subj",
    "squad", "blimp",
)  # fmt: skip
"""The names in `evaluation/tasks.py`, which imports numpy."""


@dataclass(frozen=True)
class FineTuningConfig:
    """Fine-tuning, with the same settings for all tasks. The weights after the last update are evaluated."""

    learning_rate: Positive | None = None
    """Peak learning rate. None: the best of `learning_rates` on a held-out tenth of the training examples."""
    learning_rates: Annotated[tuple[Positive, ...], MinLen(1), OnlyFor("learning_rate", None)] = (
        3e-5, 1e-4, 3e-4, 1e-3,
    )  # fmt: skip
    """Peak learning rates to try if `learning_rate` is None, with a separate seed. 2e-5 to 5e-5 are usual for
    published models of base size; small models from scratch need more (docs/measurements.md)."""
    batch_size: Count | None = None
    """Examples in one update. None: 32, or 16 for a task with fewer than 4,000 training examples."""
    epochs: Count | None = None
    """Passes over the training examples. None: 10 for a task with fewer than 10,000 of them, else 3."""
    min_updates: Count = 600
    """Smallest number of updates: training on a small task is extended to it."""
    dropout: Share = 0.1
    """Dropout before the classifier, and in the encoder where it has dropout."""
    weight_decay: Share = 0.01
    """Weight decay of AdamW."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate an encoder on benchmark tasks, offline.

    Each result is a cell: one JSON file in the output folder. The same command continues where it was stopped, and
    cells of several models may share a folder.
    """

    model: str = ""
    """A run folder of megamask, one of its checkpoints, an exported model, or any encoder of transformers. Empty: only
    the references that need none."""
    output: Path = Path("evaluation")
    """Folder for one JSON file per cell, `results.jsonl` and the table `results.md`."""
    tasks: tuple[str, ...] = ()
    """Names of tasks, as `--list-tasks` shows them. None given: all tasks with files in `data`."""
    data: Path | None = None
    """Folder of the tasks: GLUE's own folders of .tsv files, or JSON lines. None: the dataset `nyu-mll/glue`, from the
    network or the cache of Hugging Face."""
    frozen: bool = False
    """Train a linear model on the features of the frozen encoder instead of fine-tuning all weights."""
    references: tuple[Reference, ...] = ("majority", "bag_of_words")
    """Results to compare with: the largest class as a constant answer; a linear model on the words of the text (for
    minimal pairs, the frequencies of the words); and the same encoder with random weights, which takes as long as the
    model itself."""
    seeds: Count = 1
    """Fine-tuning runs of each task, with the seeds `first_seed`, `first_seed` + 1, ..."""
    first_seed: Count = 1
    """The first of these seeds."""
    pooling: Pooling = "first"
    """The vector of a text: the state of its first token, or the mean over its tokens. With `frozen`, both are
    reported."""
    max_length: Annotated[int, Ge(8)] = 128
    """Largest number of tokens of a text or a pair; longer ones are truncated and counted. Questions with contexts have
    384 tokens, in overlapping windows."""
    max_train: Count | None = None
    """Largest number of training examples of each task, drawn once with a fixed seed. None: all."""
    max_pairs: Count | None = None
    """Largest number of minimal pairs of each paradigm. None: all."""
    workers: Count = 1
    """Number of processes, each of which computes one cell at a time with an equal share of the cores."""
    list_tasks: bool = False
    """Print each task and its files in `data`, then exit."""
    fine_tuning: FineTuningConfig = field(default_factory=FineTuningConfig)

    def problems(self, name: str) -> list[str]:
        """Sentences for what the settings cannot do together."""
        problems = [unknown(task, TASK_NAMES, "`tasks`") for task in self.tasks if task not in TASK_NAMES]
        for setting in ("tasks", "references"):
            values = getattr(self, setting)
            problems += [f"`{setting}` names {each!r} twice." for each in values if values.count(each) > 1][:1]
        if self.data is not None and not self.data.is_dir():
            problems.append(must("data", "be a folder with task files", str(self.data)))
        file = next((path for path in (self.output, *self.output.parents) if path.exists()), self.output)
        if file.exists() and not file.is_dir():
            problems.append(must("output", "be a folder", str(file)))
        if not self.list_tasks:
            problems += self._model_problems()
        return [*problems, *self._without_effect()]

    def _model_problems(self) -> list[str]:
        if self.model:
            return []
        if not self.references:
            return ["`model` must name an encoder: a run folder, an exported model, or a name on the Hugging Face Hub."]
        if "random_weights" in self.references:
            return ["The reference `random_weights` must know the encoder: set `model`."]
        return []

    def _without_effect(self) -> Iterator[str]:
        tuned, rules = ["seeds", "first_seed", "pooling"], [each.name for each in fields(self.fine_tuning)]
        if self.frozen:
            why = "has no effect with `frozen`, which fine-tunes nothing"
            yield from removable(self, tuned, "", why, "Remove one of them.")
            yield from removable(self.fine_tuning, rules, "fine_tuning", why, "Remove one of them.")
        if self.tasks and "blimp" not in self.tasks:
            yield from removable(self, ["max_pairs"], "", "has no effect without the task `blimp`")
        if self.tasks == ("blimp",):
            why = "has no effect on `blimp`, which trains nothing"
            unused = ["frozen", "max_length", "max_train", *([] if self.frozen else tuned)]
            yield from removable(self, unused, "", why)
            if not self.frozen:
                yield from removable(self.fine_tuning, rules, "fine_tuning", why)
