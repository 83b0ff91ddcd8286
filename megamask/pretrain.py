"""Pretraining, top to bottom: configuration, data, model, engine, the loop, the ending.

    deepspeed megamask/pretrain.py --deepspeed ds_configs/zero2.json

Runs alike under `deepspeed`, `torchrun`, `srun` and `python`. Everything that a step depends on is a function of the
seed and of the number of its packs, so a run that was stopped and resumed takes the very steps of one that was not.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megamask import command, guidance, prepare, ranks, report, runs
from megamask import config as configuration
from megamask.batch import PackedBatch, TokenIds
from megamask.checkpoint import RunFolder, find, read_state, read_tensors, read_weights
from megamask.config import PretrainConfig
from megamask.data import shards
from megamask.data.loader import Loader
from megamask.data.packs import Packs
from megamask.data.shards import Shards
from megamask.engine.engine import Engine
from megamask.errors import ConfigError, MegamaskError, NonFiniteError, StorageError, must, raise_all
from megamask.guidance import Guidance
from megamask.hf.layers import pick_layers
from megamask.log import Log
from megamask.masking.masker import Masker
from megamask.metrics import Meters, peak_flops
from megamask.model.encoder import Encoder
from megamask.model.head import Head
from megamask.model.shape import EncoderShape
from megamask.objectives import objective as objectives
from megamask.publish import publish
from megamask.stored import Stored
from megamask.teacher import Teacher
from megamask.training import take_step
from megamask.validation import SEED, unigram_nll, validate

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megamask"
"""Where text that this machine holds anyway is kept once it is prepared."""
MASKER = "masker/"
"""Before the names of what the masker has learnt, in a checkpoint."""
GUIDANCE = "guidance/"
"""Before the names of what sources of entropy have learnt."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit code, after printing the sentences of an error a user can mend."""
    try:
        asked = command.parse(arguments)
        if asked.list_recipes:
            print(command.show_recipes())
            return 0
        if asked.print_config:
            print(command.show_config(asked.run))
            return 0
        ds = configuration.check(asked.run, asked.deepspeed, ranks.world())
        pretrain(asked.run, ds, asked.resume, asked.recipe)
        return 0
    except MegamaskError as error:
        if ranks.is_main() or not isinstance(error, ConfigError):
            print(error, file=sys.stderr)
        return error.exit_code


def pretrain(config: PretrainConfig, ds: dict[str, Any], resume: str = "auto", recipe: str = "") -> None:
    """Train, or go on training, until the last step or a signal to stop; at the end, show what came of it."""
    ranks.join()
    text = read_text(config)
    identity = configuration.as_dict(config) | {"recipe": recipe, "deepspeed": ds, "text": text.train.fingerprint}
    with closing(runs.open_run(config.output, identity, resume, configuration.FREE)) as start:
        with Stop() as stop:
            parts = build(config, ds, text, start)
            opening = report.opening(config, parts.shape, text.packs, parts.engine.weights, start.step)
            for line in (*start.notes, *opening):
                parts.log.say(line)
            finished = train(parts, start.step, stop) == config.steps
        parts.log.close()
        parts.engine.close()
        if finished:
            ranks.by_main(lambda: report.ending(start.run, config, text.train))


# ---- what a run consists of


@dataclass(frozen=True)
class Text:
    """The text of a run, checked, and the packs that it makes."""

    train: Shards
    packs: Packs
    held_out: Packs
    unigram: Float[Tensor, " V"]
    """What guessing by frequency costs, in nats."""


@dataclass(frozen=True)
class Parts:
    """All that the loop needs."""

    config: PretrainConfig
    text: Text
    shape: EncoderShape
    run: RunFolder
    masker: Masker
    guidance: Guidance
    engine: Engine
    log: Log
    meters: Meters
    batches: Iterator[PackedBatch]


def read_text(config: PretrainConfig) -> Text:
    """Open and check the shards; without `data`, those of the English that this machine holds."""
    folder = config.data or ranks.by_main(lambda: prepare.local_data(CACHE))
    train, valid = Shards.open(folder, "train"), Shards.open(folder, "valid")
    if config.verify:
        ranks.by_main(lambda: shards.check(folder, verify=True))
    sizes = {"tokens": config.packs.tokens, "length": config.packs.length}
    per_step, views = config.packs.per_step, config.packs.views
    packs = Packs(train, **sizes, seed=config.seed, per_step=per_step, views=views)
    held_out = Packs(valid, **sizes, seed=SEED)
    return Text(train, packs, held_out, unigram_nll(torch.from_numpy(train.unigram)))


