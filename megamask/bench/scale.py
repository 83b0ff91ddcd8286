"""The time of a step on many GPUs, from its parts on one and from stated bandwidths: arithmetic, without torch.

Every rank computes as many tokens as the one GPU did (weak scaling). A rank sends, for Psi weights of p bytes in A
micro-steps (Rajbhandari et al. 2020, section 7), in units of Psi p (N - 1) / N:

    stage 0      2      gradients, all-reduced once a step
    stage 1      1 + 1  gradients, reduce-scattered once a step; weights, gathered once
    stage 2      A + 1  gradients in every micro-step, as DeepSpeed sends them; weights once
    stage 3      A + 2A gradients, and weights for each forward and each backward pass

Departures: DeepSpeed 0.19.8 all-reduces the gradients of stages 1 and 2 with its default
`use_multi_rank_bucket_allreduce`, which counts twice (``all_reduces``), and its stage 3 gathers a weight with two uses
twice in a pass (``shared``). A collective takes its bytes over the bus bandwidth, as nccl-tests state it, of the
slowest link of its ring, and a latency for each round of a tree. A part of it, ``overlap``, hides behind the passes it
may run beside: gradients behind backward passes, of stages 0 and 1 behind the last one alone; gathered weights of
stage 3 behind the passes before which they are gathered; those of stages 1 and 2 behind nothing. From stage 1 on a
rank's optimizer moves 1 / N of the weights. Not counted: slow ranks, the loader, contention with compute for memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step on one GPU."""

    forward: float
    """Of a micro-step."""
    backward: float
    """Of a micro-step."""
    optimizer: float
    """Of all weights."""
    rest: float = 0.0
    """Of a step: masks, figures, data, the norm of the gradient."""

    def scaled(self, share: float) -> StepSeconds:
        """With a ``share`` of the tokens: passes are proportional to them, the rest is not."""
        return StepSeconds(share * self.forward, share * self.backward, self.optimizer, self.rest)

    @classmethod
    def from_rate(cls, flops: float, rate: float, optimizer: float = 0.0) -> StepSeconds:
        """An estimate for a micro-step of ``flops`` at ``rate`` FLOP/s: a third of them are the forward pass."""
        return cls(flops / rate / 3, 2 * flops / rate / 3, optimizer)


@dataclass(frozen=True)
class Links:
    """Bus bandwidths in bytes per second of a GPU, as nccl-tests measure them."""

    inside: float
    """Between the GPUs of a node."""
    between: float
    """In a ring over several nodes."""
    per_node: int = 8
    """GPUs of a node."""
    latency: float = 20e-6
    """Seconds of a round of a collective."""

    def seconds(self, ranks: int, size: float, count: float) -> float:
        """``count`` collectives that send ``size`` bytes (before (N - 1) / N) in all."""
        if ranks == 1:
            return 0.0
        bandwidth = self.inside if ranks <= self.per_node else min(self.inside, self.between)
        return size * (ranks - 1) / ranks / bandwidth + count * self.latency * math.ceil(math.log2(ranks))


@dataclass(frozen=True)
class ScaledRun:
    """What is computed and sent in a step."""

    seconds: StepSeconds
    weights: int
    bytes: int = 2
    """Of a weight and of its gradient where they are sent; stage 0 sends ``bytes_at_0``."""
    bytes_at_0: int = 4
    """At stage 0 weights and gradients stay in fp32, under autocast."""
    accumulate: int = 1
    """Micro-steps of a step on each rank."""
    overlap: float = 0.0
    """Share of the passes behind which a collective may hide: 0 hides nothing, 1 all that can."""
    all_reduces: bool = True
    """Whether stages 1 and 2 all-reduce gradients, as DeepSpeed's default does, instead of reduce-scattering them."""
    bucket: int = 50_000_000
    """Numbers of a collective of gradients or weights, `reduce_bucket_size`."""
    layers: int = 12
    """Stage 3 gathers layer by layer."""
    releases: bool = True
    """Whether stage 3 releases weights between two passes. DeepSpeed's default `stage3_max_live_parameters` keeps those
    of a micro-step gathered in a model of fewer than 1e9 weights."""
    shared: int = 0
    """Weights with a second use, such as the token table in the head: if released, they are gathered for each."""

    def gradients_sent(self, stage: Stage) -> float:
        """Bytes of gradients that a rank of many sends in a step."""
        if stage == 0:
            return 2.0 * self.bytes_at_0 * self.weights
        twice = 2.0 if self.all_reduces and stage < 3 else 1.0
        times = self.accumulate if stage > 1 else 1
        return twice * times * self.bytes * self.weights

    def weights_sent(self, stage: Stage) -> float:
        """Bytes of weights that a rank of many sends in a step."""
        if stage == 3:
            gathered = 2.0 * (self.weights + self.shared) if self.releases else float(self.weights)
            return self.accumulate * self.bytes * gathered
        return float(self.bytes * self.weights) if stage else 0.0

    def step_seconds(self, stage: Stage, ranks: int, links: Links) -> float:
        """Seconds of a step on ``ranks`` GPUs."""
        one, micro = self.seconds, self.accumulate
        buckets = self.layers if stage == 3 else math.ceil(self.weights / self.bucket)
        times = micro if stage > 1 else 1
        gradients = links.seconds(ranks, self.gradients_sent(stage), times * buckets)
        exposed = max(0.0, gradients - self.overlap * times * one.backward)
        gathers = (2 if self.releases else 1) * micro * buckets if stage == 3 else 1
        weights = links.seconds(ranks, self.weights_sent(stage), gathers)
        if stage == 3:
            beside = one.forward + one.backward if self.releases else one.forward
            hidden = self.overlap * self.accumulate * beside - (gradients - exposed if self.releases else 0.0)
            weights = max(0.0, weights - hidden)
        elif stage == 0:
            weights = 0.0
        optimizer = one.optimizer / (ranks if stage else 1)
        return micro * (one.forward + one.backward) + optimizer + one.rest + exposed + weights

    def efficiency(self, stage: Stage, ranks: int, links: Links) -> float:
        """Tokens per second of a GPU, as a share of those of one GPU alone at the same stage."""
        return self.step_seconds(stage, 1, links) / self.step_seconds(stage, ranks, links)


def scale_table(run: ScaledRun, links: Links) -> list[str]:
    """Step time in milliseconds and efficiency by number of GPUs and stage, as Markdown."""
    lines = ["| GPUs | " + " | ".join(f"ZeRO {stage}" for stage in STAGES) + " |", "|---:|" + "---:|" * len(STAGES)]
    for ranks in GPUS:
        cells = [
            f"{1000 * run.step_seconds(stage, ranks, links):.1f} ms, {run.efficiency(stage, ranks, links):.0%}"
            for stage in STAGES
        ]
        lines.append(f"| {ranks} | {' | '.join(cells)} |")
    return lines
