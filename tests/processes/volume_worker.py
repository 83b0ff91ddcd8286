"""Counts what the ranks send in a step, as the process groups of torch see it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamask.engine.engine import Engine
from megamask.runtime import ranks
from tests.batches import IDS
from tests.processes.training_worker import PACKS, micro, objective, optimizer

TIMES = {"allreduce": 2, "allgather": 1, "reduce_scatter": 1, "reduce": 1}
"""What a rank sends of a ring, in units of all its bytes x (N - 1) / N."""


class Sent(TorchDispatchMode):
    """Bytes by the kind of the collective, in these units; without messages of a few numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(func).partition(".")
        if namespace == "c10d":
            kind = next((kind for kind in TIMES if name.lstrip("_").startswith(kind)), name)
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            # a gather or scatter has both its parts and its whole among its arguments
            size = max(t.numel() * t.element_size() for t in tensors)
            if size > 64:
                self.bytes[kind] += TIMES.get(kind, 0) * size
        return func(*args, **(kwargs or {}))


def sent_in_a_step(zeros: list[dict]) -> list[dict]:
    """What the second step of an engine sends under each of the DeepSpeed files, and the number of weights."""
    answers = []
    for zero in zeros:
        engine = Engine(objective("bert"), optimizer(clip=0.0), zero, packs_per_step=PACKS)
        for step in range(2):
            with Sent() as sent:
                total = torch.zeros(())
                for place in range(engine.accumulate):
                    batch, plan, targets = micro(step, place * ranks.world() + ranks.rank())
                    total += engine.train_micro(batch, plan, targets=targets).total.detach().float()
                engine.measure(total)
                engine.step(1e-3)
        table = IDS.size * engine.hidden_size  # which the head multiplies with, too
        answer = {"sent": dict(sent.bytes), "weights": engine.num_weights, "table": table}
        answers.append(answer | {"accumulate": engine.accumulate})
        engine.close()
    ranks.destroy_process_group()
    return answers
