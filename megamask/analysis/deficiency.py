"""Does an encoder give dimensions to [MASK] that real tokens never use? (Meng et al. 2024, MAE-LM)

The same text is read twice, as it stands and with some tokens replaced by [MASK]. The states after each layer make
five matrices, a row for each token of text ([CLS], [SEP] and padding are left out):

    clean    nothing is masked: every token
    masked   some are masked: every row, real tokens and [MASK]
    real     some are masked: the real tokens
    mask     some are masked: [MASK]
    under    nothing is masked: the tokens that [MASK] stands for in the other input

An encoder of MAE-LM reads the masked text as in its pretraining: without the rows of [MASK]. Then there is no
``mask``. (That of 3ML is given [MASK] from its first layer on, which it was not.)

``under`` is a control: as many rows as ``mask``, at the same places. Of each matrix the ranks of
``analysis.effective_rank``; of ``mask`` the share outside of the span of ``real``, and beside it that of ``under``
outside of the span of the other tokens of the clean input, which is what real tokens leave outside by themselves.

The span of a matrix is that of its first k right singular vectors, where k is its energy rank or its numerical rank.
Two shares: ``directions``, of the span of ``mask``, in which each direction counts alike (the mean squared sine of the
principal angles between the spans), and ``norm``, of the squared norm of the rows of ``mask``. Under the energy rank
about 1 - energy of the norm of real tokens lies outside of their own span, too.

Everything is done with the matrices as they are, and with the mean of each taken off: where one direction common to
all rows is much the largest, only the second says much. Packs go to two halves in turn. A figure is that of all rows;
beside it stand the mean of the halves' figures (what half the text would have said, so a figure that still grows with
the text shows) and half their difference, its standard error from two samples.

Differs from the paper: of its measure we know only that it is an effective rank, of inputs with and without [MASK]. Its
formula and threshold are not in the released code, so the usual forms are all given, at thresholds of our choice.

Costs two forward passes over the text, 8 x (layers + 1) x D^2 numbers of 64 bits (base: 0.5 GB, large: 1.7 GB), and 36
eigenvalue problems a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from megamask.analysis.effective_rank import Moments, Spectrum, Way, outside_directions, outside_norm
from megamask.analysis.layers import Layered, LayerStates
from megamask.batch import MaskPlan, PackedBatch
from megamask.runtime.progress_bar import ProgressBar

MATRICES = {
    "clean": "real tokens, nothing masked",
    "masked": "real tokens and [MASK] together",
    "real": "real tokens beside [MASK]",
    "mask": "[MASK]",
    "under": "the tokens under [MASK], nothing masked",
}
# which rows of which input: a plan hides some, the others are seen
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
"""Of one layer, by input and whether the plan hides the row."""


@dataclass(frozen=True)
class Cuts:
    """Where a spectrum is cut off."""

    energy: float
    """The energy rank takes the fewest directions that hold this share of the sum of squares."""
    threshold: float
    """The numerical rank takes the singular values above this share of the largest."""

    def dims(self, spectrum: Spectrum, way: Way) -> int:
        """How many directions are taken."""
        return spectrum.energy(self.energy) if way == "energy" else spectrum.numerical(self.threshold)

    def rank(self, spectrum: Spectrum, way: Way) -> float:
        """The rank, counted in any ``way``."""
        return spectrum.effective if way == "effective" else float(self.dims(spectrum, way))


@dataclass(frozen=True)
class RankFigure:
    """Of all rows; the mean of the two halves; and half of the difference between them, the standard error."""

    all: float
    half: float
    error: float

    @classmethod
    def of(cls, ask: Callable[[Mapping[str, Spectrum]], float], spectra: list[dict[str, Spectrum]]) -> RankFigure:
        """What ``ask`` finds in the ``spectra`` of all rows, of one half and of the other."""
        every, one, other = map(ask, spectra)
        return cls(every, (one + other) / 2, abs(one - other) / 2)


@dataclass(frozen=True)
class LayerRanks:
    """One layer: ranks by matrix and way; shares outside, of ``mask`` and ``under``, by way and kind.

    A matrix without rows is left out. ``values`` are the singular values, descending.
    """

    rows: dict[str, int]
    ranks: dict[str, dict[str, RankFigure]]
    outside: dict[str, dict[str, dict[str, RankFigure]]]
    values: dict[str, list[float]]


@dataclass(frozen=True)
class Analysis:
    """All layers from the embedding, of the matrices as they are and with their means taken off."""

    plain: list[LayerRanks]
    centred: list[LayerRanks]


@torch.no_grad()
def gather_states(
    model: Layered, texts: Iterable[tuple[PackedBatch, MaskPlan]], device: torch.device | str = "cpu"
) -> list[list[LayerMoments]]:
    """For each half of ``texts``, for each layer, the moments of the states."""
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
    for layer, found in zip(layers, states, strict=True):
        for which, these in rows.items():
            layer[f"{name} {which}"].add(found.index_select(0, these))


def analyse_layers(halves: list[list[LayerMoments]], cuts: Cuts) -> Analysis:
    """The figures of what ``gather`` found."""
    one, other = halves
    with ProgressBar("ranks", 2 * len(one), "layer") as bar:
        plain, centred = (
            [_layer(mine, its, cuts, centre) for mine, its in bar.over(zip(one, other, strict=True))]
            for centre in (False, True)
        )
    return Analysis(plain, centred)


def _empty(width: int, device: torch.device | str) -> LayerMoments:
    return {part: Moments(width, device) for part in dict.fromkeys(chain(*_PARTS.values()))}


def _layer(one: LayerMoments, other: LayerMoments, cuts: Cuts, centred: bool) -> LayerRanks:
    every = {part: one[part] + other[part] for part in one}
    samples = [_matrices(parts) for parts in (every, one, other)]
    spectra = [{name: moments.spectrum(centred) for name, moments in sample.items()} for sample in samples]
    names = [name for name in MATRICES if all(name in sample for sample in samples)]

    def rank(name: str, way: Way) -> RankFigure:
        return RankFigure.of(lambda found: cuts.rank(found[name], way), spectra)

    def directions(name: str, span: str, way: Way) -> RankFigure:
        return RankFigure.of(
            lambda found: outside_directions(
                found[name], cuts.dims(found[name], way), found[span], cuts.dims(found[span], way)
            ),
            spectra,
        )

    def norm(name: str, span: str, way: Way) -> RankFigure:
        return RankFigure.of(lambda found: outside_norm(found[name], found[span], cuts.dims(found[span], way)), spectra)

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
    found = {}
    for name, some in _PARTS.items():
        moments = parts[some[0]] if len(some) == 1 else parts[some[0]] + parts[some[1]]
        if moments.count:
            found[name] = moments
    return found
