"""A teacher: a frozen masked language model that says how unsure it is of each token, and what it would put there.

Those are two passes. Entropy is asked of the clean text (or of each token hidden in its turn), what the student shall
learn of the *masked* text that the student sees: on the clean text a teacher sees the answer. An entropy sidecar
(`megamask annotate entropy`) saves the first pass, stored samples (`megamask annotate targets`) the second.

Nothing of the vocabulary's size is computed here for the targets: they are the teacher's states with its output matrix,
and the student's loss forms both sides' logits in chunks. Costs per pack: the encoder's forward pass for the targets;
that and the head at every row for the entropy; in memory one copy of the teacher, whole or cut up (`engine.frozen`),
and its output matrix, whole on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from megamask.batch import Layout, MaskPlan, Measure, PackedBatch, SoftTargets, TokenIds
from megamask.data.compare_tokenizers import differences
from megamask.engine import ds_file
from megamask.engine.frozen import FrozenEngine
from megamask.entropy import exact
from megamask.entropy.source import EntropyConfig, EntropyFn, EntropySource, Signal, source_packs
from megamask.errors import ConfigError, must, raise_all
from megamask.hf.masked_lm import HFMaskedLM
from megamask.masking.rng import PackRng
from megamask.model import statistics
from megamask.runtime import ranks
from megamask.runtime.precision import DTYPES, Choice, Support, common_support
from megamask.teacher import frozen_lm
from megamask.teacher.frozen_lm import MaskedLM
from megamask.teacher.settings import DistillConfig as DistillConfig
from megamask.teacher.settings import TeacherConfig as TeacherConfig

NEVER = -1e4
"""The logit of a token that the teacher does not have: its probability is 0, and 0 times it is 0."""


def teacher_precision(config: TeacherConfig, support: Support) -> Choice:
    """The precision of the teacher on devices with ``support``."""
    return Choice("`teacher.precision`", config.precision, support)


class Teacher:
    """A frozen model. Cut up by DeepSpeed, every method is collective: all ranks bring the same number of packs."""

    fingerprint = ""
    """sha256 of the weights that were loaded: a path may hold another model when a run goes on, such as a newer
    checkpoint."""

    def __init__(self, model: MaskedLM, config: TeacherConfig, distill: DistillConfig, ids: TokenIds):
        """``model`` is changed in place and must not be used elsewhere."""
        self.config, self.distill, self.ids = config, distill, ids
        dtype, device = DTYPES[teacher_precision(config, common_support()).precision], ranks.device()
        self.bias = model.bias.to(device)
        cut_up = config.deepspeed is not None
        if cut_up:
            # before DeepSpeed takes the table apart; whole on every rank, for the student's loss reads it in chunks
            self.weight = model.weight.to(device, dtype, copy=True)
        if isinstance(model.states, HFMaskedLM):
            model.states.one_batch = cut_up
        ds = ds_file.teacher_problems("teacher.deepspeed", config.deepspeed)[0] if config.deepspeed else None
        table = next((n for n, p in model.states.named_parameters() if p.data_ptr() == model.weight.data_ptr()), None)
        self._states = FrozenEngine(model.states, ds, dtype)
        if not cut_up and table:
            # most have one table for the embedding and the output; it is held once
            self.weight = model.states.get_parameter(table).detach()[: len(model.weight)]
        elif not cut_up:
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

        Raises ConfigError if it does not fit the run, CheckpointError or DataError if files are missing or damaged.

        ``tokenizer`` is the folder of the run's, ``length`` its longest sequence, ``vocab_size`` the rows of the
        student's token table (as many as ``ids`` has if not given). Rows of the teacher's beyond that, which pad its
        table, are cut off; tokens that it lacks get no probability.
        """
        assert config.path is not None
        model = frozen_lm.read_masked_lm(config.path, "teacher.path")
        differ = differences(model.tokenizer, "teacher.path", tokenizer, "data's tokenizer")
        found = list(differ)
        if model.other_modules:
            found.append(
                f"`teacher.path` is {config.path}, a run whose encoder has never seen [MASK]: only its "
                f"{model.other_modules[0]} did. Train a run of the kind 'mlm' from it (`init`) first, or use another "
                "model."
            )
        if not differ and len(model.weight) < ids.size:
            found.append(
                f"`teacher.path` gives {len(model.weight)} tokens a logit, but its tokenizer has {ids.size} tokens. "
                "They do not belong together."
            )
        if model.longest is not None and length > model.longest:
            found.append(must("packs.length", f"be at most {model.longest}, the positions of `teacher.path`", length))
        raise_all(ConfigError, found)
        fingerprint = model.fingerprint()
        teacher = cls(_fitted(model, vocab_size or ids.size), config, distill, ids)
        teacher.fingerprint = fingerprint
        return teacher

    # ---- what the student shall learn

    def targets(
        self, batches: Sequence[PackedBatch], plans: Sequence[MaskPlan], progress: float
    ) -> list[SoftTargets | None]:
        """What the teacher says of each pack under its plan; None, without a pass, while the weight is 0."""
        share = self.distill.weight(progress)
        if share == 0:
            return [None] * len(batches)
        everywhere = self.distill.positions == "all"
        rows = [_text_rows(batch, self.ids) for batch in batches] if everywhere else [plan.targets for plan in plans]
        hidden = self._at(batches, [plan.inputs for plan in plans], rows)
        return [
            SoftTargets(
                share,
                self.distill.temperature,
                distill_scale(self.distill, batch, plan, len(where), self.ids),
                rows=where if everywhere else None,
                hidden=states,
                weight=self.weight,
                bias=self.bias,
            )
            for batch, plan, where, states in zip(batches, plans, rows, hidden, strict=True)
        ]

    # ---- how unsure it is

    def ask(self, measure: Measure) -> EntropyFn:
        """The measure at the targets of a plan, in nats."""

        def answer(batch: PackedBatch, plan: MaskPlan) -> Float[Tensor, " M"]:
            return self._measures([(batch, plan)], measure)[0]

        return answer

    def entropies(
        self, batches: Sequence[PackedBatch], signal: Signal, passes: int, measure: Measure, *, seed: int
    ) -> list[Float[Tensor, " _T"]]:
        """The measure at every row of each batch, in nats: `exact.measure_entropy`, several packs a sweep.

        ``passes`` and ``seed`` matter for the masked signal alone. Batches of one text share theirs.
        """
        texts = {source_packs(batch): batch for batch in batches}
        questions: list[tuple[PackedBatch, MaskPlan]] = []

        def note(batch: PackedBatch, plan: MaskPlan) -> Float[Tensor, " M"]:
            questions.append((batch, plan))
            return torch.zeros(len(plan.targets), device=plan.targets.device)

        # first all questions are collected, so that several can go through the model at once
        found = {}
        for text, batch in texts.items():
            rng = PackRng(seed, text, exact.PURPOSE)
            found[text] = exact.measure_entropy(note, batch, signal, passes, self.ids.mask, rng)
        for (batch, plan), said in zip(questions, self._measures(questions, measure), strict=True):
            found[source_packs(batch)][plan.targets] = said.float()
        return [found[source_packs(batch)] for batch in batches]

    def _measures(self, questions: Sequence[tuple[PackedBatch, MaskPlan]], measure: Measure) -> list[Tensor]:
        batches = [batch for batch, _ in questions]
        states = self._at(batches, [p.inputs for _, p in questions], [p.targets for _, p in questions])
        return [
            statistics.logit_entropies(rows, self.weight, self.bias, plan.labels, measure)
            for rows, (_, plan) in zip(states, questions, strict=True)
        ]

    # ---- sweeps

    def _at(
        self,
        batches: Sequence[PackedBatch],
        inputs: Sequence[Int64[Tensor, " _T"]],
        rows: Sequence[Int64[Tensor, " _Q"]],
    ) -> list[Float[Tensor, "_Q D"]]:
        """The states at ``rows`` of each pack when the model reads ``inputs``; a pass for each sweep of packs."""
        found: list[Tensor] = []
        for begin in range(0, len(batches), self.config.packs_per_pass):
            some = slice(begin, begin + self.config.packs_per_pass)
            layout, begins = join_packs([batch.layout for batch in batches[some]])
            asked = [each + first for each, first in zip(rows[some], begins, strict=True)]
            states = self._states(torch.cat(list(inputs[some])), layout, torch.cat(asked))
            found += states.split([len(each) for each in asked])
        return found

    def close(self) -> None:
        """Let go of the memory that DeepSpeed holds."""
        self._states.close()


