"""The command `megamask pretrain`. The run itself is in `megamask.training.loop`: start reading there.

    megamask pretrain --deepspeed zero2
    deepspeed megamask/pretrain.py --deepspeed zero2

Also runs under `torchrun`, `srun` and `python`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":  # the launchers call this file: `megamask pretrain` of this checkout, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import_module("megamask.__main__").run_subcommand("pretrain")

from megamask.config import cli
from megamask.config.checks import check_config
from megamask.config.pretrain_config import check_change
from megamask.config.sources import data_folders
from megamask.data import manifest
from megamask.errors import REQUEUE
from megamask.health.stop_signals import EARLY, StoppedEarly, StopRequest
from megamask.runtime import entry_point, ranks
from megamask.training.loop import train


@entry_point.command
def main(arguments: list[str] | None = None, stop: StopRequest | None = None) -> int:
    """Run a command line; returns the exit code, after printing the sentences of an error that a user can fix.

    0: finished. 75: stopped as requested before the last step; the same command resumes. Others: `entry_point`.
    """
    command = cli.parse_command(arguments)
    if command.list_recipes:
        print(cli.show_recipes())
        return 0
    ds = check_config(command.run, command.deepspeed, ranks.world())
    check_change(command.run, command.change)
    if ranks.is_main():
        for note in command.notes:
            print(note, file=sys.stderr)
    if command.print_config:
        for folder in data_folders(command.run.data):
            manifest.read_shard_manifest(folder)
        print(cli.show_config(command.run))
        return 0
    try:
        with stop or StopRequest() as stop:
            finished = train(command, ds, stop)
    except StoppedEarly:
        if ranks.is_main():
            print(EARLY, file=sys.stderr)
        return REQUEUE
    return 0 if finished else REQUEUE
