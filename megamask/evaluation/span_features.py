"""The states of windows, and a linear layer for the first and the last token of an answer that is fitted to them.

The fit is a convex problem, solved by L-BFGS from zero, so nothing is random. A pass over the features of 4,000
questions in windows of 128 tokens takes a fraction of a second; about 100 to 200 are needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from transformers import PreTrainedModel

from megamask.evaluation.features import length_batches, pad_texts
from megamask.evaluation.span_windows import Windows
from megamask.hf.masked_lm import pad_id

PENALTIES = (1.0, 0.1, 0.01, 1e-3, 1e-4)
"""L2 penalties that are tried, relative to the mean loss of a window."""
MOST_ITERATIONS = 100


def window_states(model: PreTrainedModel, windows: Windows) -> Iterator[tuple[int, Float[np.ndarray, "_L D"]]]:
    """The number of each window and its states, without dropout and in fp32; in an order of its own."""
    model.eval()
    for rows in length_batches(windows.texts.lengths):
        batch = {
            name: values.to(model.device) for name, values in pad_texts(windows.texts, rows, pad_id(model)).items()
        }
        with torch.inference_mode():
            states = model(**batch).last_hidden_state.float().cpu().numpy()
        yield from ((row, states[at, : windows.texts.lengths[row]]) for at, row in enumerate(rows))


def window_logits(
    model: PreTrainedModel, windows: Windows, layer: Float[np.ndarray, "D 2"]
) -> list[Float[np.ndarray, "_L 2"]]:
    """The logits of the tokens of each window without a bias, which is equal for all tokens."""
    logits = {row: states @ layer for row, states in window_states(model, windows)}
    return [logits[row] for row in range(len(windows))]


# ---- the frozen encoder


@dataclass(frozen=True)
class SpanFeatures:
    """The states of the tokens that may be the first or last of an answer: those of the context, and the first."""

    states: Float[np.ndarray, "n D"]
    begins: Int[np.ndarray, " w"]
    """The place of the first token of each window."""
    targets: Int[np.ndarray, "w 2"]
    """The places of the first and the last token of its answer."""

    @classmethod
    def of(cls, model: PreTrainedModel, windows: Windows, tokens: Int[np.ndarray, "w 2"]) -> SpanFeatures:
        """The states, in a memory-mapped temporary file; ``tokens`` are those of the answers in the windows."""
        kept = [np.flatnonzero(context | (np.arange(len(context)) == 0)) for context in windows.context]
        ends = np.cumsum([len(each) for each in kept])
        begins = ends - [len(each) for each in kept]
        with tempfile.TemporaryFile() as file:
            states = np.memmap(file, np.float32, "w+", shape=(int(ends[-1]), model.config.hidden_size))
        for row, values in window_states(model, windows):
            states[begins[row] : ends[row]] = values[kept[row]]
        places = [begin + np.searchsorted(each, pair) for begin, each, pair in zip(begins, kept, tokens, strict=True)]
        return cls(states, begins, np.array(places))

    def losses(self, layer: Float[np.ndarray, "D 2"]) -> tuple[Float[np.ndarray, " w"], Float[np.ndarray, "n 2"]]:
        """The mean cross-entropy of both tokens for each window, and its gradient by the logits."""
        logits = (self.states @ layer.astype(np.float32)).astype(np.float64)
        sizes = np.diff(self.begins, append=len(logits))
        shifted = logits - np.repeat(np.maximum.reduceat(logits, self.begins), sizes, 0)
        sums = np.add.reduceat(np.exp(shifted), self.begins)
        gradient = np.exp(shifted) / np.repeat(sums, sizes, 0)
        at_targets = np.take_along_axis(shifted, self.targets, 0)
        for side in (0, 1):
            gradient[self.targets[:, side], side] -= 1
        return (np.log(sums) - at_targets).mean(1), gradient / 2


def fit_span_layer(
    features: SpanFeatures, held_out: Bool[np.ndarray, " w"]
) -> tuple[Float[np.ndarray, "D 2"], dict[str, float]]:
    """The layer for states as they are, and metrics: the penalty with the least loss on windows that are held out."""
    # a constant per feature does not change a softmax over tokens, so features are scaled and not centred
    with np.errstate(invalid="ignore"):
        scale = np.asarray(features.states.std(0, dtype=np.float64)).clip(1e-6)[:, None]
    if not np.isfinite(scale).all():
        return np.full((len(scale), 2), np.nan), {}
    sizes = np.diff(features.begins, append=len(features.states))

    def fit(chosen: np.ndarray, penalty: float, start: np.ndarray) -> tuple[np.ndarray, float]:
        by_token = np.repeat(chosen, sizes)[:, None] / chosen.sum()

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weights = flat.reshape(-1, 2)
            losses, by_logit = features.losses(weights / scale)
            by_weight = features.states.T @ (by_logit * by_token).astype(np.float32) / scale
            value = losses[chosen].mean() + penalty / 2 * (flat @ flat)
            return float(value), by_weight.astype(np.float64).ravel() + penalty * flat

        result = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": MOST_ITERATIONS})
        return result.x.reshape(-1, 2), float(result.nit < MOST_ITERATIONS)

    weights, losses, fitted = np.zeros((len(scale), 2)), {}, {}
    for penalty in PENALTIES:  # each fit starts from that with the larger penalty
        weights, _ = fit(~held_out, penalty, weights)
        fitted[penalty] = weights
        losses[penalty] = float(features.losses(weights / scale)[0][held_out].mean())
    penalty = min(losses, key=losses.__getitem__)
    weights, converged = fit(np.ones(len(held_out), bool), penalty, fitted[penalty])
    metrics = {"penalty": penalty, "held_out_loss": losses[penalty], "converged": converged}
    return weights / scale, metrics
