"""Settings of a teacher and of distillation, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megamask.engine.teacher_ds_file import teacher_ds_problems
from megamask.entropy.settings import EntropyConfig
from megamask.errors import Removable, must
from megamask.errors.setting_rules import Count, OnlyFor, Positive, removable
from megamask.runtime.precision_choice import Setting
from megamask.schedules import Schedule


@dataclass(frozen=True)
class TeacherConfig:
    """A frozen model beside the student, with the tokenizer of the run."""

    path: str | None = None
    """A run of megamask (its newest checkpoint) or one of its checkpoints, initial weights, or the folder or Hub
    name of any masked language model of transformers; None: no teacher."""
    precision: Annotated[Setting, OnlyFor("path")] = "auto"
    """Precision of its weights and states: bf16, fp32, or auto: bf16 if all devices multiply in it, else fp32. Logits
    and losses are always fp32."""
    deepspeed: Annotated[Path | None, OnlyFor("path")] = None
    """DeepSpeed file that partitions it: teacher_shard in ds_configs/ distributes it over the ranks, teacher_offload
    keeps it on the host. Without a file, every device has the whole teacher."""
    packs_per_pass: Annotated[Count, OnlyFor("path")] = 1
    """Packs of a step in one forward pass of the teacher. With `deepspeed`, each pass moves all weights, so fewer
    passes are faster. Memory for activations grows with it."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what is wrong with its DeepSpeed file."""
        if self.path is None or self.deepspeed is None:
            return []
        return teacher_ds_problems(f"{name}.deepspeed", self.deepspeed)[1]


@dataclass(frozen=True)
class DistillConfig:
    """Distillation: with weight w and temperature t, the loss of a pack of M targets is

        (1 - w) x sum of nll + w x t^2 x scale x sum of KL(teacher || student),

    both distributions softened by t (Hinton et al. 2015), and the step takes the mean over all targets.
    """

    weight: Schedule = field(default_factory=lambda: Schedule(start=0.0))
    """w over the run, from 0 (only labels; no pass of the teacher) to 1 (only the teacher)."""
    temperature: Positive = 1.0
    """t; above 1 the unlikely tokens count for more."""
    positions: Literal["targets", "all"] = "targets"
    """Where teacher and student are compared: at the targets, or at every token of text, including [CLS] and
    [SEP]. Both see the masked text. `all` costs the head at every token, for both models."""
    reduction: Literal["token", "sequence"] = "token"
    """`token`: the mean of KL over those tokens. `sequence`: its sum over the tokens of a sequence, and the mean of
    that over the sequences of a pack, like PyTorch's KLDivLoss with reduction='batchmean' on (batch, length,
    vocabulary): the weight of the teacher grows with the length of the sequences. In a pack they are pieces of
    documents, not blocks of one length."""
    stored: Path | None = None
    """Folder of stored samples of a teacher at the targets of masks fixed in advance (`megamask annotate targets`);
    then no teacher is run."""

    @property
    def active(self) -> bool:
        """Whether the weight is ever above 0."""
        return any(value is not None and value > 0 for value in (self.weight.start, self.weight.end))

    def problems(self, name: str) -> list[str]:
        """Sentences for what two settings cannot do together."""
        problems = self.weight.range_problems(f"{name}.weight", 0, 1, closed=True)
        if not self.active:
            why, cure = f"has no effect while `{name}.weight` is 0", "Remove it or set that."
            return problems + removable(self, ("temperature", "positions", "reduction", "stored"), name, why, cure)
        if self.stored is not None and self.positions == "all":
            problems.append(must(f"{name}.positions", f"be 'targets' with `{name}.stored`", self.positions))
        return problems


def teacher_problems(teacher: TeacherConfig, distill: DistillConfig, entropy: EntropyConfig) -> list[str]:
    """Sentences for what the three sections cannot do together."""
    gives_entropies = "teacher" in entropy.kinds
    gives_targets = distill.active and distill.stored is None
    problems = []
    if teacher.path is None and gives_entropies:
        problems.append("`entropy.source` 'teacher' needs `teacher.path`. Name a model.")
    if teacher.path is None and gives_targets:
        problems.append("`distill.weight` above 0 needs `teacher.path` or `distill.stored`. Set one, or remove it.")
    if teacher.path is not None and not gives_entropies and not gives_targets:
        why = "has no effect: neither `entropy.source` is 'teacher' nor `distill.weight` above 0"
        why += " without `distill.stored`" if distill.stored else ""
        problems.append(Removable("teacher.path", why, None))
    return problems
