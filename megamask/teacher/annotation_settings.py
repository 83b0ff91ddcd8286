"""Settings of `megamask annotate`, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megamask.basic_types import Measure
from megamask.entropy.settings import Signal
from megamask.errors import must
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
    """`masked`: each token is hidden once, in `passes` groups; `clean`: nothing is hidden."""
    measure: Measure = "shannon"
    """How unsure a prediction is: shannon, renyi, min, margin or loss."""
    num_passes: int = 4
    """Groups in which the tokens are hidden one after the other, for `masked`."""
    length: int = 512
    """Longest sequence in rows, special tokens included: `packs.length` of the runs that will use it."""
    precision: Setting = "auto"
    """Of the teacher's weights and states: bf16, fp32, or auto, which is bf16 where the device multiplies in it, else
    fp32."""
    workers: int = 0
    """Processes; 0 is one for each GPU, or for each core where there is none. The result does not depend on it."""

    def problems(self) -> list[str]:
        """Sentences for what is wrong."""
        found = [must("num_passes", "be at least 1", self.num_passes)] if self.num_passes < 1 else []
        if self.signal == "clean" and self.num_passes != EntropyAnnotation.num_passes:
            found.append("`passes` has an effect on the signal 'masked' alone. Remove it.")
        if self.length < 8:
            found.append(must("length", "be at least 8", self.length))
        return found + _workers(self.workers)


@dataclass(frozen=True)
class SampleAnnotation:
    """How much of a teacher is stored; the run's own configuration says the rest."""

    draws: int = 32
    """Tokens drawn from the teacher's distribution at each target, with replacement; at most 255."""
    packs: int | None = None
    """Packs, from number 0; as many as the run asks about if not given."""
    workers: int = 0
    """Processes; 0 is one for each GPU, or for each core where there is none. The result does not depend on it."""

    def problems(self) -> list[str]:
        """Sentences for what is wrong."""
        found = [] if 1 <= self.draws <= 255 else [must("draws", "lie between 1 and 255", self.draws)]
        if self.packs is not None and self.packs < 1:
            found.append(must("packs", "be at least 1", self.packs))
        return found + _workers(self.workers)


def _workers(workers: int) -> list[str]:
    return [must("workers", "be 0 or more", workers)] if workers < 0 else []
