"""Pretraining, top to bottom: configuration, data, model, engine, the loop, the ending.

    deepspeed megamask/pretrain.py --deepspeed ds_configs/zero2.json

Runs alike under `deepspeed`, `torchrun`, `srun` and `python`. Everything that a step depends on is a function of the
seed and of the number of its packs, so a run that was stopped and resumed takes the very steps of one that was not.
"""

from __future__ import annotations

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
from safetensors.torch import load_file
from torch import Tensor

from megamask import command, prepare, ranks, report, runs
from megamask import config as configuration
from megamask.batch import PackedBatch, TokenIds
from megamask.checkpoint import RunFolder, read_state, read_tensors
from megamask.config import PretrainConfig
from megamask.data import shards
from megamask.data.loader import Loader
from megamask.data.packs import Packs
from megamask.data.shards import Shards
from megamask.engine.engine import Engine
from megamask.errors import ConfigError, MegamaskError, StorageError, must, raise_all
from megamask.masking.masker import Masker
from megamask.masking.rng import PackRng
from megamask.log import Log
from megamask.metrics import Meters, peak_flops
from megamask.model.encoder import Encoder
from megamask.model.head import Head
from megamask.model.shape import EncoderShape
from megamask.objectives import objective as objectives
from megamask.publish import publish
from megamask.validation import SEED, unigram_nll, validate

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megamask"
"""Where text that this machine holds anyway is kept once it is prepared."""
MASKER = "masker/"
"""Before the names of what the masker has learnt, in a checkpoint."""


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
    packs, held_out = Packs(train, **sizes, seed=config.seed), Packs(valid, **sizes, seed=SEED)
    return Text(train, packs, held_out, unigram_nll(torch.from_numpy(train.unigram)))


def build(config: PretrainConfig, ds: dict[str, Any], text: Text, start: runs.Start) -> Parts:
    """Model, masker, engine and telling, with the state of the checkpoint to start from, if there is one."""
    ids = text.packs.token_ids
    torch.manual_seed(config.seed)
    encoder = Encoder(shape_of(config, ids), config.model)
    objective = objectives.build(config.objective, encoder, Head(encoder, config.model))
    if config.init is not None:
        objectives.load_weights(objective, load_file(config.init / "model.safetensors"))
    # a weight and two moments, 4 bytes each
    runs.check_space(config.output, 12 * sum(p.numel() for p in objective.parameters()))
    ranks.by_main(lambda: report.describe(start.run, encoder.shape, text.train))

    masker = Masker(config.masking, ids)
    engine = Engine(objective, config.optimizer, ds, packs_per_step=config.packs.per_step)
    if start.checkpoint:
        tensors = dict(read_tensors(start.checkpoint))
        engine.restore(tensors.get, steps=read_state(start.checkpoint)["optimizer_steps"])
        masker.load_state_dict({n.removeprefix(MASKER): t for n, t in tensors.items() if n.startswith(MASKER)})

    peak = peak_flops(config.log.peak_flops)
    log = Log(start.run.path, start.step, config.steps, cost=report.cost(encoder.shape), peak=peak)
    loader = Loader(text.packs, ranks.device())
    batches = loader.batches(numbers(config, start.step, engine.accumulate))
    return Parts(config, text, encoder.shape, start.run, masker, engine, log, Meters(loader), batches)


def shape_of(config: PretrainConfig, ids: TokenIds) -> EncoderShape:
    """The encoder's numbers: those of `model`, or of the first weights, which `model` must then not contradict."""
    if config.init is None:
        return config.model.shape(ids)
    shape = EncoderShape.load(config.init)
    problems = [
        f"`model.{key}` is {asked}, but the weights of `init` have {getattr(shape, key)}. Remove it."
        for key in ("num_layers", "hidden_size", "num_heads", "intermediate_size", "max_positions")
        if (asked := getattr(config.model, key)) not in (None, getattr(shape, key))
    ]
    if shape.vocab_size < ids.size:
        problems.append(
            f"`data` has a vocabulary of {ids.size} tokens, but the weights of `init` have {shape.vocab_size}. "
            f"Prepare the text with their tokenizer: --tokenizer {config.init / 'tokenizer'}."
        )
    if config.packs.length > shape.max_positions:
        rule = f"be at most {shape.max_positions}, the positions of the weights of `init`"
        problems.append(must("packs.length", rule, config.packs.length))
    raise_all(ConfigError, problems)
    return shape


# ---- the loop


def train(parts: Parts, step: int, stop: Stop) -> int:
    """Steps from ``step`` to the last, or to a signal to stop; returns how many steps the run has."""
    config, masker, engine, meters, log = parts.config, parts.masker, parts.engine, parts.meters, parts.log
    failures = 0
    if step == 0:
        evaluate(parts, step)
    while step < config.steps:
        progress = step / config.steps
        targets = config.packs.per_step * masker.budget(progress, config.packs.tokens)
        for _ in range(engine.accumulate):
            batch = next(parts.batches)
            plan = masker(batch, progress=progress, rng=PackRng(config.seed, batch.number))
            torch.manual_seed(seed_of(config.seed, batch.number))  # dropout
            losses = engine.train_micro(batch, plan, targets=targets)
            masker.observe(batch, plan, losses.nll)
            meters.add(batch, plan, losses)
        stats = engine.step(step, config.steps, meters.loss)
        masker.settle(ranks.sum)
        meters.step(stats.grad_norm, stats.skipped)
        step += 1
        log.advance(step)
        stopping, last = stop.agreed(), step == config.steps
        if step % config.log.every == 0 or last:
            log.train(step, meters.take(), config.optimizer.rate(step - 1, config.steps))
        if step % config.validation.every == 0 or last:
            evaluate(parts, step)
        if step % config.checkpoint.every == 0 or last or stopping:
            failures = save(parts, step, failures, final=last or stopping)
        if stopping and not last:
            log.say(f"Stopped after step {step} of {config.steps}, as asked. The same command goes on from there.")
            break
    return step


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
        if ranks.is_main():
            tensors |= {MASKER + name: tensor for name, tensor in parts.masker.state_dict().items()}
        state = {"optimizer_steps": parts.engine.steps, "packs": step * parts.config.packs.per_step}
        try:
            parts.log.say(publish(parts.run, step, tensors, state, parts.config.checkpoint.keep))
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


def seed_of(seed: int, number: int) -> int:
    """The seed of dropout for a pack: the same on any rank, so no generator's state need be saved."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 1) % 2**63


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
