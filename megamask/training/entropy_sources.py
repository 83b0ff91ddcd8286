"""The entropy sources of a run: the one in use, those that may replace it, and the audit that decides.

All of them learn from the first step on, so that a source that takes over after failed audits is ready.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from megamask.batch import Learner, MaskPlan, PackedBatch
from megamask.config.pretrain_config import PretrainConfig
from megamask.data.mixed_sources import TextPacks
from megamask.data.shards import Shards
from megamask.engine.engine import Engine
from megamask.entropy.audit import Audit
from megamask.entropy.exact import Average, Exact
from megamask.entropy.frequency import Frequency
from megamask.entropy.probe import Probe
from megamask.entropy.sidecar import SidecarFacts, StoredEntropy, sidecar_facts_of
from megamask.entropy.source import EntropySource, Kind
from megamask.errors import DataError, raise_all
from megamask.runtime import ranks
from megamask.teacher.teacher import Teacher, TeacherEntropy


@dataclass(frozen=True)
class EntropySources:
    """The sources of a run by name, possibly none. The first is in use until ``audit`` replaces it."""

    sources: Mapping[Kind, EntropySource] = field(default_factory=dict)
    audit: Audit | None = None
    average: Average | None = None
    """The moving average of the weights that the exact source and the audit evaluate, instead of the model."""

    @property
    def in_use(self) -> str:
        """The name of the source in use; empty if there is none."""
        return self.audit.source if self.audit else next(iter(self.sources), "")

    def __call__(self, batches: Sequence[PackedBatch]) -> list[Float[Tensor, " T"]]:
        """The entropy of each token of each pack by the source in use, in nats."""
        return self.sources[self.in_use](batches)  # type: ignore[index]

    def learners(self) -> dict[str, Learner]:
        """All that learn, by their names in a checkpoint; sources first."""
        after = {"audit": self.audit, "average": self.average}
        named = (*self.sources.items(), *after.items())
        return {name: learner for name, learner in named if learner is not None}


def sidecar_facts(config: PretrainConfig, shards: Shards) -> SidecarFacts:
    """What the sidecar of entropies beside ``shards`` holds; DataError if it is missing or does not fit ``config``."""
    record = shards.sidecar_facts("entropy")
    if record is None:
        raise DataError(
            f"`entropy.source` is 'sidecar', but {shards.folder} has no entropies for the split {shards.split!r}. "
            "Write them with `megamask annotate entropy`, or choose another source."
        )
    facts = sidecar_facts_of(record, str(shards.folder))
    entropy, size = config.entropy, shards.token_ids.size
    raise_all(DataError, facts.problems(entropy.signal, entropy.measure, config.packs.length, size))
    return facts


def build_entropy_sources(
    config: PretrainConfig, engine: Engine, packs: TextPacks, teacher: Teacher | None
) -> EntropySources:
    """The sources and the audit that ``config`` names. Raises DataError for a sidecar that does not fit."""
    entropy, ids = config.entropy, packs.token_ids
    if entropy.source == "none":
        return EntropySources()
    counts = torch.from_numpy(packs.shards.unigram)
    average = None
    if entropy.ema_decay is not None:
        average = Average(engine.objective, entropy.ema_decay, lambda: dict(engine.local_weights()))

    def entropy_at(batch: PackedBatch, plan: MaskPlan) -> Tensor:
        if average is None:
            return engine.evaluate(batch, plan).entropy
        return average.module(batch, plan, None).entropy

    def probe() -> Probe:
        return Probe(engine.embed, engine.hidden_size, counts, seed=config.seed, device=ranks.device())

    def build(kind: Kind) -> EntropySource:
        if kind == "frequency":
            return Frequency(counts)
        if kind == "probe":
            return probe()
        if kind == "sidecar":
            return StoredEntropy(sidecar_facts(config, packs.shards))
        if kind == "teacher":
            assert teacher is not None
            return TeacherEntropy(teacher, entropy, config.seed)
        candidates, propose = None, None
        if entropy.candidates is not None:
            # by the largest budget of the run, so that shapes stay the same
            ratio = config.masking.ratio
            largest = max(ratio.start, ratio.end or 0)
            candidates = round(entropy.candidates * largest * config.packs.tokens)
            propose = probe()
        return Exact(
            entropy_at, signal=entropy.signal, passes=entropy.num_passes, mask_id=ids.mask, seed=config.seed,
            propose=propose, candidates=candidates,
        )  # fmt: skip

    audit = None
    if entropy.audit.every is not None:
        audit = Audit(
            entropy.audit, entropy.source, entropy_at, Frequency(counts),
            signal=entropy.signal, passes=entropy.num_passes, mask_id=ids.mask, seed=config.seed,
        )  # fmt: skip
    return EntropySources({name: build(name) for name in entropy.kinds}, audit, average)
