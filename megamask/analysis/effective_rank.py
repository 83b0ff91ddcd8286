"""How many dimensions a set of vectors fills, without keeping the vectors.

``Moments`` takes rows block by block and keeps their count, mean and (D, D) scatter in fp64. The singular values of the
matrix of all rows are the square roots of the eigenvalues of its Gram matrix. That costs precision: eigenvalues are
exact to about 2e-16 of the largest, so singular values below 1.5e-8 of the largest are noise. The states come from a
network in fp32 with a rounding error of 1.2e-7, so little is lost: singular values below that share of the norm of the
matrix (``ROUNDING``) become 0, and thresholds below ``SMALLEST`` (`settings`) are refused. The mean is kept
separately (Chan et al. 1979), so subtracting it cancels no digits. Adding T rows costs T x D^2 multiply-adds, a
spectrum about 10 x D^3.

There are three ways to count, for singular values s_1 >= s_2 >= ... :

- ``effective``: exp of the entropy of p_i = s_i / sum s (Roy & Vetterli 2007, *The effective rank*). Between 1 and D,
  not an integer, without a threshold; D if all are equal.
- ``energy``: the smallest k with s_1^2 + ... + s_k^2 >= energy x sum s^2, the effective dimension of Cai et al. 2021
  (*Isotropy in the contextual embedding space*).
- ``numerical``: how many s_i > threshold x s_1, like numpy's ``matrix_rank`` with another threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

ROUNDING = torch.finfo(torch.float32).eps

Way = Literal["effective", "energy", "numerical"]


class Moments:
    """Count, mean and scatter (the sum of squares about the mean) of rows of width D, in 64 bits."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, rows: Float[Tensor, "T D"]) -> None:
        """Add ``rows``."""
        if not len(rows):
            return
        rows = rows.double()
        mean = rows.mean(0)
        rows = rows - mean
        self._join(len(rows), mean, rows.T @ rows)

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of rows."""
        total = Moments(len(self.mean), self.mean.device)
        for one in (self, other):
            if one.count:
                total._join(one.count, one.mean, one.scatter)
        return total

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        apart = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(apart, apart) * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    def spectrum(self, centred: bool = False) -> Spectrum:
        """Singular values and right singular vectors of the matrix of all rows, or of all rows minus their mean."""
        gram = self.scatter + self.count * torch.outer(self.mean, self.mean)
        noise = ROUNDING * gram.trace().sqrt()  # of the states, also if their mean is subtracted
        values, directions = torch.linalg.eigh(self.scatter if centred else gram)
        values = values.flip(0).clamp(min=0).sqrt()
        return Spectrum(values.where(values > noise, 0), directions.flip(1))


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a matrix, descending, and its right singular vectors as columns."""

    values: Float[Tensor, " D"]
    directions: Float[Tensor, "D D"]

    @property
    def effective(self) -> float:
        """exp of the entropy of the singular values as shares of their sum; 0 for rows of zeros."""
        total = self.values.sum()
        if total == 0:
            return 0.0
        return float(torch.special.entr(self.values / total).sum().exp())

    def energy(self, share: float) -> int:
        """The fewest directions with ``share`` of the sum of squares; 0 for rows of zeros."""
        squares = self.values.square().cumsum(0)
        if squares[-1] == 0:
            return 0
        return int((squares < share * squares[-1]).sum()) + 1

    def numerical(self, threshold: float) -> int:
        """How many singular values exceed ``threshold`` times the largest."""
        return int((self.values > threshold * self.values[0]).sum())


def outside_directions(inner: Spectrum, dims: int, outer: Spectrum, outer_dims: int) -> float:
    """The share of one subspace outside another: the mean squared sine of the principal angles between them.

    The subspaces are those of the first ``dims`` directions of ``inner`` and the first ``outer_dims`` of ``outer``.
    0: it is inside; 1: they are orthogonal; k / dims: k of its directions are new, the others are shared. A subspace of
    dimension 0 is inside.
    """
    if not dims:
        return 0.0
    u, v = inner.directions[:, :dims], outer.directions[:, :outer_dims]
    return max(0.0, 1 - float((v.T @ u).square().sum()) / dims)


def outside_norm(inner: Spectrum, outer: Spectrum, outer_dims: int) -> float:
    """The share of the squared norm of all rows of ``inner`` outside the first ``outer_dims`` of ``outer``.

    Directions count as much as the rows use them. Rows of zeros are inside.
    """
    squares = inner.values.square()
    if squares[0] == 0:
        return 0.0
    inside = (outer.directions[:, :outer_dims].T @ inner.directions).square().sum(0)
    return max(0.0, 1 - float((squares * inside).sum() / squares.sum()))
