"""Write the metrics of a run to TensorBoard, to a JSON Lines file, to Weights & Biases and to the console.

The only module that imports TensorBoard.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megamask.metrics.meters import Window
from megamask.metrics.metrics_file import drop_metrics_after
from megamask.metrics.weights_and_biases import WandbRun
from megamask.runtime import ranks


class MetricsLogger:
    """Writes the metrics of a run by step; only rank 0 writes.

    Metrics of steps after ``start``, from a launch that was killed before it saved these steps, are dropped, so a
    resumed run has every step once. Write failures are reported on the console and do not stop training: these metrics
    are lost, and the next ones are tried as usual.
    """

    def __init__(
        self, folder: Path, start: int, steps: int, *, wandb_project: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self.steps = steps
        self.path = folder / "logs" / "metrics.jsonl"
        self._board: SummaryWriter | None = None
        self._lines: TextIO | None = None
        self._kept = start
        """The last step with metrics in the file."""
        self._printed: set[str] = set()
        self._wandb: WandbRun | None = None
        self._writes = ranks.is_main()
        if not self._writes:
            return
        # TensorBoard hides older events from this step on
        self._events = folder / "tensorboard"
        self._purge: int | None = start + 1 if start else 0
        hide = not sys.stdout.isatty()
        self._bar = tqdm(total=steps, initial=start, unit="step", file=sys.stdout, disable=hide, leave=False)
        try:
            self._lines = self._open()
        except OSError as error:
            self.say(f"{self.path} cannot be written: {error.strerror}. Training continues.")
        if wandb_project is not None:
            try:
                self._wandb = WandbRun(wandb_project, folder, settings or {}, resumes=start > 0)
                self.say(f"Weights & Biases: {self._wandb.place}")
            except Exception as error:
                self._leave_wandb(error)

    def advance(self, step: int) -> None:
        """Move the progress bar, if there is one."""
        if self._writes:
            self._bar.update(step - self._bar.n)

    def train(
        self, step: int, window: Window, lr: float, limit: float | None = None, extra: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Write the metrics of a window that ends after ``step`` steps, and ``extra`` ones. Returns all, on every rank.

        ``limit`` is the number of seconds after which the run ends, if it has a time budget.
        """
        metrics = window.metrics(lr) | dict(extra or {})
        if self._writes:
            loss, speed = metrics["train/loss"], metrics.get("tokens_per_second")
            shown = f"loss {loss:.3f}" + (f", {speed:,.0f} tokens/s" if speed else "")
            self._bar.set_postfix_str(shown, refresh=False)
            self.advance(step)
        self._write(step, metrics, self._left(step, window, limit))
        return metrics

    def _left(self, step: int, window: Window, limit: float | None) -> str:
        """The time left; empty while only the first step of a launch was timed."""
        timed = window.timed
        left = timed.seconds / timed.steps * (self.steps - step) if timed.steps else limit
        if left is None:
            return ""
        return f"ETA {tqdm.format_interval(left if limit is None else min(left, limit))}"

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Write other metrics."""
        self._write(step, metrics)

    def validation(
        self, step: int, loss: float, accuracy: float, unigram_loss: float, nats_per_byte: float | None = None
    ) -> None:
        """Write the validation loss after ``step`` steps, in nats per target, and that of a unigram guess."""
        perplexity = math.exp(loss) if loss < 700 else math.inf
        metrics = {"valid/loss": loss, "valid/perplexity": perplexity, "valid/accuracy": accuracy}
        metrics |= {} if nats_per_byte is None else {"valid/nats_per_byte": nats_per_byte}
        self._write(step, metrics | {"valid/unigram_loss": unigram_loss})

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        if self._writes:
            with suppress(OSError):  # a closed pipe must not cost the last checkpoint
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()

    def say_once(self, line: str) -> None:
        """Print a line, unless it was printed before."""
        if line not in self._printed:
            self._printed.add(line)
            self.say(line)

    def close(self) -> None:
        """Flush and close everything."""
        if self._writes:
            self._bar.close()
            if self._wandb:
                try:
                    self._wandb.close()
                except Exception as error:
                    self._leave_wandb(error)
            for file in (self._board, self._lines):
                with suppress(OSError):  # reported when it was written
                    if file:
                        file.close()

    def _write(self, step: int, metrics: dict[str, float], more: str = "") -> None:
        if not self._writes:
            return
        if self._wandb:
            try:
                self._wandb.write(step, metrics)
            except Exception as error:
                self._leave_wandb(error)
        failed: dict[str, None] = {}
        for write in (self._to_lines, self._to_board):
            try:
                write(step, metrics)
            except OSError as error:
                failed[error.strerror or str(error)] = None
        if failed:
            self.say(f"The metrics of step {step} could not be written: {', '.join(failed)}. Training continues.")
        shown = as_line(metrics)
        if shown:  # some metrics are only for the files
            self.say("  ".join(part for part in (f"step {step}/{self.steps}", shown, more) if part))

    def _leave_wandb(self, error: Exception) -> None:
        """Continue without Weights & Biases: an error of another service must not stop a run."""
        self._wandb = None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self.say(f"No more metrics are sent to Weights & Biases: {reason}. Training continues.")

    def _open(self) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        drop_metrics_after(self.path, self._kept)
        return self.path.open("a", buffering=1)

    def _to_lines(self, step: int, metrics: dict[str, float]) -> None:
        kept = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        try:
            self._lines = self._lines or self._open()
            self._lines.write(json.dumps({"step": step, **kept}) + "\n")
        except OSError:
            lines, self._lines = self._lines, None  # it may end in half a line, which the next open drops
            with suppress(OSError):
                if lines:
                    lines.close()
            raise
        self._kept = step

    def _to_board(self, step: int, metrics: dict[str, float]) -> None:
        try:
            if not self._board:
                self._board, self._purge = SummaryWriter(str(self._events), purge_step=self._purge), None
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        except OSError:
            self._board = None  # its thread has ended; the next metrics start a new one
            raise


_SHOWN: dict[str, tuple[str, str]] = {
    "train/loss": ("loss", "{:.4f}"),
    "train/accuracy": ("accuracy", "{:.1%}"),
    "valid/loss": ("validation loss", "{:.4f}"),
    "valid/perplexity": ("perplexity", "{:,.2f}"),
    "valid/accuracy": ("accuracy", "{:.1%}"),
    "valid/nats_per_byte": ("nats per byte", "{:.4f}"),
    "valid/unigram_loss": ("unigram loss", "{:.4f}"),
    "train/distill": ("distill", "{:.4f}"),
    "train/distill_sampled": ("distill (samples)", "{:.4f}"),
    "distill/weight": ("distill weight", "{:.2f}"),
    "entropy/mean": ("entropy", "{:.3f}"),
    "entropy/spread": ("spread", "{:.3f}"),
    "audit/overlap": ("audit: overlap", "{:.3f}"),
    "audit/gain": ("gain", "{:.3f}"),
    "audit/ceiling": ("of", "{:.3f}"),
    "audit/spearman": ("spearman", "{:.3f}"),
    "lr": ("lr", "{:.2e}"),
    "grad_norm": ("grad norm", "{:.3g}"),
    "mask_ratio": ("masked", "{:.1%}"),
    "masking/random_share": ("of them at random", "{:.1%}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "masked_per_second": ("masked/s", "{:,.0f}"),
    "mfu": ("mfu", "{:.1%}"),
    "data_wait": ("data wait", "{:.1%}"),
    "skipped_steps": ("skipped", "{:.0f}"),
}


def as_line(metrics: dict[str, float]) -> str:
    """All metrics in one line."""
    return "  ".join(f"{word} {form.format(metrics[name])}" for name, (word, form) in _SHOWN.items() if name in metrics)
