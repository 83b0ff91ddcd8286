"""What a run says of itself: sums gathered on the device, figures made of them, and where these are written.

``Meters`` add up on the device and wait for it once per line of figures, not once per step. ``Log`` writes each
line to TensorBoard (this is the only door to it), to ``logs/metrics.jsonl`` and to the console, on rank 0 alone.
Costs about fifteen small kernels per pack.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megamask import files, ranks
from megamask.batch import Losses, MaskPlan, PackedBatch

PEAKS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "V100": 125e12}
"""Dense 16-bit FLOP/s of one device by a part of its name, from the makers' data sheets (SXM form; fp16 for V100)."""


# ------------------------------------------------------------------------------------------------------ counting


@dataclass(frozen=True)
class Cost:
    """FLOPs of one forward pass: per token, per pair of tokens that attend, per target; a backward is two more.

    Matrix products alone are counted, as is usual for model FLOP utilisation (Chowdhery et al. 2022, appendix B),
    with full attention inside each document and the head at the targets alone.
    """

    token: int
    pair: int
    target: int
    local: int = 0
    """Per token and row of the window, of the layers that attend locally."""
    window: int = 0
    """Rows that those layers attend to."""

    @classmethod
    def of(
        cls, *, layers: int, width: int, inner: int, gated: bool, vocab: int, local_layers: int = 0, window: int = 0
    ) -> Cost:
        """Of an encoder with a BERT head (dense, then the vocabulary); ``inner`` is the feed-forward's width."""
        weights = layers * (4 * width**2 + (3 if gated else 2) * width * inner)
        attention = 4 * width
        return cls(
            token=2 * weights,
            pair=attention * (layers - local_layers),
            target=2 * width * (width + vocab),
            local=attention * local_layers,
            window=window,
        )

    def training(self, tokens: int, pairs: int, targets: int) -> float:
        """FLOPs of forward and backward. ``pairs`` is the sum of squared sequence lengths.

        With local layers an upper bound: how many rows a window holds is taken from the mean context.
        """
        seen = min(self.window * tokens, pairs)
        return 3.0 * (self.token * tokens + self.pair * pairs + self.local * seen + self.target * targets)


def peak_flops(stated: float | None = None) -> float | None:
    """FLOP/s that one device could do at most: as stated, else of a known GPU, else unknown."""
    if stated is not None or not torch.cuda.is_available():
        return stated
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAKS.items() if known in name), None)


@dataclass(frozen=True)
class Window:
    """Totals since the last line of figures, over all ranks."""

    steps: int
    skipped: int
    grad_norm: float
    """Mean over the steps that were not skipped, before clipping."""
    seconds: float
    """Of one rank, on average."""
    waited: float
    """Those of them in which it waited for data."""
    ranks: int
    nll: float
    """Sum over targets, in nats."""
    correct: float
    targets: int
    tokens: int
    """Real ones: padding is not counted."""
    pairs: int
    """Sum of squared sequence lengths."""

    def figures(self, lr: float, cost: Cost | None = None, peak: float | None = None) -> dict[str, float]:
        """The figures by the names under which they are written. Without a cost or peak there is no MFU."""
        found = {
            "train/loss": self.nll / self.targets,
            "train/accuracy": self.correct / self.targets,
            "lr": lr,
            "grad_norm": self.grad_norm,
            "mask_ratio": self.targets / self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
            "masked_per_second": self.targets / self.seconds,
        }
        if cost and peak:
            done = cost.training(self.tokens, self.pairs, self.targets)
            found["mfu"] = done / self.seconds / (self.ranks * peak)
        return found | {"data_wait": self.waited / self.seconds, "skipped_steps": self.skipped}


@runtime_checkable
class Waits(Protocol):
    """What meters need of a loader: the seconds that were spent waiting for it so far."""

    waited: float


