"""Does an encoder give dimensions to [MASK] that real tokens never use? (Meng et al. 2024, MAE-LM)

The encoder reads the same text twice: as it is, and with some tokens replaced by [MASK]. The states after each layer
make five matrices with a row for each token of text ([CLS], [SEP] and padding are left out):

    clean    nothing masked: all tokens
    masked   some masked: all positions, real tokens and [MASK]
    real     some masked: the real tokens
    mask     some masked: [MASK]
    under    nothing masked: the tokens that [MASK] replaces in the other input

An encoder of MAE-LM reads the masked text as in its pretraining, without the [MASK] tokens, so it has no ``mask``. (An
encoder of 3ML gets [MASK] from its first layer on, unlike in its pretraining.)

``under`` is a control: as many rows as ``mask``, at the same positions. For each matrix the ranks of
``analysis.effective_rank`` are computed; for ``mask`` also the share outside the span of ``real``, and beside it the
share of ``under`` outside the span of the other tokens of the clean input, which is what real tokens leave outside.

The span of a matrix is that of its first k right singular vectors, where k is its energy rank or its numerical rank.
There are two shares. ``directions`` is the share of the span of ``mask``, in which each direction counts alike (the
mean squared sine of the principal angles between the spans). ``norm`` is the share of the squared norm of the rows of
``mask``. With the energy rank, about 1 - energy of the norm of real tokens is outside their own span, too.

Everything is computed for the matrices as they are and after subtracting the mean of each. If one direction common to
all rows dominates, only the second is informative. Packs go alternately to two halves. Each figure is that of all rows;
with it come the mean of the halves' figures (what half the text gives, which shows whether the figure still grows with
the text) and half their difference, the standard error from two samples.

Departure from the paper: it says only that its measure is an effective rank, with and without [MASK] in the input. Its
formula and threshold are not in the released code, so we compute all usual forms, with thresholds of our choice.

Costs two forward passes over the text, 8 x (layers + 1) x D^2 fp64 numbers (base: 0.5 GB, large: 1.7 GB), and 36
eigenvalue problems per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from megamask.analysis.effective_rank import Moments, Spectrum, Way, outside_directions, outside_norm
from megamask.analysis.layers import AnalyzedEncoder, LayerStates
from megamask.batch import MaskPlan, PackedBatch
from megamask.runtime.progress_bar import ProgressBar

MATRICES = {
    "clean": "real tokens, nothing masked",
    "masked": "real tokens and [MASK] together",
    "real": "real tokens beside [MASK]",
    "mask": "[MASK]",
    "under": "the tokens under [MASK], nothing masked",
}
# which positions of which input: a plan hides some, the others are seen
_PARTS = {
    "clean": ("clean seen", "clean hidden"),
    "masked": ("masked seen", "masked hidden"),
    "real": ("masked seen",),
    "mask": ("masked hidden",),
    "under": ("clean hidden",),
    "beside": ("clean seen",),
}
_SPANS = {"mask": "real", "under": "beside"}

LayerMoments = dict[str, Moments]
"""Of one layer, by input and whether the plan hides the position."""


@dataclass(frozen=True)
class Cuts:
    """Where a spectrum is truncated."""

    energy: float
    """The energy rank counts the fewest directions with this share of the sum of squares."""
    threshold: float
    """The numerical rank counts the singular values above this share of the largest."""

    def dims(self, spectrum: Spectrum, way: Way) -> int:
        """How many directions are kept."""
        return spectrum.energy(self.energy) if way == "energy" else spectrum.numerical(self.threshold)

    def rank(self, spectrum: Spectrum, way: Way) -> float:
        """The rank by any ``way`` of counting."""
        return spectrum.effective if way == "effective" else float(self.dims(spectrum, way))


@dataclass(frozen=True)
class RankFigure:
    """Of all rows; the mean of the two halves; half of the difference between them, the standard error."""

    all: float
    half: float
    error: float

    @classmethod
    def of(cls, measure: Callable[[Mapping[str, Spectrum]], float], spectra: list[dict[str, Spectrum]]) -> RankFigure:
        """The ``measure`` of the ``spectra`` of all rows, of one half and of the other."""
        all_rows, one, other = map(measure, spectra)
        return cls(all_rows, (one + other) / 2, abs(one - other) / 2)


@dataclass(frozen=True)
class LayerRanks:
    """One layer: ranks by matrix and way; shares outside the span, of ``mask`` and ``under``, by way and kind.

    A matrix without rows is left out. ``values`` are the singular values, descending.
    """

    rows: dict[str, int]
    ranks: dict[str, dict[str, RankFigure]]
    outside: dict[str, dict[str, dict[str, RankFigure]]]
    values: dict[str, list[float]]


@dataclass(frozen=True)
class Analysis:
    """All layers from the embedding on, of the matrices as they are and after subtracting their means."""

    plain: list[LayerRanks]
    centred: list[LayerRanks]


@torch.no_grad()
def gather_states(
    model: AnalyzedEncoder, texts: Iterable[tuple[PackedBatch, MaskPlan]], device: torch.device | str = "cpu"
) -> list[list[LayerMoments]]:
    """The moments of the states, by half of ``texts`` and by layer."""
    states = model.states.to(device)
    assert isinstance(states, LayerStates)
    halves = [[_empty(model.width, device) for _ in range(model.layers + 1)] for _ in range(2)]
    for number, (batch, plan) in enumerate(texts):
        batch, plan = batch.to(device), plan.to(device)
        seen = batch.maskable.index_fill(0, plan.hidden, False).nonzero().squeeze(1)
        rows = {"seen": seen, "hidden": plan.hidden}
        _add(halves[number % 2], "clean", states(batch.tokens, batch.layout), rows)
        if model.without_masks:
            left = states(plan.inputs.index_select(0, plan.visible), batch.layout.keep(plan.visible))
            _add(halves[number % 2], "masked", left, {"seen": torch.searchsorted(plan.visible, seen)})
        else:
            _add(halves[number % 2], "masked", states(plan.inputs, batch.layout), rows)
    return halves


def _add(layers: list[LayerMoments], name: str, states: Sequence[Tensor], rows: Mapping[str, Tensor]) -> None:
    for layer, layer_states in zip(layers, states, strict=True):
        for which, at in rows.items():
            layer[f"{name} {which}"].add(layer_states.index_select(0, at))


def analyze_layers(halves: list[list[LayerMoments]], cuts: Cuts) -> Analysis:
    """The figures of the moments that `gather_states` returns."""
    one, other = halves
    with ProgressBar("ranks", 2 * len(one), "layer") as bar:
        plain, centred = (
            [_layer(first, second, cuts, centre) for first, second in bar.over(zip(one, other, strict=True))]
            for centre in (False, True)
        )
    return Analysis(plain, centred)


def _empty(width: int, device: torch.device | str) -> LayerMoments:
    return {part: Moments(width, device) for part in dict.fromkeys(chain(*_PARTS.values()))}


def _layer(one: LayerMoments, other: LayerMoments, cuts: Cuts, centred: bool) -> LayerRanks:
    all_rows = {part: one[part] + other[part] for part in one}
    samples = [_matrices(parts) for parts in (all_rows, one, other)]
    spectra = [{name: moments.spectrum(centred) for name, moments in sample.items()} for sample in samples]
    names = [name for name in MATRICES if all(name in sample for sample in samples)]

    def rank(name: str, way: Way) -> RankFigure:
        return RankFigure.of(lambda by_name: cuts.rank(by_name[name], way), spectra)

    def directions(name: str, span: str, way: Way) -> RankFigure:
        return RankFigure.of(
            lambda by_name: outside_directions(
                by_name[name], cuts.dims(by_name[name], way), by_name[span], cuts.dims(by_name[span], way)
            ),
            spectra,
        )

    def norm(name: str, span: str, way: Way) -> RankFigure:
        return RankFigure.of(
            lambda by_name: outside_norm(by_name[name], by_name[span], cuts.dims(by_name[span], way)), spectra
        )

    cut: tuple[Way, ...] = ("energy", "numerical")
    return LayerRanks(
        {name: samples[0][name].count for name in names},
        {name: {way: rank(name, way) for way in ("effective", *cut)} for name in names},
        {
            name: {way: {"directions": directions(name, span, way), "norm": norm(name, span, way)} for way in cut}
            for name, span in _SPANS.items()
            if name in names
        },
        {name: spectra[0][name].values.tolist() for name in names},
    )


def _matrices(parts: LayerMoments) -> dict[str, Moments]:
    """The moments of each matrix that has rows."""
    sums = {
        name: parts[some[0]] if len(some) == 1 else parts[some[0]] + parts[some[1]] for name, some in _PARTS.items()
    }
    return {name: moments for name, moments in sums.items() if moments.count}
