"""Proof: losses in chunks and on gathered rows against dense autograd in float32."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.networks import relative
from benchmarks.gpu.result import Check, Row
from benchmarks.gpu.setting import Setting
from benchmarks.head import Case, gradient_error, make_case, scored_batch, toolkit_loss
from opd.objectives.catalogue import FORMS, OBJECTIVES
from opd.objectives.inputs import TokenInputs
from opd.objectives.objective import weighted_losses

NAMES = (
    *("full_reverse_kl", "full_forward_kl", "full_jsd", "sampled_token", "k2", "k3"),
    *(f"teacher_topk{suffix}" for suffix in FORMS),
)
VALUE_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
GRADIENT_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""In bfloat16 the gradients of the logits are rounded, on a CPU the logits too."""


def prove(setting: Setting) -> Iterator[Row]:
    """Compare every divergence on the full vocabulary and on the teacher's top-K."""
    n, d, v, k = setting.choose((13, 24, 150, 5), (1027, 904, 32_003, 32))
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_case(n, d, v, k, "as in text", dtype, setting.device)
        inputs = replace(inputs, max_logits_per_chunk=v * (n // 3))  # the last chunk is smaller
        wide = widened(inputs)
        label = str(dtype).removeprefix("torch.")
        for name in NAMES:
            loss, exact = toolkit_loss(name), dense_loss(name)
            value = relative(loss(inputs).detach(), exact(wide).detach())
            yield Check(f"{name}, {label}: value", value, VALUE_LIMIT[dtype])
            error = gradient_error(loss, exact, inputs)
            yield Check(f"{name}, {label}: gradients", error, GRADIENT_LIMIT[dtype])
        if dtype == torch.float32:
            for name, formula in FORMULAS.items():
                value = relative(toolkit_loss(name)(inputs).detach(), formula(*dense_logp(wide)))
                yield Check(f"{name}: value of the plain formula", value, VALUE_LIMIT[dtype])


def widened(inputs: Case) -> Case:
    """Return the same numbers in float32."""
    names = ("hidden", "student_head", "teacher_hidden", "teacher_head")
    return replace(inputs, **{name: getattr(inputs, name).detach().float() for name in names})


def dense_logp(inputs: Case) -> tuple[Tensor, Tensor]:
    """Return (N, V) log-probabilities of student and teacher."""
    with torch.no_grad():
        teacher = (inputs.teacher_hidden @ inputs.teacher_head.T).log_softmax(-1)
    return (inputs.hidden @ inputs.student_head.T).log_softmax(-1), teacher


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "full_reverse_kl": lambda p, q: (p.exp() * (p - q)).sum().detach(),
    "full_forward_kl": lambda p, q: (q.exp() * (q - p)).sum().detach(),
    "full_jsd": lambda p, q: half_jensen_shannon(p, q).detach(),
}


def half_jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Return the divergence of both from their mean, each with weight one half."""
    mean = (0.5 * p.exp() + 0.5 * q.exp()).log()
    return (0.5 * p.exp() * (p - mean) + 0.5 * q.exp() * (q - mean)).sum()


def dense_loss(name: str) -> Callable[[Case], Tensor]:
    """Return the same objective on dense log-probabilities with autograd."""

    def loss(inputs: Case) -> Tensor:
        objective = OBJECTIVES[name]
        p, q = dense_logp(inputs)
        ones = torch.ones_like(inputs.tokens, dtype=torch.float32)[None]
        part = TokenInputs.of(scored_batch(inputs), objective.support, ones, ones)
        part = replace(part, logp=p.gather(1, inputs.tokens[:, None])[:, 0])
        if objective.support == "full":
            part = replace(part, support_logp=p, teacher_support_logp=q)
        elif part.ids is not None:
            part = replace(part, support_logp=p.gather(1, part.ids))
        return weighted_losses(objective, part).sum()

    return loss
