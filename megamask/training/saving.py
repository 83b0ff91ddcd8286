"""When a run is saved, at once or in the background, and how many failures to save it survives."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from megamask.checkpoint.save import CheckpointSave
from megamask.config.settings import CheckpointConfig
from megamask.errors import NonFiniteError, StorageError
from megamask.runtime import ranks
from megamask.training.components import RunComponents
from megamask.training.state import collect


class RunSaver:
    """Saves a run, one checkpoint at a time. Its methods are collective.

    With `checkpoint.background` a save copies what this rank writes, and the run continues while threads write the copy
    and publish it. A full disk does not stop training while older checkpoints exist: StorageError is raised only at the
    third failure in a row, or if no later attempt follows, and on all ranks. A context: at its end no save is left.
    """

    def __init__(self, config: CheckpointConfig):
        self.failures = 0
        """Attempts that failed since the last checkpoint."""
        self._config = config
        self._pending: CheckpointSave | None = None
        self._run: RunComponents | None = None
        """The run that is being saved."""
        self._waited = 0.0
        """Seconds in which training waited for the save."""

    def __enter__(self) -> RunSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        """Finish the save that is being written, if all ranks are here; otherwise say that it is lost."""
        if self._pending is None or self._run is None:
            return
        if error is None:
            self.finish(self._run, final=True)
        elif isinstance(error, NonFiniteError) or ranks.world() == 1:  # raised on all ranks alike
            try:
                self.finish(self._run)
            except StorageError as failure:
                self._run.log.say(str(failure))
        else:
            self._run.log.say(f"Checkpoint {self._pending.step} was still being written, so it is lost.")

    def save(self, run: RunComponents, step: int, *, final: bool, at_once: bool = False) -> None:
        """Save the run after ``step`` steps; in the background unless ``at_once``, or ``final``: no save follows."""
        self.finish(run)
        self._waited = 0.0
        background = self._config.background and not (final or at_once)

        def begin() -> str | None:
            run.engine.check_replicas()
            state, tensors = collect(run, step, copy=background)
            save = CheckpointSave(run.folder, step, tensors, state.record(), self._config.keep, background=background)
            if not background:
                return save.finish()
            self._pending = save
            return None

        with run.trainer.meters.paused():
            self._attempt(run, begin, final)

    def advance(self, run: RunComponents) -> None:
        """Go on with a save in the background, without waiting for files."""
        if self._pending is not None:
            self._attempt(run, self._pending.advance)

    def finish(self, run: RunComponents, *, final: bool = False) -> None:
        """Wait for the save in the background, if there is one."""
        if self._pending is not None:
            with run.trainer.meters.paused():
                self._attempt(run, self._pending.finish, final)

    def _attempt(self, run: RunComponents, act: Callable[[], str | None], final: bool = False) -> None:
        """Log the line that ``act`` returns for a checkpoint that is published, or count its failure."""
        self._run, begun = run, time.monotonic()
        try:
            line = act()
        except Exception as error:
            self._pending = None
            if not isinstance(error, StorageError) or final or self.failures == 2:
                raise
            run.log.say(f"{error} Training continues; the next checkpoint is tried as usual.")
            self.failures += 1
            return
        self._waited += time.monotonic() - begun
        if line is not None:
            self._pending, self.failures = None, 0
            run.log.say(f"{line}; training waited {self._waited:.1f} s")
