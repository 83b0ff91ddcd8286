"""What a run is made of: text, model, masker, guidance, engine, telling, in the state of the checkpoint to start from.

Everything is checked as it is made; nothing here trains.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megamask.batch import PackedBatch, TokenIds
from megamask.checkpoint import resume
from megamask.checkpoint.format import RunFolder, find_checkpoint, read_state, read_tensors, read_weights
from megamask.config import fixed_masks
from megamask.config.pretrain_config import PretrainConfig, changeable
from megamask.data import pos_tagger, prepare, shards
from megamask.data.compare_tokenizers import tokenizer_differences
from megamask.data.loader import Loader
from megamask.data.packs import Packs
from megamask.data.shards import Shards
from megamask.data.tokenizer import TOKENIZER
from megamask.engine.engine import Engine
from megamask.entropy.frequency import unigram_surprisal
from megamask.errors import CheckpointError, ConfigError, DataError, must, raise_all
from megamask.health.loss_spikes import SkippedPacks, SpikePolicy
from megamask.health.stragglers import StragglerDetector
from megamask.hf.layer_subset import pick_layers
from megamask.hf.weights import read_hf_tensors as read_safetensors
from megamask.masking.masker import EVALUATION, Masker
from megamask.metrics.logger import MetricsLogger
from megamask.metrics.meters import Meters, peak_flops
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import EncoderShape
from megamask.objectives import objective as objectives
from megamask.runtime import ranks
from megamask.storage.old_names import with_new_names
from megamask.teacher.stored_targets import StoredTargets
from megamask.teacher.teacher import Teacher
from megamask.training import guidance, summary
from megamask.training.guidance import Guidance
from megamask.training.progress import Progress
from megamask.training.validation import SEED

MASKER = "masker/"
"""Before the names of what the masker has learnt, in a checkpoint."""
GUIDANCE = "guidance/"
"""Before the names of what sources of entropy have learnt."""
JUDGE = "judge"
"""The name of what the judge of steps has seen, in a checkpoint's state."""


@dataclass(frozen=True)
class RunText:
    """The text of a run, checked, and the packs that it makes."""

    train: Shards
    packs: Packs
    held_out: Packs
    unigram: Float[Tensor, " V"]
    """What guessing by frequency costs, in nats."""


@dataclass(frozen=True)
class RunComponents:
    """All that the loop needs."""

    config: PretrainConfig
    text: RunText
    shape: EncoderShape
    run: RunFolder
    masker: Masker
    guidance: Guidance
    teacher: Teacher | None
    engine: Engine
    progress: Progress
    judge: SpikePolicy
    pace: StragglerDetector
    log: MetricsLogger
    meters: Meters
    loader: Loader
    batches: Generator[PackedBatch, None, None]


def open_run_text(config: PretrainConfig, early: Callable[[], AbstractContextManager] = nullcontext) -> RunText:
    """Open and check the shards; without `data`, those of the English that this machine holds.

    Long work happens inside of ``early()``, and never a collective: what it raises on one rank is raised on all.
    """

    def prepared() -> Path:
        with early():
            return prepare.local_data(prepare.CACHE)

    def checked() -> None:
        with early():
            shards.check_shard_manifest(folder, verify=True)

    def opened() -> RunText:
        with early():
            return _open_text(config, folder)

    folder = config.data or ranks.on_rank_zero(prepared)
    if config.verify:
        ranks.on_rank_zero(checked)
    return ranks.all_ranks_or_none(opened)


def _open_text(config: PretrainConfig, folder: Path) -> RunText:
    train, valid = Shards.open(folder, "train"), Shards.open(folder, "valid")
    if config.masking.unit != "token":
        train.check_words()
    sizes = {"tokens": config.packs.tokens, "length": config.packs.length}
    step = {"per_step": config.packs.per_step, "views": config.packs.masks_per_text}
    most = config.masking.most_targets(config.packs.tokens, None if config.time_budget else config.steps)
    problems: list[str] = []

    def packed(shards: Shards, **how: int) -> Packs | None:
        try:
            return Packs(shards, **sizes, **how)
        except DataError as error:
            problems.extend(error.problems)
        return None

    packs = packed(train, seed=config.seed, targets=most, **step)
    held_out = packed(valid, seed=SEED, targets=EVALUATION.most_targets(config.packs.tokens))
    raise_all(DataError, problems)
    assert packs and held_out
    return RunText(train, packs, held_out, unigram_surprisal(torch.from_numpy(train.unigram)))


