"""`megamask replay`: repeat steps of a run in another folder, and compare their metrics with those of its log."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from megamask.checkpoint.format import verify
from megamask.checkpoint.resume import RunStart
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.settings import ReplayConfig
from megamask.config import cli
from megamask.config.checks import check_config
from megamask.config.overrides import read_settings
from megamask.config.pretrain_config import CHANGEABLE, PretrainConfig
from megamask.config.sources import Data, data_folders
from megamask.engine.ds_file import resolve_auto
from megamask.errors import CheckpointError, ConfigError, DataError
from megamask.health.loss_spikes import SkippedPacks, SpikePolicy
from megamask.metrics.meters import TIMING_METRICS
from megamask.metrics.metrics_file import read_metrics
from megamask.runtime import precision, ranks
from megamask.runtime.progress_bar import ProgressBar
from megamask.storage import strict_json
from megamask.storage.dotted import is_under
from megamask.training.components import RunComponents
from megamask.training.loop import audit_entropies, log_metrics, next_batches, take_and_log_step
from megamask.training.run_text import open_run_text
from megamask.training.setup import build_run, pack_numbers
from megamask.training.state import read_train_state


def replay_run(config: ReplayConfig) -> int:
    """Repeat the steps that lead to the metrics of a step; 0 if the metrics are the same, else 1.

    Collective. Raises ConfigError, DataError, CheckpointError.
    """
    folder: Path | None = None
    try:
        ranks.init_process_group()
        folder = ranks.on_rank_zero(lambda: Path(tempfile.mkdtemp(prefix="replay-")))
        code = replay_step(RunFolder(config.run), config.step, config.data, folder)
    finally:
        if folder and ranks.is_main():
            shutil.rmtree(folder, ignore_errors=True)
    if ranks.is_distributed():
        ranks.destroy_process_group()
    return code


def replay_step(run: RunFolder, step: int, data: Data, folder: Path) -> int:
    """Repeat, in ``folder``, the steps that lead to the metrics of ``step``; 0 if these are those of the log."""
    ranks.on_rank_zero(run.check)
    config, ds, fingerprint = replay_settings(run, data, folder)
    every, last = config.log.every, config.steps
    end = min(-(-step // every) * every, last)
    logged = metrics_of(run, end)
    if not 1 <= step <= last or not logged:
        where = f" (in the line of step {end})" if step < end else ""
        raise ConfigError(f"{run.logs / 'metrics.jsonl'} has no metrics of step {step}{where}.")
    text = open_run_text(config)
    if text.train.fingerprint != fingerprint:
        folders = " ".join(str(shards.folder) for shards in text.train.sources)
        raise DataError(f"{folders} is not the text of the run in {run.path}. Name that text with --data.")
    newest, _ = ranks.on_rank_zero(lambda: newest_intact(run, max(run.steps(), default=0)))
    skipped_packs = SpikePolicy(config.spikes, read_train_state(newest).spikes if newest else {}).skipped_packs
    begin = max((at for at in (*window_starts(run, skipped_packs), (end - 1) // every * every) if at < end), default=0)
    start = RunStart(RunFolder(folder), *ranks.on_rank_zero(lambda: newest_intact(run, begin)), (), None)
    if (changed := last_change(run)) > start.step:
        raise ConfigError(
            f"The settings of {run.path} changed at step {changed}, and the replay would start at step {start.step}, "
            f"so step {step} cannot be repeated under one configuration."
        )
    if (note := moved_since(run, end)) and ranks.is_main():
        print(note)
    replayed = build_run(config, resolve_auto(ds, precision.common_support()), text, start)
    # from the newest checkpoint, so packs that a later rewind skipped are skipped here too
    numbers = pack_numbers(config, start.step, skipped_packs)
    take_steps(replace(replayed, batches=replayed.loader.batches(numbers)), start.step, end)
    replayed.engine.close()
    return ranks.on_rank_zero(lambda: compare(logged, metrics_of(RunFolder(folder), end), end))


def replay_settings(run: RunFolder, data: Data, folder: Path) -> tuple[PretrainConfig, dict, str]:
    """The run's settings with another output folder, its DeepSpeed file, and the hash of its text."""
    settings = read_settings(run.config)
    zero = folder / "deepspeed.json"
    ranks.on_rank_zero(lambda: zero.write_text(json.dumps(settings.get("deepspeed") or {})))
    more = ["--data", *map(str, data_folders(data))] if data else []
    config = cli.parse_command(
        ["--config", str(run.config), "--output", str(folder), "--no-export", "--log.wandb", "None", *more]
    ).run
    if config.time_budget:
        raise ConfigError("The run has a `time_budget`: a clock decided its schedules, so no step can be repeated.")
    return config, check_config(config, zero, ranks.world()), str(settings.get("text"))


