"""`megamask replay`: steps of a run taken again in another folder, and their figures beside those of its log."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from megamask import pretrain
from megamask.checkpoint import resume
from megamask.checkpoint.format import RunFolder, read_state, verify
from megamask.checkpoint.settings import ReplayConfig
from megamask.config import cli
from megamask.config import pretrain_config as configuration
from megamask.engine.ds_file import resolve_auto
from megamask.errors import CheckpointError, ConfigError, DataError
from megamask.health.loss_spikes import SpikePolicy
from megamask.metrics.logger import read_metrics
from megamask.metrics.meters import CLOCKS
from megamask.runtime import precision, ranks
from megamask.runtime.progress_bar import ProgressBar
from megamask.storage import strict_json
from megamask.storage.old_names import with_new_names
from megamask.training.setup import JUDGE, RunComponents, build_run, numbers, open_run_text


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


def replay_step(run: RunFolder, step: int, data: Path | None, folder: Path) -> int:
    """Take the steps again that lead to the figures of ``step``, in ``folder``; 0 if these are those of the run."""
    config, ds, fingerprint = replay_settings(run, data, folder)
    every, last = config.log.every, config.steps
    end = min(-(-step // every) * every, last)
    told = figures(run, end)
    if not 1 <= step <= last or not told:
        raise ConfigError(f"{run.logs / 'metrics.jsonl'} has no figures of step {step}, which step {end} tells.")
    text = open_run_text(config)
    if text.train.fingerprint != fingerprint:
        raise DataError(f"{text.train.folder} is not the text of the run in {run.path}. Name that text with --data.")
    newest, _ = ranks.on_rank_zero(lambda: logged_steps(run, max(run.steps(), default=0)))
    judge = SpikePolicy(config.spikes, read_state(newest).get(JUDGE) if newest else None)
    begin = max((at for at in (*begins(run, judge), (end - 1) // every * every) if at < end), default=0)
    start = resume.RunStart(RunFolder(folder), *ranks.on_rank_zero(lambda: logged_steps(run, begin)), (), None)
    saved = [at for at in run.steps() if at >= end]
    then = read_state(run.checkpoint(min(saved))).get("settings") if saved else None
    if then and with_new_names(then) != configuration.changeable(config):
        raise ConfigError(f"{run.path} goes on under other settings since, so step {step} cannot be taken again.")
    parts = build_run(config, resolve_auto(ds, precision.common_support()), text, start)
    # packs that a rewind left out since are left out
    batches = parts.loader.batches(numbers(config, start.step, parts.engine.accumulate, judge.ledger))
    steps(replace(parts, batches=batches), start.step, end)
    parts.engine.close()
    return ranks.on_rank_zero(lambda: compare(told, figures(RunFolder(folder), end), end))


def replay_settings(run: RunFolder, data: Path | None, folder: Path) -> tuple[configuration.PretrainConfig, dict, str]:
    """The run's settings with another output folder, its DeepSpeed file, and the hash of its text."""
    said = configuration.read_settings(run.config)
    zero = folder / "deepspeed.json"
    ranks.on_rank_zero(lambda: zero.write_text(json.dumps(said.get("deepspeed") or {})))
    more = ["--data", str(data)] if data else []
    config = cli.parse_command(["--config", str(run.config), "--output", str(folder), "--no-export", *more]).run
    if config.time_budget:
        raise ConfigError("`time_budget` lets a clock decide, so no step of such a run can be taken again.")
    return config, configuration.check_config(config, zero, ranks.world()), str(said.get("text"))


def figures(run: RunFolder, step: int) -> dict[str, Any]:
    """What the log says of ``step``, but for speeds and the evaluation."""
    lines = [line for line in read_metrics(run.logs / "metrics.jsonl") if line["step"] == step]
    found = {name: value for line in lines for name, value in line.items()}
    return {name: value for name, value in found.items() if name not in CLOCKS and not name.startswith("valid/")}


def begins(run: RunFolder, judge: SpikePolicy) -> list[int]:
    """The steps after which a launch began, or went back to: there the sums of figures begin anew."""
    launches = strict_json.read_json(run.environment)["launches"] if run.environment.exists() else []
    return [*(launch["step"] for launch in launches), *(first for first, _ in judge.ledger.entries)]


def logged_steps(run: RunFolder, most: int) -> tuple[Path | None, int]:
    """The newest whole checkpoint of at most ``most`` steps, and its step; (None, 0) if there is none."""
    for step in (step for step in run.steps() if step <= most):
        try:
            verify(run.checkpoint(step))
        except CheckpointError as error:
            print(error, file=sys.stderr)
        else:
            return run.checkpoint(step), step
    return None, 0


def steps(parts: RunComponents, first: int, end: int) -> None:
    """The steps from ``first`` up to ``end`` as the loop takes them, with their figures."""
    # on a terminal the log has a bar
    hidden = not ranks.is_main() or sys.stdout.isatty()
    bar = None if hidden else ProgressBar("steps taken again", end - first, "step")
    for step in range(first, end):
        batches = [next(parts.batches) for _ in range(parts.engine.accumulate)]
        pretrain.take_and_log_step(parts, step, batches)
        if (step + 1) % parts.config.log.every == 0 or step + 1 == end:
            pretrain.log_metrics(parts, step + 1)
        pretrain.audit(parts, step + 1, batches[0])
        if bar:
            bar.update()
    parts.batches.close()
    parts.log.close()


def compare(told: dict[str, Any], again: dict[str, Any], step: int) -> int:
    """Say of each figure whether it is the same; 1 if one is not."""
    names = [name for name in told | again if told.get(name) != again.get(name)]
    for name in names:
        print(f"step {step}: {name} is {told.get(name)} in the log, but {again.get(name)} when taken again")
    print(f"step {step}: {len(told | again) - 1 - len(names)} figures are the same to the bit, {len(names)} differ")
    return 1 if names else 0