class Meters:
    """Running sums of a rank; nothing here waits for the device but ``take``."""

    def __init__(self, loader: Waits | None = None):
        self._loader = loader
        self.loss = torch.zeros((), device=ranks.device())
        """Sum of the losses of the step so far, detached."""
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64, device=ranks.device())
        self._steps, self._skipped, self._norms = 0, 0, 0.0
        self._since, self._paused = time.perf_counter(), 0.0
        self._waited = self._loader.waited if self._loader else 0.0

    def add(self, batch: PackedBatch, plan: MaskPlan, losses: Losses) -> None:
        """Count a pack."""
        self.loss = self.loss + losses.total.detach()
        lengths = _real_lengths(batch).double()
        targets = torch.full((), len(plan.targets), dtype=torch.float64, device=lengths.device)
        self._sums += torch.stack(
            [losses.nll.double().sum(), losses.correct.double().sum(), targets, lengths.sum(), (lengths**2).sum()]
        )

    def step(self, grad_norm: float, skipped: bool = False) -> None:
        """Count an optimizer step."""
        self.loss = torch.zeros_like(self.loss)
        self._steps += 1
        self._skipped += skipped
        self._norms += 0.0 if skipped else grad_norm

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside, such as a validation or a save, is not counted as training time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    def take(self, add_over_ranks: Callable[[Tensor], Tensor] = ranks.sum) -> Window:
        """The totals since the last call, and start again. Collective; at least one step must have been counted."""
        mine = self._sums.tolist()  # waits for the device, so that the clock is read after the work
        seconds = time.perf_counter() - self._since - self._paused
        waited = (self._loader.waited if self._loader else 0.0) - self._waited
        own = torch.tensor([*mine, seconds, waited, 1.0], dtype=torch.float64, device=self._sums.device)
        nll, correct, targets, tokens, pairs, seconds, waited, world = add_over_ranks(own).tolist()
        moved = self._steps - self._skipped
        window = Window(
            steps=self._steps,
            skipped=self._skipped,
            grad_norm=self._norms / moved if moved else math.nan,
            seconds=seconds / world,
            waited=waited / world,
            ranks=int(world),
            nll=nll,
            correct=correct,
            targets=int(targets),
            tokens=int(tokens),
            pairs=int(pairs),
        )
        self._reset()
        return window


def _real_lengths(batch: PackedBatch) -> Int64[Tensor, " S"]:
    """The length of each sequence, 0 for those of padding: they have no row that may be masked."""
    upto = torch.cat([batch.maskable.new_zeros(1, dtype=torch.int64), batch.maskable.cumsum(0)])
    return batch.layout.lengths * (upto[batch.layout.cu_seqlens.long()].diff() > 0)


# ------------------------------------------------------------------------------------------------------- telling


