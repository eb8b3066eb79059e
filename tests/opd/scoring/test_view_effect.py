"""The teacher with and without its view: against both distributions of unpadded rows."""

from dataclasses import replace

import pytest
import torch

from diagnostics.batch import Rollouts
from diagnostics.core.totals import compute
from opd.data.chain_task import Problem
from opd.data.prompts import Prompts, encode_prompts
from opd.models.forward import micro_batches
from opd.rollouts.hf_engine import sample
from opd.scoring.score import score_batch
from opd.scoring.view_effect import measure_view
from opd.teachers.pair import load_pair
from opd.teachers.remote_scores import TeacherScores
from opd.teachers.teacher import Capability, Teacher
from tests.helpers.requests import full_request


class TopKTeacher(Teacher):
    """A teacher without hidden states that scores the sampled tokens of unpadded rows."""

    possible_capabilities = frozenset({Capability.TOP_K})
    name = "other"

    def __init__(self, network) -> None:
        self.network = network

    def top_k(self, prompts, rollouts, k: int, chosen_ids=None) -> TeacherScores:
        parts = []
        for row in range(len(prompts)):
            prompt, ids = prompts.tokens[row][prompts.mask[row]], rollouts.tokens[row]
            logp = unpadded_logp(self.network, prompt, ids)[rollouts.sampled[row]]
            values, top_ids = logp.topk(k)
            y = ids[rollouts.sampled[row], None]
            parts.append((top_ids, values, logp.gather(1, y)[:, 0]))
        return TeacherScores(*(torch.cat(x) for x in zip(*parts, strict=True)))


@torch.no_grad()
def unpadded_logp(network, prompt, response):
    logits = network(torch.cat([prompt, response])[None]).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("is_local", [True, False])
def test_the_effect_is_that_of_both_distributions(tiny_pair, is_local: bool) -> None:
    pair = load_pair(*map(str, tiny_pair), "cpu", "float32")
    network = pair.teacher.model.network
    prompts = encode_prompts(pair.tokenizer, [Problem("1+2" * n, "3") for n in (1, 4, 2)], 2, 64)
    ids = [[8, 9] * (1 + 3 * (row % 3)) for row in range(6)]
    prompts = replace(prompts, view=Prompts.from_ids(ids, prompts.index))
    rollouts = sample(
        pair.student,
        prompts,
        pair.eos,
        max_response=9,
        temperature=1.0,
        top_p=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    request = full_request(4)
    teacher = pair.teacher if is_local else TopKTeacher(network)
    batch = score_batch(pair.student, teacher, prompts, rollouts, request)
    keep = torch.rand(rollouts.mask.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    batch = replace(batch, scored=batch.scored.restrict_mask(keep))
    row = compute(measure_view(teacher, batch, request))
    added, signals, kls = [], [], []
    for i in range(len(rollouts)):
        plain, viewed = (
            unpadded_logp(network, prompt, rollouts.tokens[i])
            for prompt in (prompts.tokens[i][prompts.mask[i]], torch.tensor(ids[i]))
        )
        for t in batch.scored.mask[i].nonzero()[:, 0].tolist():
            y = int(rollouts.tokens[i, t])
            added.append(float(viewed[t, y] - plain[t, y]))
            signals.append(float(viewed[t, y] - batch.scored.student_logp[i, t]))
            kls.append(float((viewed[t].exp() * (viewed[t] - plain[t])).sum()))
    assert row["view/log_ratio"] == pytest.approx(sum(added) / len(added), abs=1e-4)
    share = sum(a * s for a, s in zip(added, signals, strict=True)) / sum(s * s for s in signals)
    assert row["view/signal_share"] == pytest.approx(share, abs=1e-4)
    if is_local:
        assert row["view/kl"] == pytest.approx(sum(kls) / len(kls), abs=1e-4)
        assert row["view/kl"] > 0.05
    else:
        assert "view/kl" not in row
    plain_batch = replace(batch, prompts=replace(prompts, view=None))
    assert measure_view(teacher, plain_batch, request) == {}


def test_micro_batches_count_the_longer_prompt(tiny_pair) -> None:
    pair = load_pair(*map(str, tiny_pair), "cpu", "float32")
    prompts = encode_prompts(pair.tokenizer, [Problem("1+2" * n, "3") for n in (1, 4, 2)], 2, 64)
    ids = [[8] * (60 if row == 3 else 2) for row in range(6)]
    viewed = replace(prompts, view=Prompts.from_ids(ids, prompts.index))
    rollouts = Rollouts(
        tokens=torch.ones(6, 4, dtype=torch.long),
        mask=torch.ones(6, 4, dtype=torch.bool),
        sampler_logp=torch.zeros(6, 4),
        prompt=prompts.index,
        ended=torch.ones(6, dtype=torch.bool),
    )
    for limit in (1, 70, 140, 1000):
        groups = micro_batches(viewed, rollouts, limit)
        assert sorted(row for group in groups for row in group) == list(range(6))
        for group in groups:
            for model_prompts in (viewed, viewed.teacher_prompts):
                width = model_prompts.rows(group).tokens.shape[1] + 4
                assert len(group) == 1 or len(group) * width <= limit
