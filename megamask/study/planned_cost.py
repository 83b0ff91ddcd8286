"""What a run of a study costs, before it runs: its text, its FLOPs, and the number of steps of a budget."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megamask.config.phases import RunPhase, run_phases, run_tokens
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.settings import MixtureConfig
from megamask.config.sources import data_folders, split_shares
from megamask.data.shards import Shards
from megamask.errors import ConfigError, must
from megamask.training.flops import PackFlops, forward_flops
from megamask.training.source_order import mean_shares, source_order

MOST_STEPS = 10_000_000
"""Upper bound of the steps of a run with a time budget."""


def planned_folders(data: object) -> list[str]:
    """The words that name folders of token shards in a plan: a folder, or those of a mixture, perhaps with shares."""
    if isinstance(data, list | tuple) and all(isinstance(word, str | Path) for word in data):
        return [str(word) for word in data]
    if not isinstance(data, str | Path):
        raise ConfigError(must("data", "be a folder, or the list of the folders of a mixture", data))
    return [] if str(data) in ("", ".") else [str(data)]


def folders_of_words(words: Sequence[str]) -> tuple[Path, ...]:
    """The folders that ``words`` name, without their shares."""
    return data_folders(split_shares(tuple(map(Path, words)), MixtureConfig())[0])


class Texts:
    """The shards of a study by folder, opened once."""

    def __init__(self) -> None:
        self._opened: dict[Path, Shards] = {}
        self._squares: dict[tuple[Path, int], float] = {}

    def open(self, folder: Path) -> Shards:
        """The training split in ``folder``; DataError if it is not prepared text."""
        if folder not in self._opened:
            self._opened[folder] = Shards.open(folder)
        return self._opened[folder]

    def squares_per_token(self, folder: Path, length: int) -> float:
        """The sum of the squared lengths of all sequences over the sum of their lengths, special tokens included."""
        if (folder, length) not in self._squares:
            total = squares = 0
            for offsets in self.open(folder).offsets():
                for document in (offsets[1:] - offsets[:-1]).tolist():
                    whole, rest = divmod(document, length - 2)
                    pieces = [length] * whole + ([rest + 2] if rest else [])
                    total += sum(pieces)
                    squares += sum(piece**2 for piece in pieces)
            self._squares[folder, length] = squares / max(total, 1)
        return self._squares[folder, length]

    def squares_of(self, folders: Sequence[Path], shares: Sequence[float], config: PretrainConfig) -> dict[int, float]:
        """`squares_per_token` by the length of sequences, for each length of a run with ``config``.

        Of several ``folders`` it is their mean by ``shares``.
        """
        return {
            length: math.fsum(
                share * self.squares_per_token(folder, length) for folder, share in zip(folders, shares, strict=True)
            )
            for length in {phase.length for phase in run_phases(config).phases}
        }

    def squares_of_run(self, config: PretrainConfig) -> dict[int, float]:
        """`squares_of` the text of a run with ``config``; the size of a source of a mixture is that of its tokens."""
        folders = data_folders(config.data)
        if len(folders) == 1:
            return self.squares_of(folders, (1.0,), config)
        order = source_order(config, [self.open(folder).tokens for folder in folders])
        return self.squares_of(folders, mean_shares(config, order).tolist(), config)


def mean_step_flops(config: PretrainConfig, pack: PackFlops, squares: Mapping[int, float]) -> dict[str, float]:
    """FLOPs of a mean step of the run by part, and `logits`, which is a part of `student`.

    ``squares`` is that of `Texts.squares_of`. Schedules are averaged over the steps of each phase.
    """
    phases, steps = run_phases(config).phases, config.steps
    sums = dict.fromkeys(("student", "scoring", "teacher", "logits"), 0.0)
    ends = [min(phase.first_step, steps) for phase in phases[1:]] + [steps]
    for phase, end in zip(phases, ends, strict=True):
        span = phase.first_step / steps, end / steps
        if span[1] > span[0]:
            for name, value in _phase_flops(config, pack, phase, span, squares[phase.length]).items():
                sums[name] += (span[1] - span[0]) * value
    return sums


def _phase_flops(
    config: PretrainConfig, pack: PackFlops, phase: RunPhase, span: tuple[float, float], squares: float
) -> dict[str, float]:
    """FLOPs of a mean step of ``phase``, which lasts over the ``span`` of progress."""
    packs, masks_per_text, points = config.packs, config.packs.masks_per_text, 64
    tokens, steps = float(packs.tokens), config.steps
    pairs = squares * tokens
    sums = dict.fromkeys(("student", "scoring", "teacher", "logits"), 0.0)
    source = config.entropy.source
    for point in range(points):
        progress = span[0] + (span[1] - span[0]) * ((point + 0.5) / points)
        targets = config.masking.targets(progress, packs.tokens, phase.mask_ratio)
        with_teacher = config.distill.weight(progress) > 0 and config.distill.stored is None
        scored = source != "none" and config.masking.score == "entropy" and config.masking.random_share(progress) < 1
        sums["student"] += pack.student(tokens, pairs, targets, with_teacher=with_teacher)
        sums["logits"] += pack.logits(tokens if with_teacher and config.distill.positions == "all" else targets)
        sums["teacher"] += pack.distillation(tokens, pairs, targets) if with_teacher else 0.0
        sums["scoring"] += pack.scoring(source, tokens, pairs) / masks_per_text if scored else 0.0
        sums["scoring"] += pack.learning(int(progress * steps), tokens)
        every = config.entropy.audit.every
        if scored and every is not None:
            sums["scoring"] += pack.audit(source, tokens, pairs) / every / phase.per_step
    return {name: value / points * phase.per_step for name, value in sums.items()}


def steps_of_budget(config: PretrainConfig, kind: str, amount: float, texts: Texts) -> int:
    """The number of steps that cost ``amount`` tokens or FLOPs.

    ConfigError if that is less than one, or more than `MOST_STEPS`.
    """

    def mean(steps: int) -> float:
        """The cost of a mean step in a run of ``steps``."""
        of_steps = replace(config, steps=steps)
        return run_tokens(of_steps) / steps if kind == "tokens" else step_flops(of_steps, texts)

    first = mean(1 if config.phases else config.steps)
    if not first <= amount <= first * MOST_STEPS:
        rule = f"be worth 1 to {MOST_STEPS:,} steps of this arm, each of about {first:,.0f} {kind}"
        raise ConfigError(must("budgets", rule, f"{kind}={amount:g}"))
    if not config.phases:
        return round(amount / first)
    # phases of a number of steps have a smaller share of a longer run
    enough = bisect_left(range(MOST_STEPS), amount, lo=1, key=lambda steps: steps * mean(steps))
    return min((max(1, enough - 1), enough), key=lambda steps: abs(steps * mean(steps) - amount))


def step_flops(config: PretrainConfig, texts: Texts) -> float:
    """FLOPs of a mean step of a run, of all parts; a teacher counts as large as the student."""
    pack = pack_flops(config, texts.open(data_folders(config.data)[0]))
    by_part = mean_step_flops(config, pack, texts.squares_of_run(config))
    return math.fsum(by_part[part] for part in ("student", "scoring", "teacher"))


def pack_flops(config: PretrainConfig, shards: Shards) -> PackFlops:
    """The FLOPs of the parts of a step, before the run; a teacher is assumed to be as large as the student."""
    shape = config.model.shape(shards.token_ids)
    return PackFlops.of(config, shape, forward_flops(shape) if config.teacher.path is not None else None)