def build_run(config: PretrainConfig, ds: dict[str, Any], text: RunText, start: resume.RunStart) -> RunComponents:
    """Model, masker, engine and telling, with the state of the checkpoint to start from, if there is one."""
    ids = text.packs.token_ids
    torch.manual_seed(config.seed)
    shape, weights = first_shape(config, ids, text.train.folder / TOKENIZER)
    encoder = Encoder(shape, config.model)
    objective = objectives.build_objective(
        config.objective, encoder, MaskedLMHead(encoder, config.model), config.entropy.measure
    )
    if weights:
        objectives.load_objective_weights(objective, weights)
    # a weight and two moments, 4 bytes each
    resume.check_space(config.output, 12 * sum(p.numel() for p in objective.parameters()))
    ranks.on_rank_zero(lambda: summary.describe(start.run, encoder.shape, text.train))

    teacher = teacher_of(config, text, encoder.shape) if config.teacher.path is not None else None
    stored = stored_targets(config, text) if config.distill.stored else None
    tags = pos_tagger.tag_names(text.train) if config.masking.score == "part_of_speech" else ()
    masker = Masker(config.masking, ids, tags=tags)
    engine = Engine(objective, config.optimizer, ds, packs_per_step=config.packs.per_step)
    guide = guidance.build_guidance(config, engine, text.packs, teacher=teacher, stored=stored)
    state = {}
    if start.checkpoint:
        state = read_state(start.checkpoint)
        same_teacher(teacher, state.get("teacher", ""), start.checkpoint)
        load_checkpoint(start.checkpoint, state, engine, masker, guide)

    progress = Progress(config.steps, config.time_budget, state.get("seconds", 0.0))
    judge = SpikePolicy(config.spikes, state.get(JUDGE))
    pace = StragglerDetector(ranks.gather(socket.gethostname()))
    log = log_of(config, encoder.shape, start.run, start.step)
    headless = weights and not start.checkpoint and not any(name.startswith("head.") for name in weights)
    no_head = f"{config.init} has no masked-language head: a new one is drawn from `seed`." if headless else ""
    for told in (no_head, later_decay(state), moved(state, writers(engine.stage, engine.precision))):
        if told:
            log.say(told)
    loader = Loader(text.packs, ranks.device())
    batches = loader.batches(numbers(config, start.step, engine.accumulate, judge.ledger))
    parts = RunComponents(
        config, text, encoder.shape, start.run, masker, guide, teacher, engine, progress, judge, pace, log,
        Meters(loader, engine), loader, batches,
    )  # fmt: skip
    if start.checkpoint and start.checkpoint.parent == start.run.checkpoints:
        same_step(parts, start.step, state, start.checkpoint)
    return parts


def load_checkpoint(checkpoint: Path, state: dict[str, Any], engine: Engine, masker: Masker, guide: Guidance) -> None:
    """Give everything that learns the state of a verified ``checkpoint``."""
    tensors = dict(read_tensors(checkpoint))
    wanted = {f"weights/{name}": tuple(shape) for name, shape in engine.weight_shapes.items()}
    held = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("weights/")}
    wrong = [name for name in sorted(wanted.keys() | held.keys()) if wanted.get(name) != held.get(name)]
    if wrong:
        shown = [
            f"{name} is {held.get(name, 'absent')} there, but {wanted.get(name, 'absent')} here" for name in wrong[:10]
        ]
        raise CheckpointError(f"{checkpoint} is of another model, in {len(wrong)} tensors: {'; '.join(shown)}.")
    steps = state.get("optimizer_steps")
    if not isinstance(steps, int):
        raise CheckpointError(must(f"{checkpoint}/state.json: optimizer_steps", "be a whole number", str(steps)))
    engine.restore(tensors.get, steps=steps)
    try:
        masker.score.load_state_dict(select_prefix(tensors, MASKER))
        guide.load_state_dict(select_prefix(tensors, GUIDANCE))
    except KeyError as error:
        raise CheckpointError(
            f"{checkpoint} lacks {error.args[0]!r} of what a score or a source of entropy has learnt: it was made "
            "under other settings, or by another megamask."
        ) from None


