"""What guides a run beside its text: how unsure a model is, before masks are chosen; what a teacher says, after.

One source of entropy is in use. Those that may take over after failed audits learn along from the first step, so that
they know something when their turn comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from megamask.batch import Learner, Losses, MaskPlan, PackedBatch, SoftTargets
from megamask.config.pretrain_config import PretrainConfig
from megamask.data.packs import Packs
from megamask.data.shards import Shards
from megamask.engine.engine import Engine
from megamask.entropy.audit import Audit, AuditResult
from megamask.entropy.exact import Average, Exact
from megamask.entropy.frequency import Frequency
from megamask.entropy.probe import Probe
from megamask.entropy.sidecar import SidecarFacts, StoredEntropy, sidecar_facts_of
from megamask.entropy.source import EntropySource, Kind
from megamask.errors import DataError, raise_all
from megamask.runtime import ranks
from megamask.teacher.target_source import TargetSource
from megamask.teacher.teacher import Teacher, TeacherEntropy


class Guidance:
    """The sources of entropy, the watch over them, and the teacher; any of them may be absent."""

    def __init__(
        self,
        sources: Mapping[Kind, EntropySource] | None = None,
        *,
        audit: Audit | None = None,
        teacher: TargetSource | None = None,
        average: Average | None = None,
    ):
        """The first of ``sources`` is in use until ``audit`` says otherwise; ``average`` follows the weights."""
        self._sources, self._audit = dict(sources or {}), audit
        self._teacher, self._average = teacher, average

    @property
    def source(self) -> str:
        """The name of the source in use; empty if there is none."""
        return self._audit.source if self._audit else next(iter(self._sources), "")

    def entropies(self, batches: Sequence[PackedBatch], *, wanted: bool) -> list[Float[Tensor, " T"] | None]:
        """How unsure the source in use is of each row of each pack; None if it is not ``wanted``, or there is none."""
        if not wanted or not self._sources:
            return [None] * len(batches)
        return list(self._sources[self.source](batches))  # type: ignore[index]

    def targets(
        self, batches: Sequence[PackedBatch], plans: Sequence[MaskPlan], progress: float
    ) -> list[SoftTargets | None]:
        """What the teacher says of each pack under its plan; None while it is not asked."""
        if self._teacher is None:
            return [None] * len(batches)
        return self._teacher.targets(batches, plans, progress)

    def update(self, batch: PackedBatch, plan: MaskPlan, losses: Losses) -> None:
        """After each micro-step: show all sources what the loss said."""
        for source in self._sources.values():
            source.update(batch, plan, losses)

    def sync(self) -> None:
        """Once per step, after the weights moved. Collective."""
        for learner in self._learners().values():
            learner.sync()

    def audit(self, step: int, batch: PackedBatch, share: float) -> AuditResult | None:
        """Hold the source in use against the exact signal on ``batch``, if ``step`` is one for it. Collective."""
        if self._audit is None or not self._audit.due(step):
            return None
        (found,) = self.entropies([batch], wanted=True)
        assert found is not None
        return self._audit(batch, found, share)

    def _learners(self) -> dict[str, Learner]:
        """Sources first, then the audit and the average."""
        after = {"audit": self._audit, "average": self._average}
        named = (*self._sources.items(), *after.items())
        return {name: learner for name, learner in named if learner is not None}

    def state_dict(self) -> dict[str, Tensor]:
        """What was learnt and counted, by name; the same on every rank."""
        return {f"{name}/{key}": t for name, part in self._learners().items() for key, t in part.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there. Collective."""
        for name, part in self._learners().items():
            own = f"{name}/"
            part.load_state_dict({key.removeprefix(own): t for key, t in state.items() if key.startswith(own)})


def sidecar_facts(config: PretrainConfig, shards: Shards) -> SidecarFacts:
    """What the sidecar of entropies beside ``shards`` holds; DataError if it is not there or not what is asked for."""
    record = shards.sidecar_facts("entropy")
    if record is None:
        raise DataError(
            f"`entropy.source` is 'sidecar', but {shards.folder} has no entropies for the split {shards.split!r}. "
            "Write them with `megamask annotate entropy`, or choose another source."
        )
    found = sidecar_facts_of(record, str(shards.folder))
    entropy, size = config.entropy, shards.token_ids.size
    raise_all(DataError, found.problems(entropy.signal, entropy.measure, config.packs.length, size))
    return found


def build_guidance(
    config: PretrainConfig, engine: Engine, packs: Packs, *, teacher: Teacher | None, stored: TargetSource | None
) -> Guidance:
    """All that ``config`` asks for. ``stored`` is what was stored of a teacher, if the run distils from that."""
    distils = (stored or teacher) if config.distill.active else None
    entropy, ids = config.entropy, packs.token_ids
    if entropy.source == "none":
        return Guidance(teacher=distils)
    counts = torch.from_numpy(packs.shards.unigram)
    average = None
    if entropy.ema_decay is not None:
        average = Average(engine.objective, entropy.ema_decay, lambda: dict(engine.local_weights()))

    def ask(batch: PackedBatch, plan: MaskPlan) -> Tensor:
        if average is None:
            return engine.evaluate(batch, plan).entropy
        return average.module(batch, plan, None).entropy

    def probe() -> Probe:
        return Probe(engine.embed, engine.hidden_size, counts, seed=config.seed, device=ranks.device())

    def make(kind: Kind) -> EntropySource:
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
            # of the largest budget of the run, so that shapes stay the same
            ratio = config.masking.ratio
            largest = max(ratio.start, ratio.end or 0, ratio.middle or 0)
            rows = round(entropy.candidates * largest * config.packs.tokens)
            candidates, propose = (lambda: rows), probe()
        return Exact(
            ask, signal=entropy.signal, passes=entropy.num_passes, mask_id=ids.mask, seed=config.seed,
            propose=propose, candidates=candidates,
        )  # fmt: skip

    audit = None
    if entropy.audit.every is not None:
        audit = Audit(
            entropy.audit, entropy.source, ask, Frequency(counts),
            signal=entropy.signal, passes=entropy.num_passes, mask_id=ids.mask, seed=config.seed,
        )  # fmt: skip
    return Guidance({name: make(name) for name in entropy.kinds}, audit=audit, teacher=distils, average=average)