class TeacherEntropy(EntropySource):
    """A teacher as a source of entropy."""

    def __init__(self, teacher: Teacher, config: EntropyConfig, seed: int):
        self.teacher, self.config, self.seed = teacher, config, seed

    def __call__(self, batches: Sequence[PackedBatch]) -> list[Float[Tensor, " _T"]]:
        """The measure at each row, in nats."""
        config = self.config
        return self.teacher.entropies(batches, config.signal, config.num_passes, config.measure, seed=self.seed)


def join_packs(layouts: Sequence[Layout]) -> tuple[Layout, list[int]]:
    """One layout of several packs laid one behind the other, and the row at which each begins."""
    begins, ends, total = [], [layouts[0].cu_seqlens[:1]], 0
    for layout in layouts:
        begins.append(total)
        ends.append(layout.cu_seqlens[1:] + total)
        total += layout.rows
    longest = max(layout.max_seqlen for layout in layouts)
    return Layout(torch.cat(ends), longest, torch.cat([layout.positions for layout in layouts])), begins


def _text_rows(batch: PackedBatch, ids: TokenIds) -> Int64[Tensor, " Q"]:
    return (batch.tokens != ids.pad).nonzero().squeeze(1)


def distill_scale(distill: DistillConfig, batch: PackedBatch, plan: MaskPlan, rows: int, ids: TokenIds) -> float:
    """What makes the sum over rows, divided by the number of targets, the mean that `reduction` names."""
    if distill.reduction == "token":
        return len(plan.targets) / rows
    starts = batch.layout.cu_seqlens[:-1][batch.layout.lengths > 0].long()
    sequences = int((batch.tokens[starts] != ids.pad).sum())
    return len(plan.targets) / sequences


def _fitted(model: MaskedLM, size: int) -> MaskedLM:
    """``model`` with logits for exactly ``size`` tokens."""
    weight, bias, lacking = model.weight[:size], model.bias[:size], size - len(model.weight)
    if lacking > 0:
        weight = nn.functional.pad(weight, (0, 0, 0, lacking))
        bias = nn.functional.pad(bias, (0, lacking), value=NEVER)
    return MaskedLM(model.states, weight, bias, model.longest, model.tokenizer)
