"""Settings of `megamask annotate`, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from megamask.basic_types import Measure
from megamask.entropy.settings import Signal
from megamask.errors.rules import Count, CountOrZero, OnlyFor
from megamask.runtime.precision_choice import Setting


@dataclass(frozen=True)
class EntropyAnnotation:
    """Store a teacher's entropy of every token, a byte each, beside the shards.

    Runs that use it set `entropy.source` to 'sidecar'.
    """

    data: Path
    """Folder of token shards; the sidecar goes beside them."""
    teacher: str
    """A run of megamask (its newest checkpoint) or one of its checkpoints, first weights, or the folder or hub name of
    any masked language model of transformers."""
    signal: Signal = "masked"
    """`masked`: each token is hidden once, in `num_passes` groups; `clean`: nothing is hidden."""
    measure: Measure = "shannon"
    """How unsure a prediction is: shannon, renyi, min, margin or loss."""
    num_passes: Annotated[Count, OnlyFor("signal", "masked")] = 4
    """Groups in which the tokens are hidden one after the other."""
    length: Annotated[int, Ge(8)] = 512
    """Longest sequence in tokens, special tokens included: `packs.length` of the runs that will use it."""
    precision: Setting = "auto"
    """Of the teacher's weights and states: bf16, fp32, or auto, which is bf16 where the device multiplies in it, else
    fp32."""
    workers: CountOrZero = 0
    """Processes; 0 is one for each GPU, or for each core where there is none. The result does not depend on it."""


@dataclass(frozen=True)
class SampleAnnotation:
    """How much of a teacher is stored; the run's own configuration says the rest."""

    draws: Annotated[int, Ge(1), Le(255)] = 32
    """Tokens drawn from the teacher's distribution at each target, with replacement."""
    packs: Count | None = None
    """Packs, from number 0; as many as the run asks about if not given."""
    workers: CountOrZero = 0
    """Processes; 0 is one for each GPU, or for each core where there is none. The result does not depend on it."""