def rewind(parts: RunComponents, step: int) -> tuple[RunComponents, int] | None:
    """The parts as of a checkpoint from long before ``step`` (from 0), and its step; from there other packs are read.

    None if no checkpoint is old enough. The newer ones are set aside, and so are the figures since. Collective.
    """
    config = parts.config
    checkpoint, to, notes = resume.go_back(parts.run, step + 1 - config.spikes.rewind_steps)
    if checkpoint is None:
        parts.log.say(f"No checkpoint is {config.spikes.rewind_steps} steps old, so there is nothing to go back to.")
        return None
    state = read_state(checkpoint)
    load_checkpoint(checkpoint, state, parts.engine, parts.masker, parts.guidance)
    parts.masker.score.figures()  # those since are not told
    judge = parts.judge.rewound(state.get(JUDGE, {}), to, step)
    per_step = config.packs.per_step
    first, end = ((other + parts.judge.ledger.shift(other)) * per_step for other in (to, step + 1))
    for line in notes:
        parts.log.say(line)
    parts.log.say(
        f"Rewound from step {step + 1} to {to}, for the {judge.rewinds}. time of {config.spikes.max_rewinds}: packs "
        f"{first:,} to {end - 1:,} are left out."
    )
    parts.log.close()
    parts.batches.close()
    batches = parts.loader.batches(numbers(config, to, parts.engine.accumulate, judge.ledger))
    log = log_of(config, parts.shape, parts.run, to)
    return replace(parts, judge=judge, log=log, meters=Meters(parts.loader, parts.engine), batches=batches), to


def log_of(config: PretrainConfig, shape: EncoderShape, run: RunFolder, step: int) -> MetricsLogger:
    """Where the figures of a run go on after ``step``."""
    cost = summary.cost(shape, config.objective, config.masking.corruption.mask)
    return MetricsLogger(run.path, step, config.steps, cost=cost, peak=peak_flops(config.log.peak_flops))


def stored_targets(config: PretrainConfig, text: RunText) -> StoredTargets:
    """What `distill.stored` holds, checked against the masks of the run."""
    return StoredTargets.open(
        config.distill,
        text.packs.token_ids,
        facts=fixed_masks.facts(config, text.train.fingerprint),
        targets=fixed_masks.targets(config),
        verify=config.verify,
    )


def teacher_of(config: PretrainConfig, text: RunText, shape: EncoderShape) -> Teacher:
    """The frozen model that `teacher` names, checked against the run."""
    return Teacher.load(
        config.teacher,
        config.distill,
        tokenizer=text.train.folder / TOKENIZER,
        ids=text.packs.token_ids,
        length=config.packs.length,
        vocab_size=shape.vocab_size,
    )


def same_teacher(teacher: Teacher | None, before: str, checkpoint: Path) -> None:
    """ConfigError unless the teacher is the one of ``checkpoint``, of which the hash was ``before``."""
    now = teacher.fingerprint if teacher else ""
    if now != before:
        raise ConfigError(
            f"{checkpoint} was made with a teacher of hash {before[:16] or 'none'}, but `teacher.path` has "
            f"{now[:16] or 'none'}. Name the same model; if it is a run that goes on, name one checkpoint of it."
        )


def derived_state(parts: RunComponents, step: int, seconds: float) -> dict[str, float]:
    """What follows from the number of a step and the seconds used, and so need not be in a checkpoint.

    The number of the next pack; the learning rate and the targets in a pack where the next step begins; the learning
    rate of that step.
    """
    progress, end = parts.progress.then(step, seconds), parts.progress.then(step + 1, seconds)
    return {
        "packs": (step + parts.judge.ledger.shift(step)) * parts.config.packs.per_step,
        "rate": parts.config.optimizer.lr(progress),
        "next_rate": parts.config.optimizer.lr.of_step(progress, min(1.0, end)),
        "targets": parts.masker.budget(progress, parts.config.packs.tokens),
    }


