"""A student in the engine with a teacher, and the same in plain PyTorch with a handwritten loss."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from megamask.batch import TokenIds
from megamask.engine.engine import Engine
from megamask.engine.optimizer import parameter_groups
from megamask.hf.masked_lm import load_hf_masked_lm
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import ModelConfig
from megamask.runtime import ranks
from megamask.schedules import Schedule
from megamask.teacher.frozen_lm import HiddenStatesFn, MaskedLM
from megamask.teacher.teacher import DistillConfig, Teacher, TeacherConfig
from tests.batches import IDS
from tests.processes.training_worker import PACKS, STEPS, micro, objective, optimizer

TAKEN = 6
"""Steps of a run: the weight of the teacher is 0 in the first two."""
AT = 2 / STEPS


def distill(reduction: str, positions: str) -> DistillConfig:
    return DistillConfig(Schedule("step", 0.0, 0.7, at=AT), 2.0, positions, reduction)


def model(source: str) -> MaskedLM:
    """A deeper and wider model of ours, or the model of transformers in a folder."""
    if source != "ours":
        return MaskedLM(*load_hf_masked_lm(Path(source)), tokenizer=Path(source))
    torch.manual_seed(1)
    config = ModelConfig("bert", num_layers=3, hidden_size=20, num_heads=4, intermediate_size=31, init_std=0.3)
    encoder = Encoder(config.shape(IDS), config)
    head = MaskedLMHead(encoder, config)
    return MaskedLM(
        HiddenStatesFn(encoder, head), head.decoder.weight.detach(), head.decoder.bias.detach(), None, Path()
    )


def teacher(source: str, deepspeed: str | None, packs_per_pass: int, config: DistillConfig) -> Teacher:
    path = Path(deepspeed) if deepspeed else None
    ids: TokenIds = IDS
    return Teacher(model(source), TeacherConfig(source, "fp32", path, packs_per_pass), config, ids)


def runs(cases: list[dict]) -> list[dict]:
    """`run` of each case in turn, on this rank."""
    ranks.init_process_group()
    results = [run(**case) for case in cases]
    ranks.destroy_process_group()
    return results


def run(
    stage: int,
    source: str = "ours",
    deepspeed: str | None = None,
    packs_per_pass: int = 2,
    reduction: str = "token",
    positions: str = "targets",
    after: bool = False,
) -> dict:
    """The mean loss of each step, the teacher's results in the last, and how many of its parameters this rank has.

    ``after``: the teacher is made after the student's engine.
    """
    config = distill(reduction, positions)
    if not after:
        frozen = teacher(source, deepspeed, packs_per_pass, config)
    engine = Engine(objective("modern"), optimizer(), {"zero_optimization": {"stage": stage}}, packs_per_step=PACKS)
    if after:
        frozen = teacher(source, deepspeed, packs_per_pass, config)
    losses = []
    for step in range(TAKEN):
        total = torch.zeros(())
        places = range(ranks.rank(), PACKS, ranks.world())
        batches, plans, counts = zip(*(micro(step, place) for place in places), strict=True)
        softs = frozen.targets(batches, plans, step / STEPS)
        for batch, plan, soft in zip(batches, plans, softs, strict=True):
            total += engine.train_micro(batch, plan, soft, targets=counts[0]).total.detach().float()
        assert engine.measure(total).finite
        engine.step(optimizer().lr((step + 1) / STEPS))
        losses.append(float(ranks.sum(total) / counts[0]))
    entropies = frozen.entropies(batches, "masked", 3, "shannon", seed=0)
    answer = {
        "losses": losses,
        "states": [soft.hidden.tolist() for soft in softs],
        "entropies": [entropy.tolist() for entropy in entropies],
        "num_parameters": sum(getattr(p, "ds_tensor", p).numel() for p in frozen._states._module.parameters()),
    }
    frozen.close()
    engine.close()
    return answer


def plain(source: str = "ours", reduction: str = "token", positions: str = "targets") -> list[float]:
    """The same steps in one process of plain PyTorch in fp64, from whole matrices of logits."""
    student, frozen = objective("modern").double(), model(source)
    states, weight, bias = frozen.states.eval().double(), frozen.weight.double(), frozen.bias.double()
    config = distill(reduction, positions)
    settings = optimizer()
    adam = torch.optim.AdamW(
        parameter_groups(student, settings), betas=(settings.beta1, settings.beta2), eps=settings.eps
    )
    losses = []
    for step in range(TAKEN):
        for group in adam.param_groups:
            group["lr"] = settings.lr((step + 1) / STEPS)
        total = 0.0
        for place in range(PACKS):
            batch, plan, targets = micro(step, place)
            text = (batch.tokens != IDS.pad).nonzero().squeeze(1)
            rows = plan.targets if positions == "targets" else text
            x = student.encoder.run(student.encoder.embed(plan.inputs, batch.layout), batch.layout)
            nll = F.cross_entropy(student.head.logits(x[plan.targets]), plan.labels, reduction="sum")
            with torch.no_grad():
                logits = F.linear(states(plan.inputs, batch.layout, rows), weight, bias)
            t, share = config.temperature, config.weight(step / STEPS)
            student_log_p, teacher_log_p = (
                (each / t).log_softmax(-1) for each in (student.head.logits(x[rows]), logits)
            )
            # "batchmean" divides by the first dimension: the rows, or the four sequences of the pack
            divisor = len(rows) if reduction == "token" else 4
            kl = F.kl_div(student_log_p, teacher_log_p, reduction="sum", log_target=True) / divisor
            # the mean over the packs' targets, as nll is
            loss = ((1 - share) * nll + share * t**2 * kl * len(plan.targets)) / targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(student.parameters(), settings.max_grad_norm)
        adam.step()
        adam.zero_grad()
        losses.append(total)
    return losses
