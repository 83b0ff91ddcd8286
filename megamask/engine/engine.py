"""Micro-steps, optimizer steps and the state of both, the same for every ZeRO stage.

A file in `ds_configs/` says how to run (stage, offload, communication, precision); what to train is filled in
here. The state goes out and comes in as full fp32 tensors by name, so a checkpoint knows nothing of stages or
ranks, and a step taken after a restore is the step that would have been taken without it, bit for bit.

Costs: a micro-step is DeepSpeed's own; `step` adds one all-reduce of four numbers; `tensors` gathers every weight
and moment once.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megamask import ranks
from megamask.batch import Losses, MaskPlan, PackedBatch, SoftTargets
from megamask.engine import muon
from megamask.engine.ds_file import filled, zero_stage
from megamask.engine.optimizer import MOMENTS, OptimizerConfig, moments_of, optimizer
from megamask.errors import NonFiniteError

CURE = "Lower `optimizer.rate.peak`, lengthen `optimizer.rate.warmup`, or lower `optimizer.clip`."


@dataclass(frozen=True)
class StepStats:
    """What an optimizer step was: the norm of the gradient before clipping, and whether the step was skipped."""

    grad_norm: float
    skipped: bool


class Engine:
    """An objective under DeepSpeed. Every method is collective: all ranks call it alike."""

    def __init__(self, objective: nn.Module, config: OptimizerConfig, ds: dict[str, Any], *, packs_per_step: int):
        import deepspeed

        _hush()
        # it would compile a C++ extension that only tensor-parallel inference uses
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        ranks.join()
        deepspeed.init_distributed(verbose=False)
        self.config = config
        self.stage = zero_stage(ds)
        self.accumulate = packs_per_step // ranks.world()
        self.steps = 0
        self._micros = 0
        start = {name: value.detach().clone() for name, value in objective.state_dict(keep_vars=True).items()}
        names = {name for name, _ in objective.named_parameters()}
        self._engine = deepspeed.initialize(
            model=objective.to(ranks.device()),
            optimizer=optimizer(objective, config),
            config=filled(ds, config, self.accumulate, packs_per_step),
            dist_init_required=False,
        )[0]
        self._parameters = {name: p for name, p in self._engine.module.named_parameters() if name in names}
        self._make_moments()
        # DeepSpeed makes its fp32 masters from weights that it has rounded to bf16; ours were fp32
        self.restore(lambda name: start.get(name.removeprefix("weights/")), steps=0)

    @property
    def weights(self) -> int:
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
        losses = self._engine(batch, plan, soft)
        self._engine.backward(losses.total * (self.accumulate * ranks.world() / targets))
        return losses

    def step(self, step: int, steps: int, loss: Float[Tensor, ""]) -> StepStats:
        """Move the weights; NonFiniteError before that if ``loss``, any rank's sum over the step, is no number.

        NonFiniteError too if the gradient is none: then the weights may have moved, and must not be saved.
        """
        assert self._micros == self.accumulate, "a step is a fixed number of micro-steps"
        self._micros = 0
        finite = ranks.maximum((~torch.isfinite(loss)).float())
        if finite.item():
            raise NonFiniteError(
                f"The loss of step {step} is not a number on at least one rank. No checkpoint holds it: the same "
                f"command goes on from the newest. {CURE}"
            )
        rate = self.config.rate(step, steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        own = self._own_norm() if self.stage == 0 else None
        before = self._engine.skipped_steps
        self._engine.step()
        skipped = self._engine.skipped_steps > before
        self.steps += not skipped
        norm = float(self._engine.get_global_grad_norm() if own is None else own)
        if not skipped and not 0 <= norm < math.inf:  # DeepSpeed's sign for what is no number is -1
            raise NonFiniteError(
                f"The gradient of step {step} is not a number. No checkpoint holds it: the same command goes on from "
                f"the newest. {CURE}"
            )
        return StepStats(norm, skipped)

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
    def width(self) -> int:
        """Of the rows that `embed` gives."""
        return self.objective.encoder.shape.hidden_size

    @torch.no_grad()
    def embed(self, batch: PackedBatch) -> Float[Tensor, "T D"]:
        """The rows that enter the first layer when nothing is hidden, without dropout: what a probe looks at."""
        self._engine.eval()
        return self.objective.encoder.embed(batch.tokens, batch.layout)

    def current(self) -> Iterator[tuple[str, Tensor]]:
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

    def share(self) -> dict[str, Tensor]:
        """The weights and moments that this rank writes to a checkpoint, on the host; each tensor by one rank."""
        sizes, mine = [0] * ranks.world(), {}
        for name, gather in self.tensors():
            tensor = gather()
            owner = sizes.index(min(sizes))
            sizes[owner] += tensor.numel()
            if owner == ranks.rank():
                mine[name] = tensor.cpu().clone()
        return mine

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
                muon.make(zero)

    def _get(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.stage == 0:
            return (parameter if key is None else self._inner.state[parameter][key]).detach().float()
        if key is None:
            return safe_get_full_fp32_param(parameter).detach()
        if key == muon.BUFFER and self.stage < 3:
            return muon.get(self._engine.optimizer, parameter)
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
            muon.put(self._engine.optimizer, parameter, value)
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

    def _own_norm(self) -> Tensor:
        """Stage 0 in fp32 has no norm of its own."""
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in grads]))


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _hush() -> None:
    """Leave out two remarks that DeepSpeed makes at every step and that ask for nothing."""
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    # its hooks on whole records are not needed: only the modules inside have parameters, and those return tensors
    logging.getLogger("DeepSpeed").addFilter(lambda record: "unknown inputs or outputs" not in record.getMessage())