def build(config: PretrainConfig, ds: dict[str, Any], text: Text, start: runs.Start) -> Parts:
    """Model, masker, engine and telling, with the state of the checkpoint to start from, if there is one."""
    ids = text.packs.token_ids
    torch.manual_seed(config.seed)
    shape, weights = first_shape(config, ids)
    encoder = Encoder(shape, config.model)
    objective = objectives.build(config.objective, encoder, Head(encoder, config.model), config.entropy.measure)
    if weights:
        objectives.load_weights(objective, weights)
    # a weight and two moments, 4 bytes each
    runs.check_space(config.output, 12 * sum(p.numel() for p in objective.parameters()))
    ranks.by_main(lambda: report.describe(start.run, encoder.shape, text.train))

    teacher = teacher_of(config, text, encoder.shape) if config.teacher.path is not None else None
    stored = Stored.open(config, text.train.fingerprint, ids, verify=config.verify) if config.distill.stored else None
    masker = Masker(config.masking, ids)
    engine = Engine(objective, config.optimizer, ds, packs_per_step=config.packs.per_step)
    guide = guidance.build(config, engine, text.packs, teacher=teacher, stored=stored)
    if start.checkpoint:
        tensors = dict(read_tensors(start.checkpoint))
        engine.restore(tensors.get, steps=read_state(start.checkpoint)["optimizer_steps"])
        masker.load_state_dict(part(tensors, MASKER))
        guide.load_state_dict(part(tensors, GUIDANCE))

    peak = peak_flops(config.log.peak_flops)
    log = Log(start.run.path, start.step, config.steps, cost=report.cost(encoder.shape), peak=peak)
    loader = Loader(text.packs, ranks.device())
    batches = loader.batches(numbers(config, start.step, engine.accumulate))
    return Parts(config, text, encoder.shape, start.run, masker, guide, engine, log, Meters(loader), batches)


def teacher_of(config: PretrainConfig, text: Text, shape: EncoderShape) -> Teacher:
    """The frozen model that `teacher` names, checked against the run."""
    return Teacher.load(
        config.teacher,
        config.distill,
        tokenizer=text.train.folder / report.TOKENIZER,
        ids=text.packs.token_ids,
        length=config.packs.length,
        vocab_size=shape.vocab_size,
    )


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of a checkpoint's tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def first_shape(config: PretrainConfig, ids: TokenIds) -> tuple[EncoderShape, dict[str, Tensor]]:
    """The encoder's numbers and first weights: those of `init`, which `model` must then not contradict.

    Without `init` the numbers of `model`, and no weights.
    """
    if config.init is None:
        return config.model.shape(ids), {}
    if RunFolder(config.init).checkpoints.is_dir():
        shape, weights = EncoderShape.load(config.init), read_weights(find(config.init))
    else:
        shape, weights = EncoderShape.load(config.init), load_file(config.init / "model.safetensors")
    if config.init_layers is not None:
        shape, weights = pick_layers(weights, shape, config.init_layers)
    problems = [
        f"`model.{key}` is {asked}, but the weights of `init` have {getattr(shape, key)}. Remove it."
        for key in ("num_layers", "hidden_size", "num_heads", "intermediate_size", "max_positions")
        if (asked := getattr(config.model, key)) not in (None, getattr(shape, key))
    ]
    if shape.vocab_size < ids.size:
        problems.append(
            f"`data` has a vocabulary of {ids.size} tokens, but the weights of `init` have {shape.vocab_size}. "
            f"Prepare the text with their tokenizer: --tokenizer {config.init / report.TOKENIZER}."
        )
    if config.packs.length > shape.max_positions:
        rule = f"be at most {shape.max_positions}, the positions of the weights of `init`"
        problems.append(must("packs.length", rule, config.packs.length))
    raise_all(ConfigError, problems)
    return shape, weights


# ---- the loop


