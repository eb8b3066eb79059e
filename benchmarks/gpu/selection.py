"""Proofs: exact two-stage top-K, and scores of a teacher at ids that the student chose."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.gpu.networks import (
    normal,
    random_prompts,
    random_rollouts,
    relative,
    small_model,
)
from benchmarks.gpu.result import Check, Row
from benchmarks.gpu.setting import Setting
from diagnostics.batch import Rollouts
from opd.data.prompts import Prompts
from opd.models.lm_head import two_stage_topk
from opd.models.model import CausalLM
from opd.scoring.chosen_ids import chosen_columns
from opd.teachers.remote_scores import TeacherScores
from opd.teachers.teacher import Teacher


def prove_topk(setting: Setting) -> Iterator[Row]:
    """Compare values and ids with torch.topk, with and without ties."""
    rows, v = setting.choose((6, 1_000), (512, 151_936))
    for vocabulary in (v, v - 77):
        for k in (1, 32) if setting.device == "cuda" else (1, 2):
            for dtype in (torch.float32, torch.bfloat16):
                logits = normal(setting, rows, vocabulary, seed=k, dtype=dtype)
                logits[-1, 3:] = -torch.inf
                values, ids = two_stage_topk(logits, k, block=setting.choose(64, 128))
                exact = logits.topk(k, -1).values
                wrong = int((values != exact).sum()) + int((logits.gather(1, ids) != exact).sum())
                wrong += int((ids.sort(1).values.diff(dim=1) == 0).sum())
                label = f"V = {vocabulary:,}, K = {k}, {str(dtype).removeprefix('torch.')}"
                yield Check(f"entries that are not those of torch.topk, {label}", wrong, 0)


@dataclass(eq=False)
class AnsweringTeacher(Teacher):
    """Answers as a server does, from a model in this process: its own top-K and chosen ids."""

    model: CausalLM
    logp: Tensor
    """(N, V) its log-probabilities at every sampled token."""
    tokens: Tensor
    """(N,) the sampled tokens."""
    name: str = "a teacher that answers"
    asked: list[Tensor | None] = field(default_factory=list)

    def top_k(
        self, prompts: Prompts, rollouts: Rollouts, k: int, chosen_ids: Tensor | None = None
    ) -> TeacherScores:
        """Return the scores."""
        self.asked.append(chosen_ids)
        best = self.logp.topk(k, -1)
        chosen = None if chosen_ids is None else self.logp.gather(1, chosen_ids)
        sampled = self.logp.gather(1, self.tokens[:, None])[:, 0]
        return TeacherScores(best.indices, best.values, sampled, chosen)


def prove_chosen_ids(setting: Setting) -> Iterator[Row]:
    """Compare both models' scores on the student's ids with dense log-probabilities."""
    student, teacher = (small_model(setting, seed=seed) for seed in (0, 1))
    prompts = random_prompts(6, 12, student.vocabulary)
    rollouts = random_rollouts(prompts, 20, student.vocabulary)
    device = torch.device(setting.device)
    prompts, rollouts = prompts.to(device), rollouts.to(device)
    tokens, k = rollouts.tokens[rollouts.mask], 5
    p, q = (dense_logp(model, prompts, rollouts) for model in (student, teacher))
    for source in ("student", "union"):
        columns = chosen_columns(
            student,
            AnsweringTeacher(teacher, q, tokens),
            prompts,
            rollouts,
            source=source,
            k=k,
            temperature=1.0,
            max_tokens_per_microbatch=64,
            max_logits_per_chunk=student.vocabulary * 7,
        )
        ids = columns["support.ids"]
        own = ids[:, -k:]
        missed = int((p.gather(1, own) - p.topk(k, -1).values).abs().gt(1e-4).sum())
        yield Check(f"{source}: ids that are not the student's top-K", missed, 0)
        sampled_logp = p.gather(1, tokens[:, None])[:, 0]
        present = columns.get("support.present", torch.ones_like(ids, dtype=torch.bool))
        deviations = {
            "student, sampled": (columns["student_logp"], sampled_logp),
            "teacher, sampled": (columns["teacher_logp"], q.gather(1, tokens[:, None])[:, 0]),
            "student, support": (columns["support.student_logp"], p.gather(1, ids)),
            "teacher, support": (columns["support.teacher_logp"], q.gather(1, ids)),
        }
        for label, (scores, exact) in deviations.items():
            if scores.dim() == 2:
                scores, exact = scores[present], exact[present]
            yield Check(f"{source}: log-probabilities, {label}", relative(scores, exact), 1e-4)


@torch.no_grad()
def dense_logp(model: CausalLM, prompts: Prompts, rollouts: Rollouts) -> Tensor:
    """Return (N, V) log-probabilities, row by row without padding, from the model's own logits."""
    parts = []
    for row in range(len(prompts)):
        prompt = prompts.tokens[row][prompts.mask[row]]
        response = rollouts.tokens[row][rollouts.mask[row]]
        ids = torch.cat([prompt, response])[None]
        logits = model.network(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        parts.append(logits.float().log_softmax(-1))
    return torch.cat(parts)
