"""Stands in for pretrain.py where the script is the subject: the same run folder, signals and codes, without torch.

Each step's loss depends on all steps before it, so a run that lost, repeated or mixed up a step shows it for ever.
ENDS is an exit code with which it ends at once. DEAF is a file that it waits for before it handles signals, as if it
still imported torch; then signals stay pending until its first hold, so that all ranks handle them before one ends.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, os.environ["TESTS"])
import hold


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    run, rank, world = options.output, int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    ignored = signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    (run / f"started-{rank}").touch()
    while "DEAF" in os.environ and not Path(os.environ["DEAF"]).exists():
        time.sleep(0.02)
    stop: list[int] = []
    if "DEAF" in os.environ:
        signal.pthread_sigmask(signal.SIG_BLOCK, hold.SIGNALS)
    for number in hold.SIGNALS:
        signal.signal(number, lambda number, _: stop.append(number))
    names = ("SLURM_LOCALID", "SLURMD_NODENAME", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")
    print(
        json.dumps({name: os.environ.get(name) for name in names} | {"rank": rank, "world": world, "ignored": ignored}),
        flush=True,
    )
    if "ENDS" in os.environ:
        return int(os.environ["ENDS"])

    step, state = newest(run)
    meet(run, rank, world, stop)
    if rank == 0:
        (run / "config.json").write_text(json.dumps({"steps": options.steps, "log": {"steps": 1}}, indent=2))
        keep(run, step)
    while step < options.steps and not stop:
        hold.at(step, rank, world, run)
        step, state = step + 1, (state * 48271 + step) % 2147483647
        if rank == 0:
            with (run / "logs" / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": state}) + "\n")
            if step % options.every == 0 or step == options.steps or stop:
                save(run, step, state)
    if stop and step < options.steps:
        print(f"stopped by {signal.Signals(stop[0]).name} after step {step}", flush=True)
        return 75
    return 0


def meet(run: Path, rank: int, world: int, stop: list[int]) -> None:
    """Wait until all ranks have read where to begin: the first must not end before the last begins."""
    launch = f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    (run / f"ready-{launch}-{rank}").touch()
    while not stop and len(list(run.glob(f"ready-{launch}-*"))) < world:
        time.sleep(0.01)


def newest(run: Path) -> tuple[int, int]:
    """Step and state of the newest checkpoint."""
    steps = [int(folder.name.split("-")[1]) for folder in (run / "checkpoints").glob("step-*")]
    step = max(steps, default=0)
    return (step, int((run / "checkpoints" / f"step-{step}" / "state").read_text())) if step else (0, 1)


def save(run: Path, step: int, state: int) -> None:
    """Appears whole, or not at all."""
    made = run / "checkpoints" / f".tmp-{step}"
    made.mkdir(parents=True, exist_ok=True)
    (made / "state").write_text(str(state))
    made.rename(run / "checkpoints" / f"step-{step}")


def keep(run: Path, step: int) -> None:
    """Forget the figures of steps that were not saved."""
    path = run / "logs" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))


if __name__ == "__main__":
    sys.exit(main())
