"""Sketches of a language model's head gradient, against autograd through its objectives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.optional_fields import MissingField
from diagnostics.gradients.estimators import (
    FAMILY,
    estimator_index,
    estimator_weights,
)
from diagnostics.gradients.probe import (
    concatenate_sketches,
    gradient_row,
    sketch_gradients,
)
from diagnostics.gradients.signal_noise import pair_products
from diagnostics.gradients.sketch import (
    identity_projection,
    random_projection,
    sequence_sketches,
    token_energies,
    token_sketches,
)
from opd.objectives.credit import BASELINES, Cost
from opd.objectives.factory import make_objective
from opd.objectives.inputs import TokenInputs
from opd.objectives.objective import Objective

OBJECTIVE = {
    "plain": "sampled_token",
    "leave_one_out": "sampled_token",
    "local_kl": "sampled_token",
    "rb_immediate": "full_sampled_future",
    "rb_future": "mean_future",
    "rb_all": "full_reverse_kl",
}


@pytest.fixture(scope="module")
def language(two_layer_pair: tuple[Path, Path]):
    """Score four prompts with two rollouts each by the trainer's code at temperature 0.8."""
    from opd.data.chain_task import Problem
    from opd.data.prompts import encode_prompts
    from opd.models.forward import response_hidden_states
    from opd.rollouts.hf_engine import sample
    from opd.scoring.score import score_batch
    from opd.teachers.pair import load_pair
    from tests.helpers.requests import full_request

    pair = load_pair(str(two_layer_pair[0]), str(two_layer_pair[1]), "cpu", "float32")
    problems = [Problem(prompt=f"{i} + {i + 1} =", answer="1") for i in range(4)]
    prompts = encode_prompts(pair.tokenizer, problems, 2, 64)
    rollouts = sample(
        pair.student,
        prompts,
        pair.eos,
        max_response=9,
        temperature=0.8,
        top_p=1.0,
        generator=torch.Generator().manual_seed(1),
    )
    request = full_request(
        4, "full", temperature=0.8, max_tokens_per_microbatch=10**6, max_logits_per_chunk=10**6
    )
    result = score_batch(pair.student, pair.teacher, prompts, rollouts, request)
    batch, distributions = result.scored, result.teacher_hidden
    with torch.no_grad():
        return pair, batch, response_hidden_states(pair.student, prompts, batch), distributions


