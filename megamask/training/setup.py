"""Build the objects of a run from its configuration, in the state of the checkpoint to start from.

Every part is checked as it is built; nothing here trains.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import torch

from megamask.checkpoint import resume
from megamask.checkpoint.run_folder import RunFolder
from megamask.config import predetermined_masks
from megamask.config.phases import longest_sequence, run_phases
from megamask.config.pretrain_config import PretrainConfig, as_dict
from megamask.data import pos_tagger
from megamask.data.loader import Loader
from megamask.data.mixed_sources import MixedPacks
from megamask.data.tokenizer import TOKENIZER
from megamask.engine.engine import Engine
from megamask.health.loss_spikes import SkippedPacks, SpikePolicy
from megamask.health.stragglers import StragglerDetector
from megamask.masking.corrupt import SourceTokens
from megamask.masking.masker import Masker
from megamask.metrics.logger import MetricsLogger
from megamask.metrics.mask_metrics import MaskMetrics
from megamask.metrics.meters import Meters
from megamask.model.shape import EncoderShape
from megamask.runtime import ranks
from megamask.teacher.stored_targets import StoredTargets
from megamask.teacher.teacher import Teacher
from megamask.training import state as states
from megamask.training.components import RunComponents
from megamask.training.entropy_sources import build_entropy_sources
from megamask.training.export import write_description
from megamask.training.flop_counter import FlopCounter, teacher_flops
from megamask.training.flops import PackFlops
from megamask.training.initial_weights import first_values, initial_model, initial_notes
from megamask.training.plateau import PlateauAlarm
from megamask.training.progress import Progress
from megamask.training.run_text import RunText
from megamask.training.step import Trainer


def build_run(config: PretrainConfig, ds: dict[str, Any], text: RunText, start: resume.RunStart) -> RunComponents:
    """The objects of a run, restored from the checkpoint of ``start`` if there is one. Collective.

    Raises ConfigError, DataError, CheckpointError and StorageError.
    """
    ids = text.packs.token_ids
    torch.manual_seed(config.seed)
    model = initial_model(config, ids, text.train.folder / TOKENIZER)
    objective = model.objective
    # a weight and two moments, 4 bytes each
    resume.check_space(config.output, 12 * sum(p.numel() for p in objective.parameters()))
    ranks.on_rank_zero(lambda: write_description(start.run, model.shape, text.train))

    teacher = load_teacher(config, text, model.shape) if config.teacher.path is not None else None
    stored = open_stored_targets(config, text) if config.distill.stored else None
    tags = pos_tagger.tag_names(text.train) if config.masking.score == "part_of_speech" else ()
    engine = Engine(
        objective,
        config.optimizer,
        ds,
        packs_per_step=config.packs.per_step,
        first_value=first_values(objective, model.weights, config.seed, restored=start.checkpoint is not None),
    )
    state = states.read_train_state(start.checkpoint) if start.checkpoint else states.TrainState(0)
    loader = Loader(text.packs, ranks.device())
    trainer = Trainer(
        engine=engine,
        masker=Masker(
            config.masking, ids, tags=tags, phases=run_phases(config), source_tokens=build_source_tokens(config, text)
        ),
        meters=Meters(loader, engine),
        policy=SpikePolicy(config.spikes, state.spikes),
        seed=config.seed,
        sources=build_entropy_sources(config, engine, text.packs, teacher),
        distillation=(stored or teacher) if config.distill.active else None,
        masks=build_mask_metrics(config, text),
    )
    if start.checkpoint:
        states.check_teacher(state, teacher.fingerprint if teacher else "", start.checkpoint)
        states.restore(start.checkpoint, state, engine, trainer.learners())

    run = RunComponents(
        config=config,
        text=text,
        shape=model.shape,
        folder=start.run,
        engine=engine,
        trainer=trainer,
        teacher=teacher,
        progress=Progress(config.steps, config.time_budget, state.seconds),
        stragglers=StragglerDetector(ranks.gather(socket.gethostname())),
        log=metrics_logger(config, start.run, start.step),
        plateau=PlateauAlarm(),
        flops=FlopCounter(
            PackFlops.of(config, model.shape, teacher_flops(teacher.module, teacher.weight) if teacher else None),
            state.flops,
        ),
        loader=loader,
        batches=loader.batches(pack_numbers(config, start.step, trainer.policy.skipped_packs)),
    )
    if start.checkpoint:
        for note in states.resume_notes(state, engine):
            run.log.say(note)
        if not state.flops:
            run.log.say(f"{start.checkpoint} does not record FLOPs: the log counts them from step {start.step} on.")
        if start.checkpoint.parent == start.run.checkpoints:
            states.check_derived(run, start.step, state, start.checkpoint)
    else:
        for note in initial_notes(config, model, ids):
            run.log.say(note)
    return run


def metrics_logger(config: PretrainConfig, folder: RunFolder, step: int) -> MetricsLogger:
    """The log of a run, continued after ``step``."""
    project, settings = config.log.wandb, as_dict(config)
    return MetricsLogger(folder.path, step, config.steps, wandb_project=project, settings=settings)


def build_source_tokens(config: PretrainConfig, text: RunText) -> SourceTokens | None:
    """The random tokens of each source of a mixture, if `masking.corruption.random_from` asks for them."""
    packs = text.packs
    if config.masking.corruption.random_from != "source" or not isinstance(packs, MixedPacks):
        return None
    counts = [source.shards.unigram for source in packs.sources.values()]
    return SourceTokens(counts, packs.source_of, packs.token_ids)


def build_mask_metrics(config: PretrainConfig, text: RunText) -> MaskMetrics:
    """Metrics about the targets by the frequency of their type, by source of a mixture, and by tag unless the score has
    metrics of each."""
    counts = torch.from_numpy(text.train.unigram.copy())
    counts[list(text.packs.token_ids.special)] = 0
    tagged = text.train.sidecar("tags") is not None and config.masking.score != "part_of_speech"
    tags = pos_tagger.tag_names(text.train) if tagged else ()
    packs = text.packs
    sources: dict[str, Any] = {}
    if isinstance(packs, MixedPacks):
        sources = {"sources": [*packs.sources], "source_of": packs.source_of}
    return MaskMetrics(counts, tags=tags, max_weight=config.masking.max_weight, **sources)


def open_stored_targets(config: PretrainConfig, text: RunText) -> StoredTargets:
    """The stored samples that `distill.stored` names, checked against the masks of the run."""
    return StoredTargets.open(
        config.distill,
        text.packs.token_ids,
        facts=predetermined_masks.facts(config, text.train.fingerprint),
        targets=predetermined_masks.targets(config),
        verify=config.verify,
    )


def load_teacher(config: PretrainConfig, text: RunText, shape: EncoderShape) -> Teacher:
    """The frozen model that `teacher` names, checked against the run."""
    return Teacher.load(
        config.teacher,
        config.distill,
        tokenizer=text.train.folder / TOKENIZER,
        ids=text.packs.token_ids,
        length=longest_sequence(config),
        vocab_size=shape.vocab_size,
    )


def pack_numbers(config: PretrainConfig, start: int, skipped_packs: SkippedPacks) -> Iterator[int]:
    """The packs of this rank from step ``start`` on: packs of all steps before + place in the step.

    After packs that ``skipped_packs`` skips, a step reads the packs of a later one, as many as that has.
    """
    phases = run_phases(config)
    for step in range(start, config.steps):
        source = step + skipped_packs.shift(step)
        first = phases.packs_before(source)
        for place in range(ranks.rank(), phases.at_step(source).per_step, ranks.world()):
            yield first + place