class Log:
    """Figures of a run, by step: TensorBoard, ``logs/metrics.jsonl``, the console. Rank 0 writes, the others do not.

    What was written for steps after ``start``, by a launch that was killed before it saved them, is dropped, so a
    resumed run doubles nothing. A disk that cannot take a figure is told of on the console and stops nothing.
    """

    def __init__(self, folder: Path, start: int, steps: int, *, cost: Cost | None = None, peak: float | None = None):
        self.steps, self.cost, self.peak = steps, cost, peak
        self.path = folder / "logs" / "metrics.jsonl"
        self._board: SummaryWriter | None = None
        self._tells = ranks.is_main()
        if not self._tells:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_after(self.path, start)
        self._lines = self.path.open("a", buffering=1)
        # TensorBoard hides older events from this step on
        self._events = folder / "tensorboard"
        self._purge: int | None = start + 1 if start else 0
        hide = not sys.stdout.isatty()
        self._bar = tqdm(total=steps, initial=start, unit="step", file=sys.stdout, disable=hide, leave=False)

    def advance(self, step: int) -> None:
        """Move the progress bar, where there is one."""
        if self._tells:
            self._bar.update(step - self._bar.n)

    def train(self, step: int, window: Window, lr: float) -> dict[str, float]:
        """Write the figures of a window that ends after ``step`` steps; returns them, on every rank."""
        found = window.figures(lr, self.cost, self.peak)
        left = window.seconds / window.steps * (self.steps - step)
        if self._tells:
            loss, speed = found["train/loss"], found["tokens_per_second"]
            self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            self.advance(step)
        self._write(step, found, f"left {tqdm.format_interval(left)}")
        return found

    def validation(self, step: int, loss: float, accuracy: float, unigram_loss: float) -> None:
        """Write what the model of ``step`` loses on held-out text, in nats per target, beside a unigram guess."""
        perplexity = math.exp(loss) if loss < 700 else math.inf
        found = {"valid/loss": loss, "valid/perplexity": perplexity, "valid/accuracy": accuracy}
        self._write(step, found | {"valid/unigram_loss": unigram_loss})

    def say(self, line: str) -> None:
        """A line for people, above the progress bar."""
        if self._tells:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Write all that is left."""
        if self._tells:
            self._bar.close()
            for file in (self._board, self._lines):
                with suppress(OSError):  # told of when it was written
                    if file:
                        file.close()

    def _write(self, step: int, found: dict[str, float], more: str = "") -> None:
        if not self._tells:
            return
        try:
            self._keep(step, found)
        except OSError as error:
            self._board = None  # its thread has died of it; the next figures make a new one
            self.say(f"The figures of step {step} could not be written: {error.strerror}. Training goes on.")
        self.say("  ".join(part for part in (f"step {step}/{self.steps}", as_line(found), more) if part))

    def _keep(self, step: int, found: dict[str, float]) -> None:
        kept = {name: value if math.isfinite(value) else None for name, value in found.items()}  # JSON has no NaN
        self._lines.write(json.dumps({"step": step, **kept}) + "\n")
        if not self._board:
            self._board, self._purge = SummaryWriter(str(self._events), purge_step=self._purge), None
        for name, value in found.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()


_SHOWN: dict[str, tuple[str, str]] = {
    "train/loss": ("loss", "{:.4f}"),
    "train/accuracy": ("accuracy", "{:.1%}"),
    "valid/loss": ("validation loss", "{:.4f}"),
    "valid/perplexity": ("perplexity", "{:,.2f}"),
    "valid/accuracy": ("accuracy", "{:.1%}"),
    "valid/unigram_loss": ("unigram loss", "{:.4f}"),
    "lr": ("lr", "{:.2e}"),
    "grad_norm": ("grad norm", "{:.3g}"),
    "mask_ratio": ("masked", "{:.1%}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "masked_per_second": ("masked/s", "{:,.0f}"),
    "mfu": ("mfu", "{:.1%}"),
    "data_wait": ("waiting", "{:.1%}"),
    "skipped_steps": ("skipped", "{:.0f}"),
}


def as_line(found: dict[str, float]) -> str:
    """All figures in one line."""
    return "  ".join(f"{word} {form.format(found[name])}" for name, (word, form) in _SHOWN.items() if name in found)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; one that a kill cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _drop_after(path: Path, start: int) -> None:
    """Keep what was written up to step ``start``; nothing if the run starts afresh."""
    kept = [line for line in read_metrics(path) if start and line["step"] <= start]
    files.replace(path, "".join(json.dumps(line) + "\n" for line in kept))


def plot_curve(metrics: Path, picture: Path) -> None:
    """Draw training and validation loss against steps, with the unigram baseline, from a ``metrics.jsonl``."""
    from matplotlib.figure import Figure  # half a second that only the end of a run needs

    lines = read_metrics(metrics)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, label, style in (
        ("train/loss", "training", {"linewidth": 1.0, "alpha": 0.6}),
        ("valid/loss", "validation", {"marker": "o", "markersize": 3.5}),
        ("valid/unigram_loss", "unigram guess", {"linestyle": "--", "color": "grey"}),
    ):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(title="Masked-language-model loss", xlabel="step", ylabel="loss (nats per masked token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture, dpi=150)