def head_gradients(
    pair, objective: Objective, batch: ScoredRollouts, hidden: Tensor, distributions: Tensor
):
    """Return (B, V D) gradients by autograd through the trainer's loss, one response at a time."""
    from opd.scoring.loss import loss_from_hidden

    weight, credit = pair.student.head.weight, objective.credit(batch)
    ends, rows = batch.lengths.cumsum(0).tolist(), []
    for i, end in enumerate(ends):
        c = slice(ends[i - 1] if i else 0, end)
        row = batch.rows([i])
        loss = loss_from_hidden(
            pair.student,
            objective,
            hidden[c],
            TokenInputs.of(row, objective.support, credit[i : i + 1], row.mask.float()),
            teacher=pair.teacher.model,
            teacher_hidden=distributions[c],
            temperature=batch.score_temperature,
            max_logits_per_chunk=10**6,
        )  # fmt: skip
        rows.append(torch.autograd.grad(loss, weight)[0].flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("name", OBJECTIVE)
def test_the_sketch_of_a_models_head_is_that_of_autograd(language, name: str) -> None:
    pair, batch, hidden, distributions = language
    from opd.models.forward import log_probabilities

    gammas = (0.0, 0.7, 1.0)
    size, width = pair.student.head.weight.shape
    projection = random_projection(size, width, seed=0, rows=4, copies=3)
    tokens = token_sketches(
        batch,
        hidden,
        lambda c: (
            log_probabilities(pair.student, hidden[c], 0.8),
            log_probabilities(pair.teacher.model, distributions[c], 0.8),
        ),
        projection,
        chunk_tokens=5,
    )
    family = estimator_weights(batch, [name], gammas)
    sketches = sequence_sketches(tokens, batch.mask, family.values, family.local)
    r1, r2 = projection.vocabulary.float(), projection.hidden.float()
    for f, gamma in enumerate(gammas):
        objective = make_objective(OBJECTIVE[name], gamma=gamma)
        if FAMILY[name].baseline != "none":
            objective = replace(objective, baseline=BASELINES[FAMILY[name].baseline])
        full_gradients = head_gradients(pair, objective, batch, hidden, distributions).view(
            -1, size, width
        )
        expected = (
            torch.einsum("vja,bvd,djc->bjac", r1, full_gradients, r2).flatten(2) * projection.scale
        )
        torch.testing.assert_close(sketches[:, f], expected, atol=2e-4, rtol=1e-4)
    assert sketches.abs().max() > 0.1
    # energies: the trainer's loss of one token at a time
    if name in ("plain", "rb_all"):
        energies = token_energies(tokens, batch.mask, family.values, family.local)
        total, objective = 0.0, make_objective(OBJECTIVE[name], gamma=0.7)
        credit = objective.credit(batch)
        for t in batch.mask[0].nonzero()[:, 0].tolist():
            only = torch.zeros_like(batch.mask[:1])
            only[0, t] = True
            single = replace(batch.rows([0]), mask=only)
            tokens_slice = slice(int(batch.mask[0, :t].sum()), int(batch.mask[0, : t + 1].sum()))
            fixed = replace(
                objective, own_cost=Cost(function=lambda b: b.log_ratio * 0, sampled=True)
            )
            from opd.scoring.loss import loss_from_hidden

            loss = loss_from_hidden(
                pair.student,
                fixed,
                hidden[tokens_slice],
                TokenInputs.of(single, fixed.support, credit[:1], only.float()),
                teacher=pair.teacher.model,
                teacher_hidden=distributions[tokens_slice],
                temperature=batch.score_temperature,
                max_logits_per_chunk=10**6,
            )
            total += float(torch.autograd.grad(loss, pair.student.head.weight)[0].square().sum())
        assert float(energies[0, 1]) == pytest.approx(total, rel=1e-3)


def test_a_row_of_a_language_model(language) -> None:
    from opd.models.forward import log_probabilities

    pair, batch, hidden, distributions = language
    size, width = pair.student.head.weight.shape

    def logp(c: slice) -> tuple[Tensor, Tensor]:
        return (
            log_probabilities(pair.student, hidden[c], 0.8),
            log_probabilities(pair.teacher.model, distributions[c], 0.8),
        )

    sketches = sketch_gradients(batch, hidden, logp, identity_projection(size, width))
    exact = gradient_row(sketches)
    row = gradient_row(
        sketch_gradients(batch, hidden, logp, random_projection(size, width, seed=1))
    )
    assert row.keys() == exact.keys()
    head = head_gradients(
        pair, make_objective("sampled_token", gamma=0.0), batch, hidden, distributions
    ).double()
    part = head.view(4, 2, -1).sum(1)
    total_square = part.sum(0).square().sum()
    signal = (total_square - part.square().sum()) / (8**2 - 4 * 2**2)
    assert exact["gradient/signal"] == pytest.approx(float(signal), rel=1e-4)
    noise = 8 * (float(total_square) / 64 - float(signal))
    assert exact["gradient/noise/plain@0"] == pytest.approx(noise, rel=1e-4)
    assert exact["gradient/noise/plain@0_sketch_se"] == 0
    other_row = gradient_row(sketches, ("leave_one_out", 0.5), num_sequences=77)
    i = estimator_index(sketches, "leave_one_out", 0.5)
    truth = float(pair_products(sketches.sketches[:, i : i + 1], sketches.prompt).signal[0, 0])
    assert other_row["gradient/signal"] == pytest.approx(truth)
    assert truth != pytest.approx(float(signal), rel=0.01)
    assert other_row["gradient/sequences"] == 77
    far = row["gradient/noise/plain@1"] - exact["gradient/noise/plain@1"]
    assert abs(far) < 5 * row["gradient/noise/plain@1_sketch_se"]
    assert row["gradient/bias2@1"] == 0
    for kind in ("/", "@"):
        shares = [v for k, v in row.items() if k.startswith(f"gradient/chosen{kind}")]
        assert sum(shares) == pytest.approx(1)
    cost = batch.prefix.reverse_kl.sum(1).mean()
    assert row["gradient/cost_of_response"] == pytest.approx(float(cost))
    bare = replace(batch, prefix=None)
    alone = sketch_gradients(
        bare,
        hidden,
        lambda c: (logp(c)[0], None),
        identity_projection(size, width),
        has_teacher=False,
    )
    assert alone.names == ("plain", "position_mean", "leave_one_out")
    assert gradient_row(alone)["gradient/signal"] == pytest.approx(exact["gradient/signal"])
    with pytest.raises(MissingField, match=r"\('rb_all', 0.0\) is not among plain"):
        gradient_row(alone, ("rb_all", 0.0))
    with pytest.raises(
        MissingField, match=r"top_p=0\.9 at temperature 0\.8 but scored at temperature 0\.8"
    ):
        sketch_gradients(replace(batch, top_p=0.9), hidden, logp, identity_projection(size, width))
    with pytest.raises(
        MissingField, match=r"temperature 1\.0 but scored at temperature 0\.8; sample"
    ):
        sketch_gradients(
            replace(batch, temperature=1.0), hidden, logp, identity_projection(size, width)
        )
    with pytest.raises(ValueError, match="2 different families"):
        concatenate_sketches([sketches, alone])
