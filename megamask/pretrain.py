"""Pretraining, top to bottom: configuration, data, model, engine, the loop, the ending.

    deepspeed megamask/pretrain.py --deepspeed ds_configs/zero2.json

Runs alike under `deepspeed`, `torchrun`, `srun` and `python`. Everything that a step depends on is a function of the
seed and of the number of its packs, so a run that was stopped and resumed takes the very steps of one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from megamask import command, prepare, ranks, report, runs
from megamask import config as configuration
from megamask.batch import TokenIds
from megamask.checkpoint import read_state, read_tensors
from megamask.config import PretrainConfig
from megamask.data.loader import Loader
from megamask.data.packs import Packs
from megamask.data.shards import Shards
from megamask.engine.ds_file import read_ds_config
from megamask.engine.engine import Engine
from megamask.errors import ConfigError, MegamaskError, raise_all
from megamask.masking.masker import Masker
from megamask.masking.rng import PackRng
from megamask.metrics import Log, Meters, peak_flops
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
        ds = read_ds_config(asked.deepspeed) if asked.deepspeed else {}
        configuration.check(asked.run, ds, ranks.world())
        pretrain(asked.run, ds, asked.resume, asked.recipe)
        return 0
    except MegamaskError as error:
        if ranks.is_main() or not isinstance(error, ConfigError):
            print(error, file=sys.stderr)
        return error.exit_code
    finally:
        ranks.leave()


def pretrain(config: PretrainConfig, ds: dict[str, Any], resume: str = "auto", recipe: str = "") -> None:
    """Train, or go on training, until the last step or a signal to stop."""
    ranks.join()
    stop = Stop()

    # ---- text: shards, checked, and the packs that they make
    folder = config.data or ranks.by_main(lambda: prepare.local_data(CACHE))
    train, valid = Shards.open(folder, "train"), Shards.open(folder, "valid")
    sizes = {"tokens": config.packs.tokens, "length": config.packs.length}
    packs, held_out = Packs(train, **sizes, seed=config.seed), Packs(valid, **sizes, seed=SEED)
    ids = train.token_ids
    unigram = unigram_nll(torch.from_numpy(train.unigram))

    # ---- the run folder: fresh, or where to go on
    identity = configuration.as_dict(config) | {"recipe": recipe, "deepspeed": ds, "text": train.fingerprint}
    start = runs.open_run(config.output, identity, resume, configuration.FREE)
    objective = build(config, ids)
    weights = sum(p.numel() for p in objective.parameters())
    runs.check_space(config.output, 12 * weights)

    # ---- model, masker, engine
    masker = Masker(config.masking, ids)
    engine = Engine(objective, config.optimizer, ds, packs_per_step=config.packs.per_step)
    if start.checkpoint:
        tensors = dict(read_tensors(start.checkpoint))
        engine.restore(tensors.get, steps=read_state(start.checkpoint)["optimizer_steps"])
        masker.load_state_dict({n.removeprefix(MASKER): t for n, t in tensors.items() if n.startswith(MASKER)})

    log = Log(
        start.run.path,
        start.step,
        config.steps,
        cost=report.cost(config.model.shape(ids)),
        peak=peak_flops(config.log.peak_flops),
    )
    for line in (*start.notes, *report.opening(config, packs, weights, start.step)):
        log.say(line)

    def evaluate(step: int) -> None:
        with meters.paused():
            found = validate(engine, held_out, config.validation.packs, ids, unigram)
            log.validation(step, found.loss, found.accuracy, found.unigram_loss)

    def save(step: int) -> None:
        with meters.paused():
            tensors = engine.share() | (
                {MASKER + n: t for n, t in masker.state_dict().items()} if ranks.is_main() else {}
            )
            state = {"step": step, "optimizer_steps": engine.steps, "packs": step * config.packs.per_step}
            log.say(publish(start.run, step, tensors, state, config.checkpoint.keep))

    # ---- the loop
    loader = Loader(packs, ranks.device())
    batches = loader.batches(numbers(config, start.step, engine.accumulate))
    meters = Meters(loader)
    step = start.step
    if step == 0:
        evaluate(step)
    while step < config.steps:
        progress = step / config.steps
        targets = config.packs.per_step * masker.budget(progress, config.packs.tokens)
        for _ in range(engine.accumulate):
            batch = next(batches)
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
            evaluate(step)
        if step % config.checkpoint.every == 0 or last or stopping:
            save(step)
        if stopping and not last:
            log.say(f"Stopped after step {step} of {config.steps}, as asked. The same command goes on from there.")
            break
    log.close()
    engine.close()
    if step == config.steps:
        ranks.by_main(lambda: report.ending(start.run, config, train, recipe))
    start.close()


def build(config: PretrainConfig, ids: TokenIds) -> nn.Module:
    """The objective with first weights that depend on the seed alone, or on `init`."""
    torch.manual_seed(config.seed)
    encoder = Encoder(config.model.shape(ids), config.model)
    objective = objectives.build(config.objective, encoder, Head(encoder, config.model))
    if config.init is not None:
        load_weights(objective, config.init, encoder.shape)
    return objective


def load_weights(objective: nn.Module, folder: Path, shape: EncoderShape) -> None:
    """First weights from a folder that tools/convert_from_hf.py made; ConfigError if they are of another shape."""
    there = json.loads((folder / "shape.json").read_text())
    here = dataclasses.asdict(shape)
    raise_all(
        ConfigError,
        [
            f"`model` has {key} {here[key]}, but the weights of `init` have {there.get(key)}."
            for key in here
            if here[key] != there.get(key)
        ],
    )
    objective.load_state_dict(load_file(folder / "model.safetensors"))


def numbers(config: PretrainConfig, start: int, accumulate: int) -> Iterator[int]:
    """The packs of this rank from step ``start`` on: step x packs per step + place in the step."""
    for step in range(start, config.steps):
        for micro in range(accumulate):
            yield step * config.packs.per_step + micro * ranks.world() + ranks.rank()


def seed_of(seed: int, number: int) -> int:
    """The seed of dropout for a pack: the same on any rank, so no generator's state need be saved."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 1) % 2**63


class Stop:
    """Whether somebody asked the run to stop: a signal to any rank stops all after the same step."""

    def __init__(self) -> None:
        self._asked = False
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(name, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True  # and nothing more: a handler that prints can die of it

    def agreed(self) -> bool:
        """Collective."""
        return bool(ranks.maximum(torch.tensor(float(self._asked))).item())


if __name__ == "__main__":
    sys.exit(main())
