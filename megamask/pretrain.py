"""Pretraining, top to bottom: configuration, data, model, engine, the loop, the ending.

    megamask pretrain --deepspeed zero2
    deepspeed megamask/pretrain.py --deepspeed zero2

Runs alike under `deepspeed`, `torchrun`, `srun` and `python`. Everything that a step depends on is a function of the
seed and of the number of its packs, so a run that was stopped and resumed takes the very steps of one that was not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the launchers call this file: `megamask pretrain` of this checkout, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import_module("megamask.__main__").run("pretrain")

from megamask.batch import PackedBatch
from megamask.checkpoint import resume as runs
from megamask.checkpoint.save import save_checkpoint
from megamask.config import cli
from megamask.config import pretrain_config as configuration
from megamask.config.pretrain_config import PretrainConfig
from megamask.data import manifest
from megamask.engine import ds_file
from megamask.errors import REQUEUE, NonFiniteError, StorageError
from megamask.health.loss_spikes import StepDecision
from megamask.health.stop_signals import EARLY, StoppedEarly, StopRequest
from megamask.health.watchdog import Watchdog
from megamask.runtime import entry_point, precision, ranks
from megamask.storage.dotted import is_under
from megamask.teacher import teacher as teachers
from megamask.training import summary
from megamask.training.setup import (
    GUIDANCE,
    JUDGE,
    MASKER,
    RunComponents,
    build_run,
    derived_state,
    open_run_text,
    rewind,
    writers,
)
from megamask.training.step import take_step
from megamask.training.validation import validate


@entry_point.command
def main(arguments: list[str] | None = None, stop: StopRequest | None = None) -> int:
    """Run a command line; returns the exit code, after printing the sentences of an error a user can mend.

    0: finished. 75: stopped as asked before the last step; the same command goes on. Others: `entry_point`.
    """
    asked = cli.parse_command(arguments)
    if asked.list_recipes:
        print(cli.show_recipes())
        return 0
    ds = configuration.check_config(asked.run, asked.deepspeed, ranks.world())
    configuration.check_change(asked.run, asked.change)
    if ranks.is_main():
        for line in asked.notes:
            print(line, file=sys.stderr)
    if asked.print_config:
        if asked.run.data is not None:
            manifest.read_shard_manifest(asked.run.data)
        print(cli.show_config(asked.run))
        return 0
    try:
        with stop or StopRequest() as stop:
            finished = pretrain(asked.run, ds, asked.resume, asked.recipe, stop, asked.change)
    except StoppedEarly:
        if ranks.is_main():
            print(EARLY, file=sys.stderr)
        return REQUEUE
    return 0 if finished else REQUEUE


def pretrain(
    config: PretrainConfig, ds: dict[str, Any], resume: str, recipe: str, stop: StopRequest, change: Sequence[str] = ()
) -> bool:
    """Train, or resume training, under a watchdog; returns whether the run is finished. Collective.

    Of ranks that fail for one cause, the first raises its error, the others a PeerLostError.
    """
    if ranks.is_main():
        print(summary.first_line(recipe, config.output), flush=True)
    with Watchdog(config.watchdog, stop) as watch:
        try:
            return train_watched(config, ds, resume, recipe, stop, change, watch)
        except Exception as error:
            reported = watch.error_to_report(error)
            if reported is error:
                raise
            raise reported from None


def train_watched(
    config: PretrainConfig,
    ds: dict[str, Any],
    resume: str,
    recipe: str,
    stop: StopRequest,
    change: Sequence[str],
    watch: Watchdog,
) -> bool:
    """Train until the end or a request to stop; at the end, export and summarise. Returns whether it is finished."""
    early = stop.early if ranks.world() == 1 else nullcontext
    ranks.init_process_group(watch.collective_timeout)
    watch.enter_phase("reading text")
    text = open_run_text(config, stop.early)
    if stop.any_rank():
        raise StoppedEarly
    watch.enter_phase("opening")
    support = precision.common_support()
    weights = ds_file.choose_precision(ds, support)
    taught = teachers.teacher_precision(config.teacher, support) if config.teacher.path is not None else None
    identity = configuration.as_dict(config) | {"recipe": recipe, "deepspeed": ds, "text": text.train.fingerprint}
    may_differ = configuration.MAY_DIFFER_ON_RESUME.union(change)
    facts = {"precision": str(weights)} | ({"teacher precision": str(taught)} if taught else {})
    with closing(runs.open_run(config.output, identity, resume, may_differ, text.train, facts)) as start:
        watch.start_heartbeats(start.run.logs, start.run.launch)
        watch.enter_phase("building", start.step)
        try:
            with early():
                parts = build_run(config, ds_file.resolve_auto(ds, support), text, start)
        except BaseException:  # refused, failed or stopped before the first step
            start.withdraw()
            raise
        ranks.set_collective_timeout(watch.collective_timeout)
        opening = summary.opening_lines(config, parts.shape, text.packs, parts.engine.num_weights, start.step)
        changed = [
            f"`{name}` is {now!r} from step {start.step} on; it was {before!r}."
            for name, (before, now) in start.changes.items()
            if is_under(name, change)
        ]
        opening += summary.compiling(config)
        for line in (*precision.precision_lines(weights, taught), *start.notes, *changed, *opening):
            parts.log.say(line)
        if text.packs.short and start.step == 0:
            parts.log.figures(
                0, {"data/packs_left_out": text.packs.short, "data/tokens_left_out": text.packs.short_tokens}
            )
        step = train_loop(parts, start.step, stop, watch)
        finished = parts.progress.over(step)
        watch.enter_phase("ending", step)
        parts.engine.close()
        if parts.teacher:
            parts.teacher.close()
        if finished:
            ranks.on_rank_zero(lambda: summary.finish_run(start.run, config, text.train))
    return finished


# ---- the loop


def train_loop(parts: RunComponents, step: int, stop: StopRequest, watch: Watchdog) -> int:
    """Steps from ``step`` to the last, or until somebody asks to stop; returns how many steps the run has."""
    config, engine, progress = parts.config, parts.engine, parts.progress
    failures, went_back, stopping = 0, False, stop.any_rank()
    if step == 0 and not stopping:
        evaluate(parts, step, watch)
    while not progress.over(step) and not stopping:
        watch.enter_phase("data", step)
        batches = [next(parts.batches) for _ in range(engine.accumulate)]
        watch.enter_phase("step", step)
        verdict = take_and_log_step(parts, step, batches)
        if verdict.rewinds:
            watch.enter_phase("rewind", step)
            if found := rewind(parts, step):
                (parts, step), went_back = found, True
                continue
        step += 1
        parts.log.advance(step)
        stopping, last = stop.any_rank(), progress.over(step)
        watch.enter_phase("figures", step)
        if step % config.log.every == 0 or last:
            log_metrics(parts, step)
        audit(parts, step, batches[0])
        due = step % config.validation.every == 0 or last
        save_first = stopping  # a launcher may kill the ranks soon after it passed on a signal
        if due and not save_first:
            evaluate(parts, step, watch)
        # what a rewind leaves out is durable with the next checkpoint; a run killed before that goes back once more
        if step % config.checkpoint.every == 0 or last or stopping or went_back:
            watch.enter_phase("save", step)
            failures = save(parts, step, failures, final=last or stopping)
            went_back = went_back and failures > 0
            stopping = stopping or (failures == 0 and stop.any_rank())  # a next save would hold nothing new
        if due and save_first:
            evaluate(parts, step, watch)
    if not progress.over(step):
        parts.log.say(f"Stopped after step {step} of {config.steps}, as asked. The same command goes on from there.")
    elif told := progress.ending(step):
        parts.log.say(told)
    parts.log.close()
    return step


def take_and_log_step(parts: RunComponents, step: int, batches: list[PackedBatch]) -> StepDecision:
    """Take ``step`` (from 0) on the packs that are this rank's in it; say what there is to say of it."""
    progress = parts.progress
    progress.tick()
    verdict = take_step(
        step, batches, progress=progress.at(step), rate=rate_of(parts, step),
        engine=parts.engine, masker=parts.masker, guidance=parts.guidance, meters=parts.meters, judge=parts.judge,
        seed=parts.config.seed,
    )  # fmt: skip
    if verdict.sentence:
        parts.log.say(verdict.sentence)
    return verdict


