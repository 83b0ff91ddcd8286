"""One byte per token beside the shards: entropies that a teacher or an earlier run computed once.

Costs a byte of disk and of reading per token, and a multiplication. The scale is linear from 0 to ``top``: ln V for
`shannon`, `renyi` and `min`, which cannot exceed it; 2 ln V for `loss`, which can; -ln V for `margin`, which is
negative. With V = 50,368 a byte is 0.042 nats, and the top 20 % of tokens keep 0.99 of their members or more. Values
outside the range are clipped.

A sidecar has one signal, measure, model and context length; entropies of different kinds are never mixed.
`SidecarFacts` describes it and is stored beside the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from jaxtyping import Float, UInt8
from torch import Tensor, uint8

from megamask.batch import Measure, PackedBatch
from megamask.entropy.source import EntropySource, Signal
from megamask.errors import DataError, must, raise_all

CURE = "Write it again with `megamask annotate entropy`."


def top_of(measure: Measure, vocab_size: int) -> float:
    """The end of the range of bytes, in nats; the other end is 0."""
    return {"loss": 2.0, "margin": -1.0}.get(measure, 1.0) * math.log(vocab_size)


def to_bytes(entropy: Float[Tensor, "*n"], top: float) -> UInt8[Tensor, "*n"]:
    """``entropy`` in nats as codes from 0 (0 nats) to 255 (``top``).

    Inside the range it comes back from `from_bytes` to within |top| / 510.
    """
    return (255 * (entropy.double() / top).clamp(0, 1)).round().to(uint8)


def from_bytes(codes: UInt8[Tensor, "*n"], top: float) -> Float[Tensor, "*n"]:
    """The nats that ``codes`` stand for, fp32."""
    return codes.float() * (top / 255)


@dataclass(frozen=True)
class SidecarFacts:
    """The content of a sidecar of entropies; stored beside its bytes as JSON."""

    signal: Signal
    """Whether the model saw the token whose entropy it gave."""
    measure: Measure
    """The measure of uncertainty."""
    top: float
    """The value of the byte 255, in nats."""
    model: str
    """sha256 of the weights of the model."""
    length: int
    """Longest sequence of the model in tokens, special tokens included."""

    def record(self) -> dict[str, Any]:
        """The facts as values of JSON."""
        return asdict(self)

    def problems(self, signal: Signal, measure: Measure, length: int, vocab_size: int) -> list[str]:
        """Sentences for why a run with these settings cannot use it."""
        problems = []
        for name, wanted in (("signal", signal), ("measure", measure)):
            stored = getattr(self, name)
            if stored != wanted:
                problems.append(
                    f"`entropy.{name}` is {wanted!r}, but the sidecar beside the shards has {stored!r}: these are "
                    f"different quantities. Set `entropy.{name}` to {stored!r}, or: {CURE}"
                )
        if self.length != length:
            problems.append(
                f"`packs.length` is {length}, but the sidecar was made with sequences of at most {self.length} tokens: "
                f"other contexts give other entropies. Set `packs.length` to {self.length}, or: {CURE}"
            )
        if not problems and self.top != top_of(measure, vocab_size):
            problems.append(must("The sidecar's `top`", f"be {top_of(measure, vocab_size)}", self.top, CURE))
        return problems


def sidecar_facts_of(record: object, where: str) -> SidecarFacts:
    """The facts in a JSON ``record``; raises DataError with every problem, naming ``where`` it was found."""
    if not isinstance(record, dict):
        raise DataError(f"{where} does not say what its sidecar of entropies holds. {CURE}")
    problems: list[str] = []
    known: dict[str, tuple] = {"signal": get_args(Signal), "measure": get_args(Measure)}
    for field in fields(SidecarFacts):
        if field.name not in record:
            problems.append(f"{where} does not say `{field.name}` of its sidecar of entropies. {CURE}")
            continue
        value = record[field.name]
        if field.name in known:
            if value not in known[field.name]:
                rule = f"be one of {', '.join(known[field.name])}"
                problems.append(must(f"{where}: {field.name}", rule, value, CURE))
        elif field.name == "top":
            if not isinstance(value, float) or not math.isfinite(value) or value == 0:
                problems.append(must(f"{where}: top", "be a finite number other than 0", value, CURE))
        elif field.name == "length":
            if not isinstance(value, int) or value < 3:
                problems.append(must(f"{where}: length", "be a whole number of at least 3", value, CURE))
        elif not isinstance(value, str):
            problems.append(must(f"{where}: {field.name}", "be a word", value, CURE))
    raise_all(DataError, problems)
    return SidecarFacts(**{field.name: record[field.name] for field in fields(SidecarFacts)})


class StoredEntropy(EntropySource):
    """Reads ``PackedBatch.entropy``."""

    def __init__(self, facts: SidecarFacts):
        self.facts = facts

    def __call__(self, batches: Sequence[PackedBatch]) -> list[Float[Tensor, " T"]]:
        """The stored entropies, in nats; raises DataError for a pack that carries none."""
        return [from_bytes(self._codes(batch), self.facts.top) for batch in batches]

    def _codes(self, batch: PackedBatch) -> UInt8[Tensor, " T"]:
        if batch.entropy is None:
            raise DataError(
                f"`entropy.source` is 'sidecar', but pack {batch.number} carries no entropies: the shards have none "
                "for this split. Write them with `megamask annotate entropy`, or choose another source."
            )
        return batch.entropy
