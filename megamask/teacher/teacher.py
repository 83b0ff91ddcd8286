"""A teacher: a frozen masked language model that gives soft targets for distillation, and entropies of the text.

These need two passes. Entropies are computed on the clean text (or with each token masked in turn), soft targets on the
*masked* text that the student sees, because on the clean text the teacher sees the answers. An entropy sidecar
(`megamask annotate entropy`) replaces the first pass, stored samples (`megamask annotate targets`) the second.

The teacher computes no logits for the targets: soft targets are its states and its output matrix, and the student's
loss forms the logits of both models in chunks. Costs per pack: the encoder's forward pass for soft targets; that and
the head at every token for entropies. Memory: one copy of the teacher, whole or partitioned (`engine.frozen`), and its
output matrix, whole on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from megamask.batch import Layout, MaskPlan, Measure, PackedBatch, SoftTargets, TokenIds
from megamask.data.compare_tokenizers import tokenizer_cure, tokenizer_differences
from megamask.engine.frozen_teacher import FrozenEngine
from megamask.engine.teacher_ds_file import teacher_ds_problems
from megamask.entropy import exact
from megamask.entropy.source import EntropyConfig, EntropySource, Signal, source_packs
from megamask.errors import ConfigError, must, raise_all
from megamask.hf.masked_lm import HFMaskedLM
from megamask.masking.rng import PackRng
from megamask.model import statistics
from megamask.runtime import ranks
from megamask.runtime.precision import DTYPES, PrecisionChoice, PrecisionSupport, common_support
from megamask.teacher import frozen_lm
from megamask.teacher.frozen_lm import MaskedLM
from megamask.teacher.settings import DistillConfig as DistillConfig
from megamask.teacher.settings import TeacherConfig as TeacherConfig
from megamask.teacher.target_source import distill_scale

NEVER = -1e4
"""The logit of a token that the teacher does not have: its probability is 0, and 0 times this is 0."""


def teacher_precision(config: TeacherConfig, support: PrecisionSupport) -> PrecisionChoice:
    """The precision of the teacher on devices with ``support``."""
    return PrecisionChoice("`teacher.precision`", config.precision, support)


class Teacher:
    """A frozen model. Partitioned by DeepSpeed, every method is collective, with the same number of packs per rank."""

    def __init__(
        self, model: MaskedLM, config: TeacherConfig, distill: DistillConfig, ids: TokenIds, fingerprint: str = ""
    ):
        """``model`` is changed in place and must not be used elsewhere.

        ``fingerprint``: sha256 of the weights that were loaded. When a run resumes, the path may contain another
        model, such as a newer checkpoint.
        """
        self.config, self.distill, self.ids, self.fingerprint = config, distill, ids, fingerprint
        dtype, device = DTYPES[teacher_precision(config, common_support()).precision], ranks.device()
        self.bias = model.bias.to(device, copy=True)  # a view would keep the whole file in memory
        self.module = model.states
        partitioned = config.deepspeed is not None
        if partitioned:
            # before DeepSpeed partitions the table; whole on every rank, because the student's loss reads it in chunks
            self.weight = model.weight.to(device, dtype, copy=True)
        if isinstance(model.states, HFMaskedLM):
            model.states.one_batch = partitioned
        ds = teacher_ds_problems("teacher.deepspeed", config.deepspeed)[0] if config.deepspeed else None
        table = next((n for n, p in model.states.named_parameters() if p.data_ptr() == model.weight.data_ptr()), None)
        self._states = FrozenEngine(model.states, ds, dtype)
        if not partitioned and table:
            # most models share one table between embedding and output; it is kept once
            self.weight = model.states.get_parameter(table).detach()[: len(model.weight)]
        elif not partitioned:
            self.weight = model.weight.to(device, dtype)

    @classmethod
    def load(
        cls,
        config: TeacherConfig,
        distill: DistillConfig,
        *,
        tokenizer: Path,
        ids: TokenIds,
        length: int,
        vocab_size: int | None = None,
    ) -> Teacher:
        """The teacher at ``config.path``.

        ``tokenizer`` is the folder of the run's, ``length`` its longest sequence, ``vocab_size`` the rows of the
        student's token table (by default as many as ``ids`` has). Further rows of the teacher's table are cut off;
        tokens that it lacks get probability 0. Raises ConfigError if it does not fit the run, CheckpointError or
        DataError for files that are missing or corrupt.
        """
        assert config.path is not None
        model = frozen_lm.read_masked_lm(config.path, "teacher.path")
        raise_all(ConfigError, teacher_misfits(model, config.path, tokenizer, ids, length))
        fingerprint = model.fingerprint()
        return cls(_resized(model, vocab_size or ids.size), config, distill, ids, fingerprint)

    # ---- soft targets

    def targets(
        self, batches: Sequence[PackedBatch], plans: Sequence[MaskPlan], progress: float
    ) -> list[SoftTargets | None]:
        """The soft targets of each pack under its plan; None, without a pass, while the weight is 0."""
        share = self.distill.weight(progress)
        if share == 0:
            return [None] * len(batches)
        everywhere = self.distill.positions == "all"
        rows = [_text_rows(batch, self.ids) for batch in batches] if everywhere else [plan.targets for plan in plans]
        hidden = self._states_at(batches, [plan.inputs for plan in plans], rows)
        return [
            SoftTargets(
                share,
                self.distill.temperature,
                distill_scale(self.distill, batch, plan, len(at), self.ids),
                rows=at if everywhere else None,
                hidden=states,
                weight=self.weight,
                bias=self.bias,
            )
            for batch, plan, at, states in zip(batches, plans, rows, hidden, strict=True)
        ]

    # ---- entropies

    def entropy_at(self, batch: PackedBatch, plan: MaskPlan, measure: Measure) -> Float[Tensor, " M"]:
        """The measure at the targets of ``plan``, in nats."""
        return self._entropies_at([(batch, plan)], measure)[0]

    def entropies(
        self, batches: Sequence[PackedBatch], signal: Signal, passes: int, measure: Measure, *, seed: int
    ) -> list[Float[Tensor, " _T"]]:
        """The measure at every token of each batch, in nats: `exact.measure_entropy`, several packs per pass.

        ``passes`` and ``seed`` matter only for the masked signal. Batches with the same text share one computation.
        """
        texts = {source_packs(batch): batch for batch in batches}
        # the plans of all texts first, so that several go through the model together
        questions = [
            (batch, plan)
            for text, batch in texts.items()
            for plan in exact.entropy_plans(batch, signal, passes, self.ids.mask, PackRng(seed, text, exact.PURPOSE))
        ]
        entropies = {text: torch.zeros(b.layout.rows, device=b.tokens.device) for text, b in texts.items()}
        for (batch, plan), values in zip(questions, self._entropies_at(questions, measure), strict=True):
            entropies[source_packs(batch)][plan.targets] = values.float()
        return [entropies[source_packs(batch)] for batch in batches]

    def _entropies_at(self, questions: Sequence[tuple[PackedBatch, MaskPlan]], measure: Measure) -> list[Tensor]:
        batches, plans = [batch for batch, _ in questions], [plan for _, plan in questions]
        states = self._states_at(batches, [plan.inputs for plan in plans], [plan.targets for plan in plans])
        return [
            statistics.logit_entropies(rows, self.weight, self.bias, plan.labels, measure)
            for rows, plan in zip(states, plans, strict=True)
        ]

    # ---- passes

    def _states_at(
        self,
        batches: Sequence[PackedBatch],
        inputs: Sequence[Int64[Tensor, " _T"]],
        rows: Sequence[Int64[Tensor, " _Q"]],
    ) -> list[Float[Tensor, "_Q D"]]:
        """The states at ``rows`` of each pack for its ``inputs``, with ``packs_per_pass`` packs in each pass."""
        result: list[Tensor] = []
        for begin in range(0, len(batches), self.config.packs_per_pass):
            some = slice(begin, begin + self.config.packs_per_pass)
            layout, begins = join_packs([batch.layout for batch in batches[some]])
            joined = [each + first for each, first in zip(rows[some], begins, strict=True)]
            states = self._states(torch.cat(list(inputs[some])), layout, torch.cat(joined))
            result += states.split([len(each) for each in joined])
        return result

    def close(self) -> None:
        """Free the memory that DeepSpeed uses."""
        self._states.close()


class TeacherEntropy(EntropySource):
    """A teacher as a source of entropy."""

    def __init__(self, teacher: Teacher, config: EntropyConfig, seed: int):
        self.teacher, self.config, self.seed = teacher, config, seed

    def __call__(self, batches: Sequence[PackedBatch]) -> list[Float[Tensor, " _T"]]:
        """The measure at each token, in nats."""
        config = self.config
        return self.teacher.entropies(batches, config.signal, config.num_passes, config.measure, seed=self.seed)


def join_packs(layouts: Sequence[Layout]) -> tuple[Layout, list[int]]:
    """One layout of several packs one after the other, and the position at which each begins."""
    begins, ends, total = [], [layouts[0].cu_seqlens[:1]], 0
    for layout in layouts:
        begins.append(total)
        ends.append(layout.cu_seqlens[1:] + total)
        total += layout.rows
    longest = max(layout.max_seqlen for layout in layouts)
    positions = torch.cat([layout.positions for layout in layouts])
    bounds = None if positions.is_cpu else np.concatenate([layout.host_lengths for layout in layouts])
    return Layout(torch.cat(ends), longest, positions, bounds), begins


def _text_rows(batch: PackedBatch, ids: TokenIds) -> Int64[Tensor, " Q"]:
    size = int((batch.on_host.tokens != ids.pad).sum())
    return torch.nonzero_static(batch.tokens != ids.pad, size=size).squeeze(1)


def teacher_misfits(model: MaskedLM, path: str, tokenizer: Path, ids: TokenIds, length: int) -> list[str]:
    """Sentences for why ``model``, the teacher at ``path``, does not fit a run; the arguments of `Teacher.load`."""
    different = tokenizer_differences(model.tokenizer, "teacher.path", tokenizer, "data's tokenizer")
    problems = list(different)
    if different:
        cure = tokenizer_cure(model.tokenizer, "teacher.path")
        problems.append(f"{cure} Or choose a teacher with the tokenizer of the text.")
    if model.other_modules:
        problems.append(
            f"`teacher.path` is {path}, a run whose encoder has never seen [MASK]: only its "
            f"{model.other_modules[0]} did. Train a run of the kind 'mlm' from it (`init`) first, or use another "
            "model."
        )
    if not different and len(model.weight) < ids.size:
        problems.append(
            f"`teacher.path` has logits for {len(model.weight)} tokens, but its tokenizer has {ids.size} tokens. "
            "They do not belong together."
        )
    if model.longest is not None and length > model.longest:
        rule = f"be at most {model.longest}, the number of positions of `teacher.path`"
        problems.append(must("packs.length", rule, length))
    return problems


def _resized(model: MaskedLM, vocab_size: int) -> MaskedLM:
    """``model`` with logits for exactly ``vocab_size`` tokens."""
    weight, bias, missing = model.weight[:vocab_size], model.bias[:vocab_size], vocab_size - len(model.weight)
    if missing > 0:
        weight = nn.functional.pad(weight, (0, 0, 0, missing))
        bias = nn.functional.pad(bias, (0, missing), value=NEVER)
    return MaskedLM(model.states, weight, bias, model.longest, model.tokenizer)