def same_step(parts: RunComponents, step: int, state: dict[str, Any], checkpoint: Path) -> None:
    """CheckpointError unless what follows from the ``step`` of a ``checkpoint`` is what its ``state`` says.

    If a setting was changed on purpose since, rate and targets may well be others.
    """
    expected = derived_state(parts, step, state.get("seconds", 0.0))
    now = changeable(parts.config)
    if with_new_names(state.get("settings", now)) != now:
        expected = {"packs": expected["packs"]}

    def same(said: object, now: float) -> bool:
        if not isinstance(said, (int, float)) or not abs(said) < 1e300:
            return False
        return math.isclose(said, now, rel_tol=1e-9)  # another machine may round a cosine otherwise

    found = [
        must(f"{checkpoint}/state.json: {name}", f"be {now}, as computed anew", state[name])
        for name, now in expected.items()
        if name in state and not same(state[name], now)
    ]
    cure = "Go on with the megamask that made it, or start a run anew: here it would be another run."
    raise_all(CheckpointError, [*found, cure] if found else [])


def writers(stage: int, precision: str) -> dict[str, Any]:
    """What a checkpoint records of who wrote it. Any number of ranks, stage and precision can resume from it."""
    return {"ranks": ranks.world(), "stage": stage, "precision": precision}


def moved(state: dict[str, Any], now: dict[str, Any]) -> str:
    """A line if a checkpoint's ``state`` was written by other ``writers`` than ``now``, else an empty string."""
    before = now | {key: state[key] for key in now.keys() & state.keys()}
    here, there = (
        f"{w['ranks']} rank{'s' * (w['ranks'] != 1)}, ZeRO {w['stage']}, {w['precision']}" for w in (now, before)
    )
    if here == there:
        return ""
    rounding = " From here on its figures round differently." if now["precision"] != before["precision"] else ""
    return f"Resumed at {here}; the checkpoint was written by {there}.{rounding}"


def later_decay(state: dict[str, Any]) -> str:
    """A line if a checkpoint's ``state`` is of a megamask whose learning rate reached its end in the last step."""
    if not state or "next_rate" in state:
        return ""
    return (
        "The checkpoint was written by an earlier megamask, which decayed the learning rate one step sooner, so that "
        "the last step moved nothing. From here on each decaying step has the rate that the step before it had there."
    )


def select_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of a checkpoint's tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def first_shape(config: PretrainConfig, ids: TokenIds, tokenizer: Path) -> tuple[EncoderShape, dict[str, Tensor]]:
    """The encoder's numbers and first weights: those of `init`, which `model` must then not contradict.

    ``ids`` and ``tokenizer``, a folder, are those of the text. Without `init` the numbers of `model`, and no weights.
    """
    if config.init is None:
        return config.model.shape(ids), {}
    if RunFolder(config.init).checkpoints.is_dir():
        shape, weights = EncoderShape.load(config.init), read_weights(find_checkpoint(config.init))
    else:
        shape, weights = EncoderShape.load(config.init), read_safetensors(config.init)
    if config.init_layers is not None:
        shape, weights = pick_layers(weights, shape, config.init_layers)
    problems = [
        f"`model.{key}` is {asked}, but the weights of `init` have {getattr(shape, key)}. Remove it."
        for key in ("num_layers", "hidden_size", "num_heads", "intermediate_size", "max_positions")
        if (asked := getattr(config.model, key)) not in (None, getattr(shape, key))
    ]
    own = config.init / TOKENIZER
    if shape.vocab_size >= ids.size and own.is_dir():
        problems += tokenizer_differences(own, "init", tokenizer, "data's tokenizer")
    if shape.vocab_size < ids.size:
        problems.append(
            f"`data` has a vocabulary of {ids.size} tokens, but the weights of `init` have {shape.vocab_size}. "
            f"Prepare the text with their tokenizer: --tokenizer {config.init / TOKENIZER}."
        )
    if config.packs.length > shape.max_positions:
        rule = f"be at most {shape.max_positions}, the positions of the weights of `init`"
        problems.append(must("packs.length", rule, config.packs.length))
    raise_all(ConfigError, problems)
    return shape, weights


def numbers(config: PretrainConfig, start: int, accumulate: int, ledger: SkippedPacks) -> Iterator[int]:
    """The packs of this rank from step ``start`` on: step x packs per step + place in the step.

    Where ``ledger`` has spans that are left out, the step is a later one.
    """
    for step in range(start, config.steps):
        for micro in range(accumulate):
            yield (step + ledger.shift(step)) * config.packs.per_step + micro * ranks.world() + ranks.rank()