def metrics_of(run: RunFolder, step: int) -> dict[str, Any]:
    """The logged metrics of ``step``, without timings, the evaluation, and totals, which older logs lack."""
    lines = [line for line in read_metrics(run.logs / "metrics.jsonl") if line["step"] == step]
    metrics = {name: value for line in lines for name, value in line.items()}
    left_out = ("valid/", "flops/", "total/")
    return {
        name: value for name, value in metrics.items() if name not in TIMING_METRICS and not name.startswith(left_out)
    }


def launches_of(run: RunFolder) -> list[dict[str, Any]]:
    """The launches of ``run``, oldest first."""
    return strict_json.read_json(run.environment)["launches"] if run.environment.exists() else []


def last_change(run: RunFolder) -> int:
    """The step at which a launch last changed settings that decide how far a step goes; 0 if none did."""
    changes = [(launch["step"], name) for launch in launches_of(run) for name in launch.get("changes", ())]
    return max((step for step, name in changes if is_under(name, CHANGEABLE)), default=0)


def moved_since(run: RunFolder, step: int) -> str:
    """A sentence if ``step`` was taken on another number of ranks than the replay, or under another DeepSpeed file."""
    launches = launches_of(run)
    taken = max((number for number, launch in enumerate(launches) if launch["step"] < step), default=None)
    if taken is None:
        return ""
    count = launches[taken].get("hardware", {}).get("ranks", ranks.world())
    changed = {name for launch in launches[taken + 1 :] for name in launch.get("changes", ())}
    causes = [f"{count} rank{'s' * (count != 1)} instead of {ranks.world()}"] if count != ranks.world() else []
    causes += [f"another `{name}`" for name in sorted(changed) if is_under(name, ["deepspeed"])]
    if not causes:
        return ""
    return f"Step {step} was taken with {' and '.join(causes)}, so its metrics may differ in the last digits."


def window_starts(run: RunFolder, skipped_packs: SkippedPacks) -> list[int]:
    """The steps after which a launch began or rewound to; there the sums of metrics start again."""
    return [*(launch["step"] for launch in launches_of(run)), *(first for first, _ in skipped_packs.entries)]


def newest_intact(run: RunFolder, most: int) -> tuple[Path | None, int]:
    """The newest intact checkpoint of at most ``most`` steps, and its step; (None, 0) if there is none."""
    for step in (step for step in run.steps() if step <= most):
        try:
            verify(run.checkpoint(step))
        except CheckpointError as error:
            print(error, file=sys.stderr)
        else:
            return run.checkpoint(step), step
    return None, 0


def take_steps(run: RunComponents, first: int, end: int) -> None:
    """The steps from ``first`` up to ``end`` as the training loop takes them, with their metrics."""
    # on a terminal the log has a bar
    hidden = not ranks.is_main() or sys.stdout.isatty()
    bar = None if hidden else ProgressBar("steps repeated", end - first, "step")
    for step in range(first, end):
        batches = next_batches(run)
        take_and_log_step(run, step, batches)
        if (step + 1) % run.config.log.every == 0 or step + 1 == end:
            log_metrics(run, step + 1)
        audit_entropies(run, step + 1, batches[0])
        if bar:
            bar.update()
    run.batches.close()
    run.log.close()


def compare(logged: dict[str, Any], repeated: dict[str, Any], step: int) -> int:
    """Print which metrics differ; 1 if one does, else 0."""
    names = [name for name in logged | repeated if logged.get(name) != repeated.get(name)]
    for name in names:
        print(f"step {step}: {name} is {logged.get(name)} in the log, but {repeated.get(name)} when repeated")
    same = len(logged | repeated) - 1 - len(names)
    print(f"step {step}: {same} metrics are the same bit for bit, {len(names)} differ")
    return 1 if names else 0
