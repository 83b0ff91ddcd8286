"""Settings of `megamask annotate`, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from megamask.basic_types import Measure
from megamask.entropy.settings import Signal
from megamask.errors.setting_rules import Count, CountOrZero, OnlyFor
from megamask.runtime.precision_choice import Setting


@dataclass(frozen=True)
class EntropyAnnotation:
    """Store a teacher's entropy of every token, a byte each, beside the shards.

    Runs that use it set `entropy.source` to 'sidecar'.
    """

    data: Path
    """Folder of token shards; the sidecar goes beside them."""
    teacher: str
    """A run of megamask (its newest checkpoint) or one of its checkpoints, initial weights, or the folder or Hub
    name of any masked language model of transformers."""
    signal: Signal = "masked"
    """`masked`: each token is hidden once, in `num_passes` groups; `clean`: nothing is hidden."""
    measure: Measure = "shannon"
    """How unsure a prediction is: shannon, renyi, min, margin or loss."""
    num_passes: Annotated[Count, OnlyFor("signal", "masked")] = 4
    """Groups of tokens that are hidden one after the other, in one pass each."""
    length: Annotated[int, Ge(8)] = 512
    """Longest sequence in tokens, including special tokens; `packs.length` of the runs that will use it."""
    precision: Setting = "auto"
    """Precision of the teacher's weights and states: bf16, fp32, or auto: bf16 if the device multiplies in it, else
    fp32."""
    workers: CountOrZero = 0
    """Number of processes; 0 is one per GPU, or one per core without a GPU. The result does not depend on it."""


@dataclass(frozen=True)
class SampleAnnotation:
    """How many samples of a teacher to store; everything else is in the configuration of the run."""

    draws: Annotated[int, Ge(1), Le(255)] = 32
    """Tokens to draw from the teacher's distribution at each target, with replacement."""
    packs: Count | None = None
    """Number of packs, from pack 0; by default as many as the run needs."""
    workers: CountOrZero = 0
    """Number of processes; 0 is one per GPU, or one per core without a GPU. The result does not depend on it."""
