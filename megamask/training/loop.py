"""A training run, top to bottom: text, checks, run folder, components, the loop over steps, the export.

Everything that a step depends on is a function of the seed and of the numbers of its packs, so a run that was stopped
and resumed computes the same numbers as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing, nullcontext
from typing import Any

from megamask.batch import PackedBatch
from megamask.checkpoint.resume import RunStart, open_run
from megamask.config.cli import Command
from megamask.config.pretrain_config import MAY_DIFFER_ON_RESUME, as_dict
from megamask.data.mixed_sources import MixedPacks
from megamask.engine import ds_file
from megamask.errors import NonFiniteError
from megamask.health.loss_spikes import StepDecision
from megamask.health.stop_signals import StoppedEarly, StopRequest
from megamask.health.watchdog import Watchdog
from megamask.metrics.step_profiler import StepProfiler
from megamask.runtime import precision, ranks
from megamask.runtime.cpu_memory import keep_freed_memory, return_freed_memory, return_large_blocks
from megamask.storage.dotted import is_under
from megamask.teacher.teacher import teacher_precision
from megamask.training import finish, summary
from megamask.training.components import RunComponents
from megamask.training.mfu import mfu
from megamask.training.rewind import rewind
from megamask.training.run_text import open_run_text
from megamask.training.saving import RunSaver
from megamask.training.setup import build_run
from megamask.training.step import take_step
from megamask.training.validation import source_metrics, validate_sources


def train(command: Command, ds: dict[str, Any], stop: StopRequest) -> bool:
    """Start or resume a run; returns whether it is finished. False: ``stop`` was requested before the last step.

    ``ds`` is the content of the DeepSpeed file. Raises StoppedEarly if ``stop`` was requested while the text was read.
    Of ranks that fail for one cause, the first raises its error, the others a PeerLostError. Collective.
    """
    if ranks.is_main():
        print(summary.first_line(command.recipe, command.run.output), flush=True)
    with Watchdog(command.run.watchdog, stop) as watch:
        try:
            return _train(command, ds, stop, watch)
        except Exception as error:
            reported = watch.error_to_report(error)
            if reported is error:
                raise
            raise reported from None


def _train(command: Command, ds: dict[str, Any], stop: StopRequest, watch: Watchdog) -> bool:
    config = command.run
    early = stop.early if ranks.world() == 1 else nullcontext
    ranks.init_process_group(watch.collective_timeout)
    return_large_blocks()
    watch.enter_phase("reading text")
    text = open_run_text(config, stop.early)
    if stop.any_rank():
        raise StoppedEarly
    watch.enter_phase("opening")
    support = precision.common_support()
    weights = ds_file.choose_precision(ds, support)
    teacher = teacher_precision(config.teacher, support) if config.teacher.path is not None else None
    identity = as_dict(config) | {"recipe": command.recipe, "deepspeed": ds, "text": text.train.fingerprint}
    may_differ = MAY_DIFFER_ON_RESUME.union(command.change)
    facts = {"precision": str(weights)} | ({"teacher precision": str(teacher)} if teacher else {})
    with closing(open_run(config.output, identity, command.resume, may_differ, text.train, facts)) as start:
        watch.start_heartbeats(start.run.logs, start.run.launch)
        watch.enter_phase("building", start.step)
        try:
            with early():
                run = build_run(config, ds_file.resolve_auto(ds, support), text, start)
        except BaseException:  # an error or a stop before the first step
            start.delete_new_folder()
            raise
        ranks.set_collective_timeout(watch.collective_timeout)
        keep_freed_memory(run.engine.num_weights) if ranks.device().type == "cpu" else return_freed_memory()
        lines = precision.precision_lines(weights, teacher)
        log_opening(run, start, [*lines, *start.notes], command.change)
        profiler = StepProfiler(start.run.logs, command.profile, start.step)
        step = train_loop(run, start.step, stop, watch, profiler)
        finished = run.progress.over(step)
        watch.enter_phase("ending", step)
        run.engine.close()
        if run.teacher:
            run.teacher.close()
        return_large_blocks()
        if finished:
            ranks.on_rank_zero(lambda: finish.finish_run(start.run, config, text.train))
    return finished


def log_opening(run: RunComponents, start: RunStart, notes: list[str], changed: Sequence[str]) -> None:
    """Log ``notes``, the settings that were ``changed`` on purpose, and what is trained on what."""
    config, packs = run.config, run.text.packs
    changes = [
        f"`{name}` is {now!r} from step {start.step} on; it was {before!r}."
        for name, (before, now) in start.changes.items()
        if is_under(name, changed)
    ]
    opening = summary.opening_lines(config, run.shape, packs, run.engine.num_weights, start.step)
    without_bytes = summary.without_bytes(run.text.held_out)
    for line in filter(None, (*notes, *changes, *opening, without_bytes, *summary.compiling(config))):
        run.log.say(line)
    if packs.short and start.step == 0:
        run.log.metrics(0, {"data/packs_left_out": packs.short, "data/tokens_left_out": packs.short_tokens})


# ---- the loop


def train_loop(run: RunComponents, step: int, stop: StopRequest, watch: Watchdog, profiler: StepProfiler) -> int:
    """Take the steps from ``step`` to the last, or until ``stop`` is requested; returns the number of steps taken."""
    with RunSaver(run.config.checkpoint) as saver:
        run, step = _take_steps(run, step, stop, watch, profiler, saver)
    if not run.progress.over(step):
        run.log.say(f"Stopped after step {step} of {run.config.steps}, as requested. The same command resumes the run.")
    elif line := run.progress.ending(step):
        run.log.say(line)
    if epochs := source_epochs(run, step):
        run.log.say(summary.epochs_read(epochs))
    if line := profiler.close():
        run.log.say(line)
    run.log.close()
    return step


def _take_steps(
    run: RunComponents, step: int, stop: StopRequest, watch: Watchdog, profiler: StepProfiler, saver: RunSaver
) -> tuple[RunComponents, int]:
    """The run, which a rewind replaces, and the number of steps taken."""
    config, progress = run.config, run.progress
    unsaved_rewind, stopping = False, stop.any_rank()
    if step == 0 and not stopping:
        evaluate(run, step, watch)
    while not progress.over(step) and not stopping:
        watch.enter_phase("data", step)
        batches = next_batches(run)
        watch.enter_phase("step", step)
        if take_and_log_step(run, step, batches).rewinds:
            watch.enter_phase("rewind", step)
            saver.finish(run)
            if rewound := rewind(run, step):
                (run, step), unsaved_rewind = rewound, True
                continue
        step += 1
        run.log.advance(step)
        if line := profiler.advance():
            run.log.say(line)
        stopping, last = stop.any_rank(), progress.over(step)
        saver.advance(run)
        watch.enter_phase("metrics", step)
        if step % config.log.every == 0 or last:
            log_metrics(run, step)
        audit_entropies(run, step, batches[0])
        evaluation_due = step % config.validation.every == 0 or last
        save_first = stopping  # a launcher may kill the ranks soon after it passed on a signal
        if evaluation_due and not save_first:
            evaluate(run, step, watch)
        # the skipped packs of a rewind become durable with the next checkpoint; a run killed before rewinds again
        if step % config.checkpoint.every == 0 or last or stopping or unsaved_rewind:
            watch.enter_phase("save", step)
            saver.save(run, step, final=last or stopping, at_once=unsaved_rewind)
            unsaved_rewind = unsaved_rewind and saver.failures > 0
            if not stopping and stop.any_rank():  # the next save would have no new step
                saver.finish(run)
                stopping = saver.failures == 0
        if evaluation_due and save_first:
            evaluate(run, step, watch)
    return run, step


def next_batches(run: RunComponents) -> list[PackedBatch]:
    """The packs of this rank in the next step. How many they are follows from the number of the first."""
    first = next(run.batches)
    run.engine.set_packs_per_step(run.phases.at_pack(first.number).per_step)
    return [first, *(next(run.batches) for _ in range(run.engine.accumulate - 1))]


def take_and_log_step(run: RunComponents, step: int, batches: list[PackedBatch]) -> StepDecision:
    """Take ``step`` (from 0) on this rank's packs, and log the decision about it."""
    run.progress.tick()
    progress, trainer, teacher = run.progress.at(step), run.trainer, run.teacher
    with_teacher = teacher is not None and trainer.distillation is teacher and teacher.distill.weight(progress) > 0
    run.flops.count_step(step, batches, progress, trainer.masker, trainer.sources.in_use, with_teacher)
    decision = take_step(run.trainer, step, batches, progress=run.progress.at(step), rate=learning_rate(run, step))
    if decision.sentence:
        run.log.say(decision.sentence)
    return decision


