"""The settings of a teacher and of what is learnt from it; without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megamask.engine import ds_file
from megamask.entropy.settings import EntropyConfig
from megamask.errors import Removable, must
from megamask.errors.rules import Count, OnlyFor, Positive, removable
from megamask.runtime.precision_choice import Setting
from megamask.schedules import Schedule


@dataclass(frozen=True)
class TeacherConfig:
    """A frozen model beside the student, with the tokenizer of the run."""

    path: str | None = None
    """A run of megamask (its newest checkpoint) or one of its checkpoints, first weights, or the folder or hub name of
    any masked language model of transformers; None: no teacher."""
    precision: Annotated[Setting, OnlyFor("path")] = "auto"
    """Of its weights and states: bf16, fp32, or auto, which is bf16 where all devices multiply in it, else fp32. Logits
    and losses have 32 bits in any case."""
    deepspeed: Annotated[Path | None, OnlyFor("path")] = None
    """DeepSpeed file that cuts it up: teacher_shard of ds_configs/ shares it out among the ranks,
    teacher_offload keeps it on the host. Without one, every device holds it whole."""
    packs_per_pass: Annotated[Count, OnlyFor("path")] = 1
    """Packs of a step that go through it together: fewer and larger passes, of which each moves all weights when
    `deepspeed` cuts it up. Memory for activations grows with it."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what is wrong with its DeepSpeed file."""
        if self.path is None or self.deepspeed is None:
            return []
        return ds_file.teacher_problems(f"{name}.deepspeed", self.deepspeed)[1]


@dataclass(frozen=True)
class DistillConfig:
    """What the student learns from the teacher: with weight w and temperature t, the loss of a pack of M targets is

        (1 - w) x sum of nll + w x t^2 x scale x sum of KL(teacher || student),

    both distributions softened by t (Hinton et al. 2015), and the step takes the mean over all targets.
    """

    weight: Schedule = field(default_factory=lambda: Schedule(start=0.0))
    """w over the run, from 0 (labels alone; no pass of the teacher) to 1 (the teacher alone)."""
    temperature: Positive = 1.0
    """t; above 1 the unlikely tokens count for more."""
    positions: Literal["targets", "all"] = "targets"
    """Where teacher and student are compared: at the targets, or at every row of text, [CLS] and [SEP] too. Both see
    the masked text. `all` costs the head at every row, of both."""
    reduction: Literal["token", "sequence"] = "token"
    """`token`: the mean of KL over those rows. `sequence`: its sum over the rows of a sequence, and the mean of that
    over the sequences of a pack, which is what PyTorch's KLDivLoss with reduction='batchmean' makes of (batch, length,
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
    asked = "teacher" in entropy.kinds
    learns = distill.active and distill.stored is None
    found = []
    if teacher.path is None and asked:
        found.append("`entropy.source` 'teacher' needs `teacher.path`. Name a model.")
    if teacher.path is None and learns:
        found.append("`distill.weight` above 0 needs `teacher.path` or `distill.stored`. Name one, or leave it out.")
    if teacher.path is not None and not asked and not learns:
        why = "has no effect: neither `entropy.source` is 'teacher' nor `distill.weight` above 0"
        why += " without `distill.stored`" if distill.stored else ""
        found.append(Removable("teacher.path", why, None))
    return found
