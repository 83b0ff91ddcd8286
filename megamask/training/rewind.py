"""Go back to an older checkpoint after a loss spike, and skip the packs in between."""

from __future__ import annotations

from dataclasses import replace

from megamask.checkpoint import resume
from megamask.metrics.meters import Meters
from megamask.training.components import RunComponents
from megamask.training.flop_counter import FlopCounter
from megamask.training.setup import metrics_logger, pack_numbers
from megamask.training.state import read_train_state, restore


def rewind(run: RunComponents, step: int) -> tuple[RunComponents, int] | None:
    """The run as of a checkpoint from long before ``step`` (from 0), and the step of that checkpoint. Collective.

    None if no checkpoint is old enough. Newer checkpoints are renamed, and the metrics since are moved away.
    """
    config, trainer = run.config, run.trainer
    checkpoint, to, notes = resume.go_back(run.folder, step + 1 - config.spikes.rewind_steps)
    if checkpoint is None:
        run.log.say(f"No checkpoint is {config.spikes.rewind_steps} steps old, so the run does not rewind.")
        return None
    state = read_train_state(checkpoint)
    restore(checkpoint, state, run.engine, trainer.learners())
    trainer.masker.score.metrics()  # drops the metrics since the checkpoint
    policy = trainer.policy.rewound(state.spikes, to, step)
    first, end = (
        run.phases.packs_before(other + trainer.policy.skipped_packs.shift(other)) for other in (to, step + 1)
    )
    for note in notes:
        run.log.say(note)
    run.log.say(
        f"Rewound from step {step + 1} to step {to} (rewind {policy.rewinds} of {config.spikes.max_rewinds}). Packs "
        f"{first:,} to {end - 1:,} will be skipped."
    )
    run.log.close()
    run.batches.close()
    batches = run.loader.batches(pack_numbers(config, to, policy.skipped_packs))
    trainer = replace(trainer, policy=policy, meters=Meters(run.loader, run.engine))
    flops = FlopCounter(run.flops.flops, run.flops.state())  # the work of the steps that are lost was done
    return replace(run, trainer=trainer, log=metrics_logger(config, run.folder, to), flops=flops, batches=batches), to
