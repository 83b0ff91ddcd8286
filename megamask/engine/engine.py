"""Micro-steps and optimizer steps under DeepSpeed, the same for every ZeRO stage.

A file in `ds_configs/` defines how to run (stage, offload, communication, precision); this module adds what to train.
Weights and moments are read and written as full fp32 tensors by name (`full_tensors`), so a checkpoint depends on
neither stage nor number of ranks, and the first step after a restore is, bit for bit, the step of an uninterrupted run.

Between the last micro-step and the step, `measure` returns the loss and the norm of the gradient, the same on all
ranks. The caller then calls `step` or `drop`; until then nothing has moved. DeepSpeed's own check is not enough: at
stage 0 there is none, in bf16 it can be turned off, and under Muon at stage 3 it comes after the momentum has changed.

Costs: a micro-step is DeepSpeed's own; `measure` adds one reading of this rank's gradients, one all-reduce of two
numbers and the one synchronisation with the device of a step; `tensors` gathers every weight and moment once.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megamask.batch import Losses, MaskPlan, PackedBatch, SoftTargets
from megamask.engine.ds_file import complete_ds_config, precision, zero_stage
from megamask.engine.full_tensors import FullTensors
from megamask.engine.meta_weights import FirstValue, materialise
from megamask.engine.nvme import check_buffers, check_locked_memory, in_own_folders
from megamask.engine.optimizer import OptimizerConfig, build_optimizer
from megamask.engine.replicas import check_replicas
from megamask.engine.stopwatch import Stopwatch
from megamask.engine.writers import WINDOW, writing_ranks
from megamask.errors import NonFiniteError
from megamask.runtime import private_api, ranks
from megamask.runtime.accelerator import choose_accelerator
from megamask.storage.tensor_stream import TensorStream


@dataclass(frozen=True)
class Measured:
    """A step before its weights move, over all ranks: the sum of its losses and the norm of its unclipped gradient."""

    loss: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        """Whether both are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Engine:
    """An objective under DeepSpeed. Every method is collective: all ranks call it alike."""

    def __init__(
        self,
        objective: nn.Module,
        config: OptimizerConfig,
        ds: dict[str, Any],
        *,
        packs_per_step: int,
        first_value: FirstValue | None = None,
    ):
        """``ds`` is the content of a DeepSpeed file.

        An ``objective`` on the device ``meta`` gets its weights from ``first_value``, one at a time; any other
        has its weights.
        """
        choose_accelerator()
        import deepspeed

        dtype = torch.bfloat16 if ds.get("bf16", {}).get("enabled") else torch.float32
        sizes = [parameter.numel() for parameter in objective.parameters()]
        num_weights = sum(sizes)
        check_buffers(ds, max(sizes))
        check_locked_memory(ds, num_weights, dtype.itemsize)
        ds, self._folders = in_own_folders(ds)
        private_api.hide_step_messages()
        private_api.skip_shm_extension(deepspeed.ops)
        ranks.init_process_group()
        deepspeed.init_distributed(verbose=False)
        self.config = config
        self.stage, self.precision = zero_stage(ds), precision(ds)
        self.accumulate = packs_per_step // ranks.world()
        self.steps = 0
        self._micros = 0
        self._forward = Stopwatch(ranks.device())
        names = {name for name, _ in objective.named_parameters()}
        ds_config = complete_ds_config(ds, config, self.accumulate, packs_per_step, num_weights)
        # DeepSpeed rounds weights into new memory and makes its fp32 masters from that; then they are set once more
        rounds = self.precision == "bf16" or "data_types" in ds
        if first_value is None:
            start = {name: parameter.detach() for name, parameter in objective.named_parameters()} if rounds else {}
            first_value = start.pop
            objective.to(ranks.device())
        else:
            materialise(objective, first_value, ds_config, dtype, ranks.device())
        self._engine = deepspeed.initialize(
            model=objective,
            optimizer=build_optimizer(objective, config),
            config=ds_config,
            dist_init_required=False,
        )[0]
        self._parameters = {name: p for name, p in self._engine.module.named_parameters() if name in names}
        private_api.share_memory(self._engine.optimizer, self.stage)
        self._tensors = FullTensors(self._engine.optimizer, self.stage, config.kind, self._parameters)
        own = {f"weights/{name}": name for name in names if rounds}
        self.restore(lambda name: first_value(own[name]) if name in own else None, steps=0)

    def set_packs_per_step(self, packs: int) -> None:
        """Set how many packs, over all ranks, the next steps have; between two steps, which moves nothing."""
        accumulate = packs // ranks.world()
        if accumulate == self.accumulate:
            return
        assert not self._micros and packs % ranks.world() == 0
        self.accumulate = accumulate
        self._engine.set_train_batch_size(packs)
        private_api.restart_micro_steps(self._engine)

    def close(self) -> None:
        """Release the memory of weights, gradients and moments. No other method works after it."""
        self._engine.destroy()
        private_api.free_memory(self._engine.optimizer, self.stage, self._parameters.values())
        del self._engine, self._tensors, self._parameters
        gc.collect()  # DeepSpeed's objects refer to each other
        for folder in self._folders:
            folder.close()

    # ---- steps

    def train_micro(
        self, batch: PackedBatch, plan: MaskPlan, soft: SoftTargets | None = None, *, targets: int
    ) -> Losses:
        """Forward and backward pass of one pack; ``targets`` is the exact number in the step, over all ranks.

        DeepSpeed takes the mean over micro-steps and ranks; the factor turns it into the mean over targets.
        """
        if not self._micros:
            self._tensors.store()
        else:
            self._engine.step()  # DeepSpeed counts micro-steps here; it moves nothing before the last
        self._micros += 1
        self._engine.train()
        with self._forward:  # a backward pass waits for other ranks, a forward pass only at stage 3
            losses = self._engine(batch, plan, soft)
        self._engine.backward(losses.total * (self.accumulate * ranks.world() / targets))
        return losses

    @torch.no_grad()
    def measure(self, loss: Float[Tensor, ""]) -> Measured:
        """Measure the step after its last micro-step; ``loss`` is the sum of this rank. Waits for the device."""
        assert self._micros == self.accumulate, "a step is a fixed number of micro-steps"
        norms = [norm for _, norm in self._gradient_norms()]
        square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=loss.device)
        # at stage 0 every rank has the whole gradient, above it a partition
        share = 1 / ranks.world() if self.stage == 0 else 1.0
        total, square = ranks.sum(torch.stack([loss.double(), square.double() * share])).tolist()
        return Measured(total, math.sqrt(square) if square >= 0 else math.nan)

    def step(self, rate: float) -> None:
        """Move the weights by the gradients of the micro-steps, with the learning rate ``rate``."""
        self._micros = 0
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        skipped = private_api.num_skipped_steps(self._engine)
        self._engine.step()
        if private_api.num_skipped_steps(self._engine) > skipped:
            raise NonFiniteError(
                f"DeepSpeed dropped optimizer step {self.steps}: its loss and gradient are finite, but the optimizer's "
                "update is not. Lower `optimizer.lr.peak` or choose another `optimizer.kind`."
            )
        self.steps += 1

    def drop(self) -> None:
        """Discard the gradients of the micro-steps: weights and moments stay what they were."""
        self._micros = 0
        private_api.discard_step(self._engine, self.stage)

    @torch.no_grad()
    def nonfinite_gradients(self) -> list[str]:
        """The names of the weights whose gradient, in this rank's partition, has a NaN or Inf. Slow."""
        return [name for name, norm in self._gradient_norms() if not torch.isfinite(norm)]

    def _gradient_norms(self) -> list[tuple[str, Float[Tensor, ""]]]:
        return private_api.gradient_norms(self._engine.optimizer, self.stage, self._parameters, ranks.device())

    def forward_seconds(self) -> float:
        """The seconds of forward passes in training since the last call; waits for the device."""
        return self._forward.take()

    # ---- passes without gradients

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch, plan: MaskPlan) -> Losses:
        """The losses of a plan, without dropout and without gradients."""
        self._engine.eval()
        return self._engine(batch, plan, None)

    @torch.no_grad()
    def embed(self, batch: PackedBatch) -> Float[Tensor, "T D"]:
        """The embeddings that enter the first layer when nothing is masked, without dropout: the input of a probe."""
        self._engine.eval()
        return self.objective.encoder.embed(batch.tokens, batch.layout)

    @property
    def objective(self) -> Any:
        """The trained module as DeepSpeed holds it: in its precision, at stage 3 in partitions."""
        return self._engine.module

    # ---- weights and moments

    @property
    def num_weights(self) -> int:
        """The number of trained numbers of the model."""
        return sum(math.prod(shape) for shape in self.weight_shapes.values())

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The full shape of every weight."""
        return {name: tuple(private_api.full_shape(parameter)) for name, parameter in self._parameters.items()}

    @property
    def hidden_size(self) -> int:
        """The width of the vectors that `embed` returns."""
        return self.objective.encoder.shape.hidden_size

    def tensors(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Every weight and moment as (name, function), in the same order on all ranks.

        The function gathers the full fp32 tensor. It is collective: every rank must call it, also one that needs no
        result.
        """
        return iter(self._tensors)

    def local_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by name as this rank computes with it, in the precision of the forward pass; not at stage 3."""
        assert self.stage < 3, "at stage 3 a rank has no whole weights"
        return ((name, parameter.detach()) for name, parameter in self._parameters.items())

    def owned_tensors(self) -> dict[str, Tensor]:
        """The weights and moments that this rank writes to a checkpoint, copied to the host.

        Raises NonFiniteError, on all ranks, if a tensor contains NaN or Inf: no checkpoint may contain them.
        """
        self.check_finite()
        owners, owned = self._owners(), {}
        for name, gather in self.tensors():
            tensor = gather()
            if owners[name] == ranks.rank():
                owned[name] = tensor.cpu().clone()
        return owned

    def stream_tensors(self, present: Mapping[str, Tensor]) -> TensorStream:
        """The weights and moments that this rank writes to a checkpoint, gathered when they are written; and
        ``present``.

        Raises NonFiniteError, on all ranks, if a tensor contains NaN or Inf.
        """
        self.check_finite()
        owners, shapes = self._owners(), self._tensors.shapes()
        meta = {
            name: torch.empty(shapes[name], device="meta") for name, owner in owners.items() if owner == ranks.rank()
        }
        windows: list[list[tuple[str, Callable[[], Tensor]]]] = [[]]
        size, largest = 0, WINDOW * len(writing_ranks(ranks.world()))
        for name, gather in self.tensors():
            size += 4 * math.prod(shapes[name])
            if size > largest and windows[-1]:
                windows.append([])
                size = 4 * math.prod(shapes[name])
            windows[-1].append((name, gather))
        return TensorStream(meta, windows, present)

    def _owners(self) -> dict[str, int]:
        """Which of `writing_ranks` writes each weight and moment; each of them writes about as much."""
        sizes, owners = dict.fromkeys(writing_ranks(ranks.world()), 0), {}
        for name, shape in self._tensors.shapes().items():
            owners[name] = min(sizes, key=sizes.__getitem__)
            sizes[owners[name]] += math.prod(shape)
        return owners

    def check_finite(self) -> None:
        """Raise NonFiniteError, on all ranks, if a weight or a moment contains NaN or Inf."""
        found = (name for of_rank in ranks.gather(self._tensors.nonfinite()) for name in of_rank)
        names = list(dict.fromkeys(found))  # at stage 0 all ranks have all of them
        if names:
            more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
            raise NonFiniteError(
                f"After {self.steps} optimizer steps {', '.join(names[:3])}{more} contain NaN or Inf, so no checkpoint "
                "was written. The same command resumes from the newest checkpoint, if there is one."
            )

    def check_replicas(self) -> None:
        """Compare what every rank should hold alike. Raises WeightsDivergedError on all ranks if one differs.

        At stages 0 to 2 these are all weights as a rank computes with them, at stage 0 the moments too. At stage 3, and
        in what ZeRO gives to one rank alone, there are no copies to compare.
        """
        if self.stage < 3 and ranks.world() > 1:
            replicated = ((name, get()) for name, get in self.tensors()) if self.stage == 0 else self.local_weights()
            check_replicas(dict(replicated), self.steps)

    def restore(self, read: Callable[[str], Tensor | None], *, steps: int) -> None:
        """Set every weight and moment to what ``read`` returns for its name (None: leave it), after ``steps`` steps."""
        self._tensors.restore(read, steps=steps)
        self.steps = steps