def train(parts: Parts, step: int, stop: Stop) -> int:
    """Steps from ``step`` to the last, or to a signal to stop; returns how many steps the run has."""
    config, engine, meters, log = parts.config, parts.engine, parts.meters, parts.log
    failures = 0
    if step == 0:
        evaluate(parts, step)
    while step < config.steps:
        batches = [next(parts.batches) for _ in range(engine.accumulate)]
        take_step(
            step, config.steps, batches, engine=engine, masker=parts.masker, guidance=parts.guidance, meters=meters,
            seed=config.seed,
        )  # fmt: skip
        step += 1
        log.advance(step)
        stopping, last = stop.agreed(), step == config.steps
        if step % config.log.every == 0 or last:
            tell(parts, step)
        audit(parts, step, batches[0])
        if step % config.validation.every == 0 or last:
            evaluate(parts, step)
        if step % config.checkpoint.every == 0 or last or stopping:
            failures = save(parts, step, failures, final=last or stopping)
        if stopping and not last:
            log.say(f"Stopped after step {step} of {config.steps}, as asked. The same command goes on from there.")
            break
    return step


def tell(parts: Parts, step: int) -> None:
    """Write the figures since the last time; NonFiniteError if the entropies among them are no numbers."""
    window = parts.meters.take()
    parts.log.train(step, window, parts.config.optimizer.rate(step - 1, parts.config.steps))
    if not math.isfinite(window.spread):
        raise NonFiniteError(
            f"Up to step {step} the entropy source {parts.guidance.source!r} gave numbers that are not finite. The "
            "same command goes on from the newest checkpoint; choose another `entropy.source` if it happens again."
        )
    if window.flat:
        parts.log.say(
            f"The entropies of {parts.guidance.source!r} are flat: inside a document they hardly differ, so the masks "
            "are hardly better than random ones."
        )


def audit(parts: Parts, step: int, batch: PackedBatch) -> None:
    """Hold the source of entropy in use against the exact signal, when it is time."""
    progress = step / parts.config.steps
    if step == parts.config.steps or not parts.masker.needs_entropy(progress):
        return
    with parts.meters.paused():
        share = parts.masker.budget(progress, batch.layout.rows) / batch.layout.rows
        verdict = parts.guidance.audit(step, batch, share)
        if verdict:
            parts.log.figures(step, verdict.figures)
            if verdict.sentence:
                parts.log.say(verdict.sentence)


def evaluate(parts: Parts, step: int) -> None:
    """Evaluate on held-out text, and tell."""
    with parts.meters.paused():
        text = parts.text
        found = validate(parts.engine, text.held_out, parts.config.validation.packs, text.packs.token_ids, text.unigram)
        parts.log.validation(step, found.loss, found.accuracy, found.unigram_loss)


def save(parts: Parts, step: int, failures: int, *, final: bool) -> int:
    """Publish a checkpoint; returns how many attempts in a row have failed.

    A full disk is no reason to stop training while older checkpoints stand: StorageError is raised only at the third
    failure in a row, or if no later attempt will come (``final``).
    """
    with parts.meters.paused():
        tensors = parts.engine.share()
        parts.guidance.flush()
        if ranks.is_main():
            for prefix, learnt in ((MASKER, parts.masker), (GUIDANCE, parts.guidance)):
                tensors |= {prefix + name: tensor.cpu() for name, tensor in learnt.state_dict().items()}
        state = {"optimizer_steps": parts.engine.steps, "packs": step * parts.config.packs.per_step}
        try:
            parts.log.say(publish(parts.run, step, tensors, state, parts.config.checkpoint.keep))
            if ranks.is_main():
                parts.guidance.prune(min(parts.run.steps()))
            return 0
        except StorageError as error:
            if final or failures == 2:
                raise
            parts.log.say(f"{error} Training goes on; the next checkpoint is tried as usual.")
            return failures + 1


def numbers(config: PretrainConfig, start: int, accumulate: int) -> Iterator[int]:
    """The packs of this rank from step ``start`` on: step x packs per step + place in the step."""
    for step in range(start, config.steps):
        for micro in range(accumulate):
            yield step * config.packs.per_step + micro * ranks.world() + ranks.rank()


class Stop:
    """Whether somebody asked the run to stop: inside of this, a signal to any rank stops all after the same step."""

    def __enter__(self) -> Stop:
        self._asked = False
        names = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._before = {name: signal.signal(name, self._ask) for name in names}
        return self

    def __exit__(self, *why: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True  # and nothing more: a handler that prints can die of it

    def agreed(self) -> bool:
        """Collective."""
        return bool(ranks.maximum(torch.tensor(float(self._asked))).item())


if __name__ == "__main__":
    try:
        ranks.end(main())
    finally:
        ranks.leave()
