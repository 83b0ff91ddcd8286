"""Micro-steps, optimizer steps and the state of both, the same for every ZeRO stage.

A file in `ds_configs/` says how to run (stage, offload, communication, precision); what to train is filled in
here. The state goes out and comes in as full fp32 tensors by name, so a checkpoint knows nothing of stages or
ranks, and a step taken after a restore is the step that would have been taken without it, bit for bit.

Between the last micro-step and the step, `measure` says what the loss and the gradient are, the same on all ranks, so
that whoever asks can `step` or `drop` before anything has moved. DeepSpeed's own check is not enough: at stage 0 it has
none, in bf16 it can be turned off, and under Muon at stage 3 it comes after the momentum.

Costs: a micro-step is DeepSpeed's own; `measure` adds one reading of this rank's gradients, one all-reduce of two
numbers and the one wait for the device that a step has; `tensors` gathers every weight and moment once.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from megamask.batch import Losses, MaskPlan, PackedBatch, SoftTargets
from megamask.engine import choose_accelerator, muon
from megamask.engine.ds_file import filled, precision, zero_stage
from megamask.engine.optimizer import MOMENTS, OptimizerConfig, build_optimizer, moments_of
from megamask.engine.stopwatch import Stopwatch
from megamask.errors import NonFiniteError, WeightsDivergedError
from megamask.runtime import ranks


@dataclass(frozen=True)
class Measured:
    """Of a step before its weights move, over all ranks: the sum of its losses, the norm of its gradient, unclipped."""

    loss: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        """Whether both are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Engine:
    """An objective under DeepSpeed. Every method is collective: all ranks call it alike."""

    def __init__(self, objective: nn.Module, config: OptimizerConfig, ds: dict[str, Any], *, packs_per_step: int):
        choose_accelerator()
        import deepspeed

        _hush()
        # it would compile a C++ extension that only tensor-parallel inference uses
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        ranks.init_process_group()
        deepspeed.init_distributed(verbose=False)
        self.config = config
        self.stage, self.precision = zero_stage(ds), precision(ds)
        self.accumulate = packs_per_step // ranks.world()
        self.steps = 0
        self._micros = 0
        self._forward = Stopwatch(ranks.device())
        start = {name: value.detach().clone() for name, value in objective.state_dict(keep_vars=True).items()}
        names = {name for name, _ in objective.named_parameters()}
        self._engine = deepspeed.initialize(
            model=objective.to(ranks.device()),
            optimizer=build_optimizer(objective, config),
            config=filled(ds, config, self.accumulate, packs_per_step),
            dist_init_required=False,
        )[0]
        self._parameters = {name: p for name, p in self._engine.module.named_parameters() if name in names}
        self._make_moments()
        # DeepSpeed makes its fp32 masters from weights that it has rounded to bf16; ours were fp32
        self.restore(lambda name: start.get(name.removeprefix("weights/")), steps=0)

    @property
    def num_weights(self) -> int:
        """How many numbers the model has to learn."""
        return sum(_shape(p).numel() for p in self._parameters.values())

    def train_micro(
        self, batch: PackedBatch, plan: MaskPlan, soft: SoftTargets | None = None, *, targets: int
    ) -> Losses:
        """Forward and backward of one pack; ``targets`` is their exact number in the whole step, over all ranks.

        DeepSpeed takes the mean over micro-steps and ranks; the factor turns it into the mean over targets.
        """
        if self._micros:
            self._engine.step()  # DeepSpeed counts micro-steps here; it moves nothing before the last
        self._micros += 1
        self._engine.train()
        with self._forward:  # a backward pass waits for other ranks, a forward pass only at stage 3
            losses = self._engine(batch, plan, soft)
        self._engine.backward(losses.total * (self.accumulate * ranks.world() / targets))
        return losses

    @torch.no_grad()
    def measure(self, loss: Float[Tensor, ""]) -> Measured:
        """What the step that all micro-steps make would be; ``loss`` is this rank's sum over them. Waits."""
        assert self._micros == self.accumulate, "a step is a fixed number of micro-steps"
        norms = [norm for _, norm in self._norms()]
        square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=loss.device)
        # at stage 0 every rank has the whole gradient, above it a part
        share = 1 / ranks.world() if self.stage == 0 else 1.0
        total, square = ranks.sum(torch.stack([loss.double(), square.double() * share])).tolist()
        return Measured(total, math.sqrt(square) if square >= 0 else math.nan)

    def step(self, rate: float) -> None:
        """Move the weights by the gradients of the micro-steps, with the learning rate ``rate``."""
        self._micros = 0
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        before = self._engine.skipped_steps
        self._engine.step()
        if self._engine.skipped_steps > before:
            raise NonFiniteError(
                f"DeepSpeed dropped step {self.steps} of the optimizer: its loss and gradient are numbers, what the "
                "optimizer makes of them is not. Lower `optimizer.lr.peak` or choose another `optimizer.kind`."
            )
        self.steps += 1

    def drop(self) -> None:
        """Forget the gradients of the micro-steps: weights and moments stay what they were."""
        self._micros = 0
        if self.stage == 0:
            self._engine.zero_grad()
            self._engine.micro_steps += 1
            return
        # as if they had overflowed: DeepSpeed knows what it must clear
        zero = self._engine.optimizer
        check = "_overflow_check_and_loss_scale_update" if self.stage == 3 else "check_overflow"
        asks, zero.check_grad_overflow = getattr(zero, "check_grad_overflow", False), True
        setattr(zero, check, lambda **_: setattr(zero, "overflow", True))
        try:
            self._engine.step()
        finally:
            delattr(zero, check)
            zero.check_grad_overflow = asks

    @torch.no_grad()
    def nonfinite_gradients(self) -> list[str]:
        """The weights of which this rank's part of the gradient is no number. Slow."""
        return [name for name, norm in self._norms() if not torch.isfinite(norm)]

    def _norms(self) -> list[tuple[str, Float[Tensor, ""]]]:
        """After the last micro-step: the name of each gradient that this rank holds a part of, and the part's norm."""
        zero = self._engine.optimizer
        if self.stage == 0:
            grads = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
            return list(zip(grads, _norms_of(list(grads.values())), strict=True))
        names = {id(p): name for name, p in self._parameters.items()}
        groups = zero.fp16_groups if self.stage == 3 else zero.params_in_partition
        if zero.offload_optimizer if self.stage == 3 else zero.cpu_offload:
            kept = {name: zero.norm_for_param_grads.get(zero.get_param_id(p)) for name, p in self._parameters.items()}
            device = ranks.device()
            return [(name, torch.as_tensor(norm).float().to(device)) for name, norm in kept.items() if norm is not None]
        parts = []
        for index, group in enumerate(groups):
            held = (grad for grad in zero.averaged_gradients[index] if not getattr(grad, "_zero_padding", False))
            parts += [(names[id(p)], grad) for p, grad in zip(group, held, strict=False)]
        return list(zip((name for name, _ in parts), _norms_of([grad for _, grad in parts]), strict=True))

    def forward_seconds(self) -> float:
        """The seconds of forward passes in training since the last call; waits for the device."""
        return self._forward.take()

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch, plan: MaskPlan) -> Losses:
        """The losses of a plan, without dropout and without gradients."""
        self._engine.eval()
        return self._engine(batch, plan, None)

    @property
    def objective(self) -> Any:
        """What is trained, as DeepSpeed holds it: in its precision, under stage 3 in parts."""
        return self._engine.module

    @property
    def hidden_size(self) -> int:
        """Of the rows that `embed` gives."""
        return self.objective.encoder.shape.hidden_size

    @torch.no_grad()
    def embed(self, batch: PackedBatch) -> Float[Tensor, "T D"]:
        """The rows that enter the first layer when nothing is hidden, without dropout: what a probe looks at."""
        self._engine.eval()
        return self.objective.encoder.embed(batch.tokens, batch.layout)

    def local_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by name as this rank computes with it, in the precision of the forward pass.

        Not for stage 3, where a rank holds parts alone.
        """
        assert self.stage < 3, "stage 3 has no whole weights at hand"
        return ((name, parameter.detach()) for name, parameter in self._parameters.items())

    def close(self) -> None:
        """Let go of the memory that DeepSpeed holds."""
        self._engine.destroy()

    # ---- state: full fp32 tensors by name -------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Every weight and moment as (name, function), in the same order on all ranks.

        The function gathers the full fp32 tensor: collective, so every rank must call it, whoever keeps the result.
        """
        for name, parameter in self._parameters.items():
            yield f"weights/{name}", partial(self._get, parameter, None)
            for key in self._moments(parameter):
                yield f"{key}/{name}", partial(self._get, parameter, key)

    def owned_tensors(self) -> dict[str, Tensor]:
        """The weights and moments that this rank writes to a checkpoint, on the host; each tensor by one rank.

        NonFiniteError, on all ranks, if one of them contains NaN or Inf: no checkpoint may.
        """
        sizes, mine, bad = [0] * ranks.world(), {}, []
        for name, gather in self.tensors():
            tensor = gather()
            owner = sizes.index(min(sizes))
            sizes[owner] += tensor.numel()
            if owner == ranks.rank():
                # the sum is a number unless one of them is none, or, far from any weight, it overflows
                if not tensor.sum().isfinite() and not tensor.isfinite().all():
                    bad.append(name)
                mine[name] = tensor.cpu().clone()
        names = [name for theirs in ranks.gather(bad) for name in theirs]
        if names:
            more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
            raise NonFiniteError(
                f"After {self.steps} steps of the optimizer {', '.join(names[:3])}{more} contain NaN or Inf, so no "
                "checkpoint was written. The same command resumes from the newest checkpoint, if there is one."
            )
        return mine

    @torch.no_grad()
    def check_replicas(self) -> None:
        """ReplicaError, on all ranks, if one does not hold to the bit what all should hold alike. Collective.

        In stages 0 to 2 that is every weight as this rank computes with it, at stage 0 the moments too. At stage 3, and
        in what ZeRO gives to one rank alone, nothing is there twice. Costs a reading of the weights on the device.
        """
        if self.stage == 3 or ranks.world() == 1:
            return
        held = {name: get() for name, get in self.tensors()} if self.stage == 0 else dict(self.local_weights())
        sums = torch.stack([_sum_of_bits(tensor) for tensor in held.values()])
        most = ranks.maximum(torch.cat([sums, ~sums]))
        apart = most[: len(sums)] != ~most[len(sums) :]
        if apart.any():
            said = ranks.gather(sums[apart].tolist())
            usual = [Counter(column).most_common(1)[0][0] for column in zip(*said, strict=True)]
            those = [str(rank) for rank, row in enumerate(said) if row != usual] if ranks.world() > 2 else ["0", "or 1"]
            names = [name for name, differs in zip(held, apart.tolist(), strict=True) if differs]
            raise WeightsDivergedError(
                f"After {self.steps} steps of the optimizer {', '.join(names[:3])} ({len(names)} tensors in all) are "
                f"not the same on all ranks; at fault is rank {' '.join(those)}. Its memory or its device cannot be "
                "trusted: leave that machine out. The same command goes on from the newest checkpoint."
            )

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of every weight."""
        return {name: tuple(_shape(parameter)) for name, parameter in self._parameters.items()}

    def restore(self, read: Callable[[str], Tensor | None], *, steps: int) -> None:
        """Set every weight and moment to what ``read`` says of its name (None: leave it), after ``steps`` steps."""
        for name, parameter in self._parameters.items():
            weight = read(f"weights/{name}")
            if weight is not None:
                self._set_weight(parameter, weight)
            for key in self._moments(parameter):
                moment = read(f"{key}/{name}")
                if moment is not None:
                    self._set(parameter, moment, key)
        if self.stage in (1, 2):
            self._engine.optimizer.update_lp_params()
        self.steps = steps
        # AdamW counts its steps with each tensor, LAMB with each group
        for record in (*self._inner.state.values(), *self._inner.param_groups):
            if "step" in record:
                record["step"] = torch.full_like(record["step"], steps) if torch.is_tensor(record["step"]) else steps

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The optimizer itself, inside of ZeRO's."""
        optimizer = self._engine.optimizer
        return optimizer.optimizer if self.stage else getattr(optimizer, "optimizer", optimizer)

    def _moments(self, parameter: nn.Parameter) -> tuple[str, ...]:
        return moments_of(self.config.kind, getattr(parameter, "use_muon", False))

    def _make_moments(self) -> None:
        """Make the moments now, at zero; left alone, the optimizers make them in their first step."""
        zero = self._engine.optimizer
        for index, group in enumerate(self._inner.param_groups):
            held = group["params"]
            if self.stage == 3:
                flats = enumerate(zero.fp32_partitioned_groups_flat)
                held = [flat for part, flat in flats if zero.sub_group_to_group_id[part] == index]
            if self.config.kind == "lamb":
                group["step"] = 0
            keys = moments_of(self.config.kind, group.get("use_muon", False))
            if keys == MOMENTS["muon"] and self.stage < 3:
                continue
            for flat in held:
                state = self._inner.state[flat]
                for key in keys:
                    state.setdefault(key, torch.zeros_like(flat, dtype=torch.float32))
                if keys == MOMENTS["adamw"] and self.config.kind != "lamb":
                    state.setdefault("step", torch.zeros((), dtype=torch.float32))
        if self.stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()
            if self.config.kind == "muon":
                muon.make_momentum(zero)

    def _get(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.stage == 0:
            return (parameter if key is None else self._inner.state[parameter][key]).detach().float()
        if key is None:
            return safe_get_full_fp32_param(parameter).detach()
        if key == muon.BUFFER and self.stage < 3:
            return muon.get_momentum(self._engine.optimizer, parameter)
        return safe_get_full_optimizer_state(parameter, key).detach().view(_shape(parameter))

    def _set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self.stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if ranks.is_main():
                    parameter.copy_(value)
        self._set(parameter, value, None)

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = value.to(device=ranks.device(), dtype=torch.float32)
        if self.stage == 0:
            with torch.no_grad():
                (parameter if key is None else self._inner.state[parameter][key]).copy_(value)
        elif self.stage == 3:
            self._set_part(parameter, value, key)
        elif key == muon.BUFFER:
            muon.put_momentum(self._engine.optimizer, parameter, value)
        elif key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _set_part(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Stage 3: this rank's part; the last one ends in padding, which DeepSpeed's full setter does not expect."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        part = value.flatten()[ranks.rank() * size : (ranks.rank() + 1) * size]
        part = nn.functional.pad(part, (0, size - part.numel()))
        if key is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)


def _norms_of(grads: list[Tensor]) -> list[Tensor]:
    """The norm of each, in 32 bits, by a few kernels for all."""
    return list(torch._foreach_norm(grads, 2, dtype=torch.float32)) if grads else []


def _sum_of_bits(tensor: Tensor) -> Int64[Tensor, ""]:
    """The bits of ``tensor`` as whole numbers, added up modulo 2^64: one bit more or less changes the sum."""
    data = tensor.contiguous().flatten().view(torch.uint8)
    even = len(data) // 8 * 8
    return data[:even].view(torch.int64).sum() + data[even:].sum(dtype=torch.int64)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _hush() -> None:
    """Leave out two remarks that DeepSpeed makes at every step and that ask for nothing."""
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    # its hooks on whole records are not needed: only the modules inside have parameters, and those return tensors
    logging.getLogger("DeepSpeed").addFilter(lambda record: "unknown inputs or outputs" not in record.getMessage())
