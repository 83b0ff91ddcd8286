"""pretrain.py itself, but for the holds and failures that a test asks for (see hold.py).

Of an array only the first task is held; to the others this is pretrain.py.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, os.environ["TESTS"])
import hold

if os.environ.get("SLURM_ARRAY_TASK_ID", "1") != "1":
    runpy.run_path(str(Path(os.environ["TESTS"]).parents[1] / "megamask" / "pretrain.py"), run_name="__main__")

from megamask import pretrain
from megamask.runtime import ranks
from megamask.training import loop

if __name__ == "__main__":
    take_step, run = loop.take_step, {}
    train = loop.train_loop

    def held_train(parts, *rest):
        run["folder"] = parts.folder.path
        return train(parts, *rest)

    def held_step(trainer, step, *rest, **named):
        hold.at(step, ranks.rank(), ranks.world(), run["folder"])
        return take_step(trainer, step, *rest, **named)

    loop.train_loop, loop.take_step = held_train, held_step
    ranks.exit_process(pretrain.main())