def rate_of(parts: RunComponents, step: int) -> float:
    """The learning rate of ``step`` (from 0), as of the last tick of the clock."""
    return parts.config.optimizer.lr.of_step(parts.progress.began(step), parts.progress.at(step + 1))


def log_metrics(parts: RunComponents, step: int) -> None:
    """Write the figures since the last time; NonFiniteError if the entropies among them are not finite."""
    window = parts.meters.take()
    progress = parts.progress
    masks = summary.mask_figures(parts.config, parts.masker, progress.at(step - 1))
    parts.log.train(step, window, rate_of(parts, step - 1), progress.left, masks)
    if progress.budget:
        parts.log.figures(step, {"progress": progress.at(step)})
    if found := parts.masker.score.figures():
        parts.log.figures(step, found)
    for line in parts.pace(window.busy_seconds):
        parts.log.say(line)
    if not math.isfinite(window.spread):
        raise NonFiniteError(
            f"Up to step {step} the entropy source {parts.guidance.source!r} gave numbers that are not finite. The "
            "same command goes on from the newest checkpoint; choose another `entropy.source` if it happens again."
        )
    if window.flat:
        parts.log.say_once(
            f"The entropies of {parts.guidance.source!r} are flat: inside a document they hardly differ, so the masks "
            "are hardly better than random ones."
        )


