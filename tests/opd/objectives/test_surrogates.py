"""Token losses against dense formulas, published formulas and a published implementation."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts, Support
from opd.objectives import factory as o
from opd.objectives import support
from opd.objectives.catalogue import FORMS, SUPPORTS
from opd.objectives.divergences import jensen_shannon
from opd.objectives.inputs import TokenInputs
from opd.objectives.objective import batch_losses
from opd.objectives.reduction import token_mean
from opd.objectives.surrogates import clipped_score, plain_score, weighted_score

V, N = 9, 40


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits() -> tuple[Tensor, Tensor]:
    """Return (N, V) logits of student and teacher."""
    return tuple(1.5 * torch.randn(2, N, V, generator=seeded(0), dtype=torch.float64))


def sampled() -> Tensor:
    """Return (N,) tokens sampled from the student."""
    return torch.multinomial(logits()[0].softmax(-1), 1, generator=seeded(3))[:, 0]


# --- supports of variable size ------------------------------------------------------------------


def select_support(source: str, k: int) -> tuple[Tensor, Tensor | None]:
    """Return ids and present of a named support."""
    student, teacher = logits()
    teacher_ids, student_ids = teacher.topk(k, -1).indices, student.topk(k, -1).indices
    if source in support.JOINT_SUPPORTS:
        return support.JOINT_SUPPORTS[source](teacher_ids, student_ids)
    return (teacher_ids if source == "teacher" else student_ids), None


def dense(form: str, z: Tensor, q: Tensor, inside: Tensor, y: Tensor) -> Tensor:
    """Return the (N,) loss of a form, from whole distributions and a set (N, V) of ids."""
    p, hit = z.softmax(-1), inside.gather(-1, y[:, None])[:, 0]
    if form == "_and_sampled":
        inside = inside | torch.nn.functional.one_hot(y, V).bool()
    s = inside.double()
    if form in ("", "_and_sampled"):
        student_probs, teacher_mass = ((x * s) / (x * s).sum(-1, keepdim=True) for x in (p, q))
        ratio = torch.where(
            inside, (p / q).log() - ((p * s).sum(-1) / (q * s).sum(-1)).log()[:, None], 0
        )
        return (student_probs * ratio).sum(-1)
    ratio = p.log() - q.log()
    mass, teacher_mass = (p * s).sum(-1), (q * s).sum(-1)
    logp, r = (x.gather(-1, y[:, None])[:, 0] for x in (p.log(), ratio))
    tail = torch.where(hit, 0.0, r.detach() * logp)
    head, stopped = (p * s * ratio).sum(-1), (p * s * ratio.detach()).sum(-1)
    return {
        "_unnormalised": head,
        "_stopped": stopped,
        "_bucket": head + (1 - mass) * ((1 - mass) / (1 - teacher_mass)).log(),
        "_sampled_tail": stopped + tail,
        "_published_tail": head + tail,
    }[form]


def visited(live: Tensor, ids: Tensor, present: Tensor | None, raw: bool = False) -> TokenInputs:
    """Return all tokens on a support; live (N, V) logits are passed on unnormalised if `raw`."""
    target, y = logits()[1].requires_grad_(), sampled()
    p, q = live if raw else live.log_softmax(-1), target.log_softmax(-1)
    student_logp, teacher_logp = p.gather(-1, ids), q.gather(-1, ids)
    counted_ids = torch.ones_like(ids, dtype=torch.bool) if present is None else present
    return TokenInputs(
        logp=p.gather(-1, y[:, None])[:, 0],
        credit=torch.zeros(N, dtype=torch.float64),
        weight=torch.ones(()),
        teacher_logp=q.gather(-1, y[:, None])[:, 0],
        # values at absent ids must not matter
        support_logp=torch.where(counted_ids, student_logp, 7 * student_logp.detach()),
        teacher_support_logp=torch.where(
            counted_ids, teacher_logp, torch.full_like(teacher_logp, torch.nan)
        ),
        present=present,
        inside=((ids == y[:, None]) & counted_ids).any(-1),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", SUPPORTS)
def test_every_form_on_every_support_is_the_dense_one(source: str, form: str) -> None:
    weight = 1 + torch.rand(N, generator=seeded(4), dtype=torch.float64)
    objective, empty = o.OBJECTIVES[f"{source}_topk{form}"], 0
    for k in (1, 4):
        ids, present = select_support(source, k)
        inside = torch.zeros(N, V, dtype=torch.long)
        inside = inside.scatter_add(
            -1, ids, torch.ones_like(ids) if present is None else present.long()
        )
        assert inside.max() == 1
        live = logits()[0].requires_grad_()
        loss = objective.surrogate(visited(live, ids, present))
        (surrogate_gradient,) = torch.autograd.grad((loss * weight).sum(), live)
        dense_leaf = logits()[0].requires_grad_()
        # the dense formula divides by nothing where no id is present
        is_defined = inside.any(-1) if form == "" else torch.ones(N, dtype=torch.bool)
        parts = (logits()[1].softmax(-1), inside.bool(), sampled())
        want = dense(form, dense_leaf[is_defined], *(x[is_defined] for x in parts))
        (gradient,) = torch.autograd.grad((want * weight[is_defined]).sum(), dense_leaf)
        torch.testing.assert_close(surrogate_gradient, gradient, atol=1e-12, rtol=0)
        # a sampled tail is the score function of a constant: only its gradient is defined
        if not form.endswith("tail"):
            torch.testing.assert_close(loss[is_defined], want, atol=1e-12, rtol=0)
        assert loss[~is_defined].eq(0).all()
        empty += int((~inside.any(-1)).sum())
    assert empty or source != "intersection", "the cases contain no empty support"


@pytest.mark.parametrize("limit", [0.3, 1.0, 50.0])
@pytest.mark.parametrize(
    "name", ["teacher_topk", "student_topk_and_sampled", "teacher_topk_unnormalised", "full"]
)
def test_clipped_log_ratios_by_a_loop_over_ids(name: str, limit: float) -> None:
    """Beyond the limit an id contributes p * limit and its log passes no gradient."""
    student, teacher = logits()
    y, live = sampled(), student.clone().requires_grad_()
    p, q = live.log_softmax(-1), teacher.log_softmax(-1)
    source = name.split("_")[0]
    ids = torch.arange(V).expand(N, V) if source == "full" else select_support(source, 4)[0]
    total = torch.zeros((), dtype=torch.float64)
    for n in range(N):
        support_ids = sorted({*ids[n].tolist(), *([int(y[n])] if "sampled" in name else [])})
        student_logp, teacher_logp = p[n, support_ids], q[n, support_ids]
        if "unnormalised" not in name:
            student_logp, teacher_logp = (
                student_logp - student_logp.logsumexp(0),
                teacher_logp - teacher_logp.logsumexp(0),
            )
        for a, b in zip(student_logp, teacher_logp, strict=True):
            r = a - b
            far = abs(float(r.detach())) > limit
            total = total + a.exp() * (math.copysign(limit, float(r.detach())) if far else r)
    (want,) = torch.autograd.grad(total, live)
    objective = o.make_objective(
        "full_reverse_kl" if source == "full" else name,
        ratio_clip=limit,
        allow_collapse="unnormalised" in name,
    )
    p = live.log_softmax(-1)
    inputs = TokenInputs(
        logp=p.gather(-1, y[:, None])[:, 0],
        credit=torch.zeros(N, dtype=torch.float64),
        weight=torch.ones(()),
        teacher_logp=q.gather(-1, y[:, None])[:, 0],
        support_logp=p.gather(-1, ids),
        teacher_support_logp=q.gather(-1, ids),
        inside=(ids == y[:, None]).any(-1),
    )
    loss = objective.surrogate(inputs).sum()
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(torch.autograd.grad(loss, live)[0], want)


@pytest.mark.parametrize("form", [f for f in FORMS if "sampled" not in f and "tail" not in f])
def test_no_id_at_all_gives_no_loss_and_no_gradient(form: str) -> None:
    ids, _ = select_support("teacher", 3)
    live = logits()[0].requires_grad_()
    loss = FORMS[form].surrogate(visited(live, ids, torch.zeros_like(ids, dtype=torch.bool)))
    assert loss.eq(0).all()
    assert torch.autograd.grad(loss.sum(), live)[0].eq(0).all()


def test_objectives_say_what_they_read() -> None:
    """Pass raw logits where `normalised` is False and no `logp` where `sampled` is False."""
    for name, objective in o.OBJECTIVES.items():
        if "_topk" not in name and not name.startswith("full"):
            assert objective.requirements.sampled_logp
            assert objective.requirements.normalised
            continue
        ids, present = select_support(objective.support, 4) if "_topk" in name else (None, None)
        ids = torch.arange(V).expand(N, V) if ids is None else ids
        results = []
        for raw in (False, True):
            live = logits()[0].requires_grad_()
            inputs = visited(live, ids, present, raw)
            loss = objective.surrogate(inputs)
            results.append((loss, torch.autograd.grad(loss.sum(), live)[0]))
        is_invariant = all(torch.allclose(*x, atol=1e-12) for x in zip(*results, strict=True))
        assert is_invariant != objective.requirements.normalised, name
        blind = replace(inputs, logp=None)
        if objective.requirements.sampled_logp:
            with pytest.raises(ValueError, match="sampled token's log-probability"):
                objective.surrogate(blind)
        else:
            torch.testing.assert_close(objective.surrogate(blind), objective.surrogate(inputs))
    assert not o.make_objective("teacher_topk").requirements.normalised
    assert not o.make_objective("teacher_topk").requirements.sampled_logp
    mixed = o.make_objective("teacher_topk", reward_weight=0.5)
    assert mixed.requirements.sampled_logp
    assert mixed.requirements.normalised
    assert o.make_objective("full_reverse_kl", gamma=0.5).requirements.sampled_logp
    assert not o.make_objective("full_reverse_kl").requirements.sampled_logp


# --- published formulas -------------------------------------------------------------------------


def published(variant: int, z: Tensor, target: Tensor, y: int, k: int) -> Tensor:
    """Return V1 to V5 of the paper's appendix G.3.1 for one token's logits (V,), in plain loops."""
    p, q = z.softmax(-1), target.softmax(-1)
    source = (p if variant in (2, 4) else q).tolist()
    ids = sorted(range(V), key=lambda v: -source[v])[:k]
    if variant <= 3:
        if variant > 1 and y not in ids:
            ids.append(y)
        student_mass, teacher_mass = sum(p[v] for v in ids), sum(q[v] for v in ids)
        return sum(
            p[v] / student_mass * ((p[v] / student_mass) / (q[v] / teacher_mass)).log() for v in ids
        )
    head = sum(p[v] * (p[v] / q[v]).log() for v in ids)
    rho = p[y] / p[y].detach()
    return head + (0.0 if y in ids else rho * (p[y] / q[y]).log().detach())


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        (1, "teacher_topk"),
        (2, "student_topk_and_sampled"),
        (3, "teacher_topk_and_sampled"),
        (4, "student_topk_published_tail"),
        (5, "teacher_topk_published_tail"),
    ],
)
@pytest.mark.parametrize("k", [1, 3])
def test_the_papers_five_variants(variant: int, name: str, k: int) -> None:
    objective = o.make_objective(name, allow_collapse=True)
    live = logits()[0].requires_grad_()
    loss = objective.surrogate(visited(live, *select_support(objective.support, k)))
    reference_leaf, target = logits()
    reference_leaf.requires_grad_()
    pairs = zip(reference_leaf, target, sampled().tolist(), strict=True)
    want = torch.stack([published(variant, z, q, y, k) for z, q, y in pairs])
    if variant <= 3:
        torch.testing.assert_close(loss, want, atol=1e-13, rtol=0)
    surrogate_gradient, gradient = (
        torch.autograd.grad(x.sum(), z)[0] if x.requires_grad else torch.zeros_like(z)
        for x, z in ((loss, live), (want, reference_leaf))
    )
    torch.testing.assert_close(surrogate_gradient, gradient, atol=1e-13, rtol=0)


def test_the_published_tail_rests_where_its_docstring_says() -> None:
    """p(S) = q(S)/(q(S) + e - e q(S)), p proportional to q inside and outside."""
    q = logits()[1].softmax(-1)
    ids, _ = select_support("teacher", 3)
    inside = torch.zeros(N, V, dtype=torch.float64).scatter(-1, ids, 1.0)
    mass = (q * inside).sum(-1, keepdim=True)
    fixed_point = mass / (mass + math.e - math.e * mass)
    p = torch.where(inside > 0, q * fixed_point / mass, q * (1 - fixed_point) / (1 - mass))
    for table, still in ((p, True), (q, False)):
        total = torch.zeros(N, V, dtype=torch.float64)
        for y in range(V):  # the mean over the sampled token
            live = table.log().requires_grad_()
            logp = live.log_softmax(-1)
            inputs = TokenInputs(
                logp=logp[:, y],
                credit=torch.zeros(N, dtype=torch.float64),
                weight=torch.ones(()),
                teacher_logp=q.log()[:, y],
                support_logp=logp.gather(-1, ids),
                teacher_support_logp=q.log().gather(-1, ids),
                inside=(ids == y).any(-1),
            )
            loss = FORMS["_published_tail"].surrogate(inputs)
            total += torch.autograd.grad((table[:, y] * loss).sum(), live)[0]
        assert (total.abs().max() < 1e-14) == still


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jensen_shannon_is_that_of_the_definition(beta: float) -> None:
    live, reference_leaf = (logits()[0].requires_grad_() for _ in range(2))
    target = logits()[1].requires_grad_()
    divergence = jensen_shannon(live.log_softmax(-1), target.log_softmax(-1), beta)
    p, q = reference_leaf.softmax(-1), logits()[1].softmax(-1)
    m = beta * q + (1 - beta) * p
    want = beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)
    if beta in (0.0, 1.0):
        over, under = (q, p) if beta == 0 else (p, q)
        want = (over * (over / under).log()).sum(-1)
    torch.testing.assert_close(divergence, want)
    gradients = [
        torch.autograd.grad(x.sum(), z)[0] for x, z in ((divergence, live), (want, reference_leaf))
    ]
    torch.testing.assert_close(*gradients)
    second_divergence = jensen_shannon(live.log_softmax(-1), target.log_softmax(-1), beta)
    assert torch.autograd.grad(second_divergence.sum(), target, allow_unused=True) == (None,)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_divergence_equals_trls_loss_and_reduction(beta: float) -> None:
    from trl.experimental.gkd import gkd_trainer as gkd

    z, q = (x.view(5, 8, V) for x in logits())
    mask = torch.rand(5, 8, generator=seeded(5)) > 0.4
    labels = torch.where(mask, 1, -100)
    live, trl_logits = (z.clone().requires_grad_() for _ in range(2))
    zeros = torch.zeros(5, 8, dtype=torch.float64)
    ids = torch.arange(V).expand(5, 8, V)
    batch = ScoredRollouts(
        tokens=zeros.long(),
        mask=mask,
        sampler_logp=zeros,
        prompt=torch.arange(5),
        ended=mask.any(1),
        student_logp=zeros,
        teacher_logp=zeros,
        support=Support(
            ids=ids,
            student_logp=z.log_softmax(-1),
            teacher_logp=q.log_softmax(-1),
            source="full",
        ),
    )
    objective, denominator = o.make_objective("full_jsd", beta=beta), token_mean(batch)
    reduced = batch_losses(
        objective, batch, None, live.log_softmax(-1), denominator=denominator
    ).sum()
    want = gkd.GKDTrainer.generalized_jsd_loss(trl_logits, q, labels, beta=beta)
    torch.testing.assert_close(reduced, want)
    gradients = [torch.autograd.grad(x, t)[0] for x, t in ((reduced, live), (want, trl_logits))]
    torch.testing.assert_close(*gradients)


# --- importance ratios --------------------------------------------------------------------------

RATIO_TABLE = [
    # advantage, rho, loss, d loss / d log p: low 0.2, high 0.2, dual 3
    (1.0, 0.5, -0.5, -0.5),
    (1.0, 1.0, -1.0, -1.0),
    (1.0, 1.1, -1.1, -1.1),
    (1.0, 1.3, -1.2, 0.0),
    (1.0, 5.0, -1.2, 0.0),
    (2.0, 0.9, -1.8, -1.8),
    (-1.0, 0.5, 0.8, 0.0),
    (-1.0, 0.9, 0.9, 0.9),
    (-1.0, 1.0, 1.0, 1.0),
    (-1.0, 1.5, 1.5, 1.5),
    (-1.0, 2.9, 2.9, 2.9),
    (-1.0, 3.1, 3.0, 0.0),
    (-2.0, 5.0, 6.0, 0.0),
    (0.0, 1.7, 0.0, 0.0),
]


def at_ratio(advantage: float, rho: float) -> tuple[TokenInputs, Tensor, Tensor]:
    logp = torch.tensor(math.log(rho) - 2.0, dtype=torch.float64, requires_grad=True)
    old = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    credit = torch.tensor(-advantage, dtype=torch.float64, requires_grad=True)
    inputs = TokenInputs(
        logp=logp,
        old_logp=old,
        credit=credit,
        weight=torch.ones(()),
        teacher_logp=torch.zeros_like(credit),
    )
    return inputs, logp, torch.stack([old, credit])


@pytest.mark.parametrize(("advantage", "rho", "loss", "slope"), RATIO_TABLE)
def test_the_clipped_loss_by_hand(advantage: float, rho: float, loss: float, slope: float) -> None:
    inputs, logp, _ = at_ratio(advantage, rho)
    clipped = clipped_score(inputs)
    assert clipped.item() == pytest.approx(loss, abs=1e-12)
    grads = torch.autograd.grad(clipped, (logp, inputs.old_logp, inputs.credit), allow_unused=True)
    assert grads[0].item() == pytest.approx(slope, abs=1e-12)
    assert grads[1:] == (None, None), "the old student and the credit are constants"
    free = weighted_score(inputs)
    assert free.item() == pytest.approx(-advantage * rho)
    grads = torch.autograd.grad(free, (logp, inputs.old_logp, inputs.credit), allow_unused=True)
    assert grads[0].item() == pytest.approx(-advantage * rho)
    assert grads[1:] == (None, None)
    if rho == 1:
        assert torch.autograd.grad(plain_score(inputs), logp)[0].item() == slope


def test_other_clips_move_the_corners_they_name() -> None:
    def loss(advantage: float, rho: float) -> float:
        return clipped_score(at_ratio(advantage, rho)[0], low=0.1, high=0.4, dual=2.0).item()

    losses = [loss(1.0, 1.3), loss(1.0, 1.5), loss(-1.0, 0.85), loss(-1.0, 1.9), loss(-1.0, 2.2)]
    assert losses == pytest.approx([-1.3, -1.4, 0.9, 1.9, 2.0])


def test_a_far_ratio_is_finite_and_passes_no_nan_on() -> None:
    for advantage in (1.0, -1.0):
        inputs, logp, _ = at_ratio(advantage, 1.0)
        inputs = replace(inputs, logp=logp + 1000)
        for score in (clipped_score, weighted_score):
            loss = score(inputs)
            assert loss.isfinite()
            assert torch.autograd.grad(loss, logp)[0] == 0
    with pytest.raises(ValueError, match="old_logp is None"):
        clipped_score(replace(inputs, old_logp=None))