def learning_rate(run: RunComponents, step: int) -> float:
    """The learning rate of ``step`` (from 0), as of the last tick of the clock."""
    return run.config.optimizer.lr.of_step(run.progress.began(step), run.progress.at(step + 1))


def log_metrics(run: RunComponents, step: int) -> None:
    """Write the metrics since the last call. Raises NonFiniteError if entropies were NaN or Inf. Collective."""
    trainer, progress = run.trainer, run.progress
    window = trainer.meters.take()
    extra = summary.mask_metrics(run.config, trainer.masker, progress.at(step - 1)) | mfu(run.config, run.shape, window)
    if trainer.masks:
        extra |= trainer.masks.take()
    run.log.train(step, window, learning_rate(run, step - 1), progress.left, extra)
    log_totals(run, step)
    if progress.budget:
        run.log.metrics(step, {"progress": progress.at(step)})
    if metrics := trainer.masker.score.metrics():
        run.log.metrics(step, metrics)
    for line in run.stragglers(window.busy_seconds):
        run.log.say(line)
    source = trainer.sources.in_use
    if not math.isfinite(window.spread):
        raise NonFiniteError(
            f"Up to step {step} the entropy source {source!r} returned NaN or Inf. The same command resumes from the "
            "newest checkpoint. If it happens again, choose another `entropy.source`."
        )
    if window.flat:
        run.log.say_once(
            f"The entropies of {source!r} are flat: within a document they hardly differ, so the masks are hardly "
            "better than random ones."
        )


