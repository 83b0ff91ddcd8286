"""The unigram plateau: a model that has learned how frequent tokens are, and nothing about their context."""

from __future__ import annotations

ABOVE, BELOW = 0.5, 0.1
"""How far above and below the unigram loss a validation loss counts as the plateau, in nats."""
LONG = 0.1
"""Share of the run after which a plateau is reported."""


class PlateauAlarm:
    """Reports once per launch that the validation loss has stayed on the unigram plateau. Nothing of it is saved."""

    def __init__(self) -> None:
        self._begin: tuple[int, float] | None = None
        self._reported = False

    def sentence(self, step: int, progress: float, loss: float, unigram_loss: float) -> str:
        """A sentence if the losses, in nats, have been on the plateau for a tenth of the run, else an empty string.

        ``progress`` in [0, 1] is that after ``step`` steps.
        """
        if not -BELOW < loss - unigram_loss < ABOVE:
            self._begin = None
            return ""
        self._begin = self._begin or (step, progress)
        first, at = self._begin
        if self._reported or progress - at < LONG:
            return ""
        self._reported = True
        return (
            f"The validation loss has been at the unigram loss ({unigram_loss:.2f}) since step {first}: the model "
            "predicts how frequent tokens are and nothing more. What usually helps: `optimizer.kind` muon; in the "
            "preset modern, local attention in most layers (`model.global_every`, `model.local_window`); otherwise a "
            "much longer run."
        )