def audit(parts: RunComponents, step: int, batch: PackedBatch) -> None:
    """Hold the source of entropy in use against the exact signal, when it is time."""
    progress = parts.progress.at(step)
    if parts.progress.over(step) or not parts.masker.needs_entropy(progress):
        return
    with parts.meters.paused():
        share = parts.masker.budget(progress, batch.layout.rows) / batch.layout.rows
        verdict = parts.guidance.audit(step, batch, share)
        if verdict:
            parts.log.figures(step, verdict.figures)
            if verdict.sentence:
                parts.log.say(verdict.sentence)


def evaluate(parts: RunComponents, step: int, watch: Watchdog) -> None:
    """Evaluate on held-out text, and log the figures."""
    watch.enter_phase("evaluation", step)
    with parts.meters.paused():
        text = parts.text
        found = validate(parts.engine, text.held_out, parts.config.validation.packs, text.packs.token_ids, text.unigram)
        parts.log.validation(step, found.loss, found.accuracy, found.unigram_loss)


def save(parts: RunComponents, step: int, failures: int, *, final: bool) -> int:
    """Publish a checkpoint; returns how many attempts in a row have failed.

    A full disk is no reason to stop training while older checkpoints stand: StorageError is raised only at the third
    failure in a row, or if no later attempt will come (``final``). Collective, and all ranks find the same.
    """
    with parts.meters.paused():
        parts.engine.check_replicas()
        tensors = parts.engine.owned_tensors()
        if ranks.is_main():
            for prefix, learnt in ((MASKER, parts.masker.score), (GUIDANCE, parts.guidance)):
                tensors |= {prefix + name: tensor.cpu() for name, tensor in learnt.state_dict().items()}
        seconds = parts.progress.used
        state = {
            "optimizer_steps": parts.engine.steps,
            "seconds": seconds,
            "settings": configuration.changeable(parts.config),
            **derived_state(parts, step, seconds),
            JUDGE: parts.judge.state(),
            "teacher": parts.teacher.fingerprint if parts.teacher else "",
            **writers(parts.engine.stage, parts.engine.precision),
        }
        try:
            parts.log.say(save_checkpoint(parts.run, step, tensors, state, parts.config.checkpoint.keep))
        except StorageError as error:
            if final or failures == 2:
                raise
            parts.log.say(f"{error} Training goes on; the next checkpoint is tried as usual.")
            return failures + 1
    return 0
