"""The importance correction: weights with which a loss at chosen targets estimates that at targets drawn at random.

A mask that prefers hard tokens also teaches the model that masked tokens are hard: its prior shifts. The inclusion
probability pi of each target is known (`inclusion_probability.py`), so its loss can be weighted by
(M / (T pi))^correction, with M targets among T maskable tokens. At correction 1 the expected loss is that of M targets
drawn at random (Horvitz and Thompson 1952): the correction applies to the targets, not to their contexts, in which
other hard tokens are still hidden. At 0 the loss is unweighted. In between, the mean weight lies below 1 (Jensen's
inequality), so the loss is slightly smaller.

**Variance.** Unbiased does not mean better. The gradient's variance at a fixed number of targets is smallest if pi
follows the norm of each token's gradient (Zhao and Zhang 2015; Katharopoulos and Fleuret 2018), and grows where pi is
small but the gradient is not. Entropy is only a proxy for that norm, so a soft proposal is the safe choice. The
effective sample size (Kish 1965), (sum of weights)^2 / sum of squared weights, says how many equally weighted targets
would give the same variance if gradients did not depend on the weights. As a share of M it is on average near the
harmonic mean of pi over its mean: 1 for random masks, 0.8 for a soft preference, 0.3 for a hard one, whose gradients
are then as noisy as those of 0.3 M random targets.

`masking.random_share` r bounds the weights: a pi of at least about r M / T means a weight of at most about 1 / r.

Costs three kernels of M numbers a pack; nothing waits for the device.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from megamask.masking.settings import MaskingConfig


def loss_weights(
    config: MaskingConfig, probability: Float[Tensor, " M"], maskable_tokens: int
) -> Float[Tensor, " M"] | None:
    """The weight of each target, at most `masking.max_weight`; None without a correction.

    ``probability`` is that with which each was chosen among the ``maskable_tokens`` of the pack. Targets chosen at
    random weigh 1.
    """
    if not config.correction:
        return None
    # in 32 bits as the probabilities are, so that uniform probabilities give exactly 1
    uniform = torch.full_like(probability, len(probability) / maskable_tokens)
    weights = (uniform / probability) ** config.correction
    return weights if config.max_weight is None else weights.clamp(max=config.max_weight)