def log_totals(run: RunComponents, step: int) -> None:
    """Write tokens, FLOPs and seconds of training since the first step, once for each ``step``. Collective."""
    if run.flops.logged != step:
        run.flops.logged = step
        run.log.metrics(step, run.flops.metrics() | {"total/seconds": run.progress.used})
        log_epochs(run, step)


def source_epochs(run: RunComponents, step: int) -> dict[str, float]:
    """How often each source of a mixture was read in the first ``step`` steps; empty without a mixture."""
    packs = run.text.packs
    if not isinstance(packs, MixedPacks):
        return {}
    return packs.source_epochs(run.phases.packs_before(step + run.trainer.policy.skipped_packs.shift(step)))


def log_epochs(run: RunComponents, step: int) -> None:
    """Write how often each source of a mixture was read, and a line for each that has begun again."""
    epochs = source_epochs(run, step)
    if epochs:
        run.log.metrics(step, {f"total/epochs/{name}": value for name, value in epochs.items()})
    for name, value in epochs.items():
        if value >= 1:
            run.log.say_once(f"The source {name} was read {int(value)} times in full and begins again.")


def audit_entropies(run: RunComponents, step: int, batch: PackedBatch) -> None:
    """Compare the entropy source in use with the exact entropy, if an audit is due after ``step`` steps. Collective."""
    trainer, progress = run.trainer, run.progress.at(step)
    audit = trainer.sources.audit
    if audit is None or not audit.due(step) or run.progress.over(step) or not trainer.masker.needs_entropy(progress):
        return
    with trainer.meters.paused():
        share = trainer.masker.budget(progress, batch.layout.rows, batch.number) / batch.layout.rows
        run.flops.count_audit(batch, trainer.sources.in_use)
        (entropy,) = trainer.sources([batch])
        result = audit(batch, entropy, share)
        run.log.metrics(step, result.metrics)
        if result.sentence:
            run.log.say(result.sentence)


def evaluate(run: RunComponents, step: int, watch: Watchdog) -> None:
    """Evaluate on held-out text, and log the metrics. Collective."""
    watch.enter_phase("evaluation", step)
    log_totals(run, step)
    with run.trainer.meters.paused():
        text = run.text
        count, ids = run.config.validation.packs, text.packs.token_ids
        result, by_source = validate_sources(run.engine, text.held_out, count, ids, text.unigram)
        run.log.validation(step, result.loss, result.accuracy, result.unigram_loss, result.nats_per_byte)
        if len(by_source) > 1:
            run.log.metrics(step, source_metrics(by_source))
            for line in summary.source_losses(by_source):
                run.log.say(line)
        if line := run.plateau.sentence(step, run.progress.at(step), result.loss, result.unigram_loss):
            run.log.say(line)
