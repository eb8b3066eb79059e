"""Losses and metrics of the user's own: the same weights as ours, and errors before the run."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diagnostics import PANEL
from diagnostics.errors import InvalidInput, UserError
from diagnostics.records.batch_files import load_batch
from opd import make_objective, policy_loss
from opd.config.settings import with_settings
from opd.library import sample
from opd.objectives.user_loss import PARAMETERS, load_user_loss, loss_values, try_user_loss
from opd.scoring import user_loss
from opd.scoring.request import ScoreRequest
from opd.scoring.score import score_batch
from opd.teachers.pair import load_pair
from opd.training.train import train
from opd.training.update import divided_by, divisor_shares
from opd.training.user_metrics import load_metrics, random_batch, try_metrics
from opd.training.validation import validate
from tests.helpers.runs import rows, settings

STALE: dict[str, object] = {
    "rollout_lag": 1,
    "engine": "servers",
    "rollout_servers": ("http://h:1/v1",),
}
"""Settings of a run whose rollouts are a step old."""
LOSSES = """
import torch

def reverse_kl(student_logits, teacher_logits, mask):
    p, q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()

def sampled(student_logp, teacher_logp, mask):
    cost = (student_logp - teacher_logp).detach()
    return (student_logp * cost * mask).sum() / mask.sum()

def weighted(student_logp, teacher_logp, sampler_logp, mask):
    cost = (student_logp - teacher_logp).detach()
    return ((student_logp - sampler_logp).exp() * cost * mask).sum() / mask.sum()

def top(student_logits, teacher_topk, mask):
    ids, q = teacher_topk
    p = student_logits.log_softmax(-1).gather(-1, ids).log_softmax(-1)
    q = q.log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()

def rewarded(student_logp, reward, mask):
    return -(student_logp * mask).sum(1).mul(reward).mean()

def by_rows(student_logp, teacher_logp, mask):
    cost = (student_logp - teacher_logp).detach()
    return (student_logp * cost * mask).sum() / mask.any(1).sum()

def ascending(student_logp, teacher_logp, mask):
    return -sampled(student_logp, teacher_logp, mask)

def everything(student_logits, teacher_logits, tokens, mask, sampler_logp, student_logp,
               teacher_logp, reward, prompt, student_topk, teacher_topk, weight=2.0):
    assert (student_topk[1].exp().sum(-1) <= 1.001).all() and weight == 2.0
    return weight * (student_logp * mask).sum()

def vector(student_logp, mask): return (student_logp * mask).sum(1)
def number(student_logp): return 3.0
def constant(student_logp): return student_logp.detach().sum()
def zero(student_logp): return 0 * student_logp.sum()
def broken(student_logits): return student_logits[:, :, 10**6].sum()
def unknown(student_logits, advantages): return student_logits.sum()
def blind(teacher_logits, mask): return teacher_logits.sum()
"""

METRICS = """
from diagnostics.core.totals import Mean

def unlikely(batch):
    return {"mine/unlikely": Mean.from_values(batch.teacher_logp < -5, batch.mask, batch.prompt)}

def number(batch): return 3.0
def plain(batch): return {"mine/x": 0.5}
def broken(batch): return {"mine/x": batch.nothing}
def repeated(batch):
    return {"divergence/k1": Mean.from_values(batch.log_ratio, batch.mask, batch.prompt)}
def two(batch, other): return {}
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "losses.py").write_text(LOSSES)
    (folder / "metrics.py").write_text(METRICS)
    (folder / "unfinished.py").write_text("def loss(:\n")
    (folder / "needy.py").write_text("import no_such_package\n")
    return folder


Run = Callable[..., torch.Tensor]


@pytest.fixture
def trained_weights(tiny_pair: tuple[Path, Path], tmp_path: Path) -> Run:
    """Return a function that trains three steps and returns all weights of the student."""

    def run(objective: str, **changes: object) -> torch.Tensor:
        out = tmp_path / str(len([*tmp_path.iterdir()]))
        config = settings(tiny_pair, out, objective=objective, steps=3, eval_every=0)
        student = train(with_settings(config, **changes)).student
        return torch.cat([p.detach().flatten() for p in student.network.parameters()])

    return run


@pytest.mark.parametrize(
    ("ours", "own", "changes"),
    [
        ("full_reverse_kl", "reverse_kl", {"updates_per_batch": 3, "temperature": 0.8}),
        ("sampled_token", "sampled", {"mask": ("role:eos",)}),
        ("teacher_topk", "top", {"lora_rank": 2}),
    ],
)
def test_our_losses_in_the_users_form_train_to_the_same_weights(
    trained_weights: Run, functions: Path, ours: str, own: str, changes: dict[str, object]
) -> None:
    """Ours are split into small micro-batches, and the user's is not."""
    expected = trained_weights(ours, max_tokens_per_microbatch=64, **changes)
    result = trained_weights(
        f"{functions}/losses.py:{own}", max_tokens_per_microbatch=64, **changes
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    start = trained_weights(ours, lr=1e-30, **changes)
    assert (result - start).abs().max() > 1e-3, "the run moves the weights"


@pytest.mark.parametrize(
    ("own", "divisor", "atol"),
    [
        ("reverse_kl", "tokens", 1e-5),
        ("sampled", "tokens", 1e-5),
        (
            "by_rows",
            "rows",
            1e-4,
        ),  # Adam enlarges the rounding of a weight with next to no gradient
    ],
)
def test_a_loss_whose_divisor_is_declared_is_split_into_micro_batches(
    trained_weights: Run,
    functions: Path,
    own: str,
    divisor: str,
    atol: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    step = user_loss.user_loss_from_hidden

    def counting(student, loss, hidden, batch, **options):
        sizes.append(len(batch))
        return step(student, loss, hidden, batch, **options)

    monkeypatch.setattr("opd.scoring.loss.user_loss_from_hidden", counting)
    name = f"{functions}/losses.py:{own}"
    expected = trained_weights(name)
    assert len(sizes) == 3, "one call per step"
    result = trained_weights(name, loss_divisor=divisor, max_tokens_per_microbatch=64)
    assert len(sizes) > 6, "several calls per step"
    torch.testing.assert_close(result, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("own", "changes", "message"),
    [
        (
            "ascending",
            {},
            "is faulty .wrong_sign: minus the mean estimates token_reverse_kl.*allow",
        ),
        ("sampled", {"loss_divisor": "rows"}, "divides by tokens; set loss_divisor to tokens"),
    ],
)
def test_a_loss_that_the_audit_refuses_is_not_trained_with(
    trained_weights: Run, functions: Path, own: str, changes: dict[str, object], message: str
) -> None:
    name = f"{functions}/losses.py:{own}"
    with pytest.raises(InvalidInput, match=message):
        trained_weights(name, **changes)
    assert trained_weights(name, allow_faulty_loss=True).isfinite().all()


def test_shares_of_a_divisor_are_counts_of_supervised_parts() -> None:
    """Four rows of three prompts; the third row has no supervised token."""
    batch = random_batch(4)
    rows = torch.arange(4) % len(batch)
    batch = batch.rows(rows.tolist())
    mask = torch.zeros_like(batch.mask)
    for row, length in enumerate([2, 1, 0, 1]):
        mask[row, :length] = True
    batch = replace(batch, mask=mask, sampled_mask=None, prompt=torch.tensor([0, 0, 1, 2]))
    for divisor, counts, total in (
        ("one", (1, 1), 1),
        ("tokens", (2, 2), 4),
        ("rows", (1, 2), 3),
        ("prompts", (1, 2), 2),
    ):
        assert divided_by(batch, divisor) == total
        shares = divisor_shares(batch, [[0, 2], [1, 3]], total, divisor)
        assert shares == [count / total for count in counts]


def test_a_loss_of_ones_own_is_one_pass_in_a_loop_of_ones_own(tiny_pair, functions: Path) -> None:
    pair = load_pair(str(tiny_pair[0]), str(tiny_pair[1]), "cpu")
    objective = make_objective(f"{functions}/losses.py:reverse_kl", support_k=4)
    ours = make_objective("full_reverse_kl", support_k=4)
    generator = torch.Generator().manual_seed(0)
    prompts, rollouts = sample(pair, ["2+3=", "4:7*3+8"], max_response=6, generator=generator)
    batch = score_batch(
        pair.student,
        pair.teacher,
        prompts,
        rollouts,
        ScoreRequest(requirements=objective.requirements),
    )
    losses = [
        policy_loss(pair.student, batch, x, teacher=pair.teacher, max_tokens_per_microbatch=1)
        for x in (objective, ours)
    ]
    torch.testing.assert_close(losses[0], losses[1])
    with pytest.raises(InvalidInput, match="teacher's hidden states are missing; pass the teacher"):
        policy_loss(pair.student, batch, objective)


def test_a_loss_gets_what_it_asks_for(functions: Path) -> None:
    loss = load_user_loss(f"{functions}/losses.py:everything")
    assert loss.asks == tuple(PARAMETERS)
    try_user_loss(loss, vocabulary=16, k=4)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, generator=generator)
    tokens = torch.randint(8, (2, 3), generator=generator)
    values = loss_values(loss, logits, {"tokens": tokens}, 2)
    probabilities = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    for b in range(2):
        for t in range(3):
            by_size = sorted(range(8), key=lambda v: -float(probabilities[b, t, v]))[:2]
            assert values["student_topk"][0][b, t].tolist() == by_size
            expected = math.log(probabilities[b, t, tokens[b, t]])
            assert float(values["student_logp"][b, t]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("losses.py:vector", r"returned a tensor of shape \(4,\); it must return a scalar tensor"),
        ("losses.py:number", "returned a float; it must return a scalar tensor"),
        ("losses.py:constant", "has no gradient; compute it from student_logits"),
        ("losses.py:zero", "gives the student's logits no gradient"),
        ("losses.py:broken", "failed with IndexError: .* on random logits"),
        ("losses.py:unknown", "asks for advantages; it may ask for student_logits, teacher_logits"),
        ("losses.py:blind", "asks for teacher_logits, mask, none of which has a gradient"),
        ("losses.py:absent", "losses.py has no function 'absent'; it has reverse_kl, sampled"),
        ("unfinished.py:loss", r"cannot be imported \(SyntaxError: .*write MODULE:FUNCTION"),
        ("needy.py:loss", r"cannot be imported \(ModuleNotFoundError: No module named 'no_such_p"),
        ("nothing.py:loss", "names a file that does not exist: .*nothing.py"),
        ("losses.py:", "is no name of a function; write MODULE:FUNCTION"),
    ],
)
def test_a_loss_that_cannot_train_is_refused_in_one_line(
    functions: Path, name: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        try_user_loss(load_user_loss(f"{functions}/{name}"), vocabulary=16, k=4)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 0.5}, "gamma is 0.5, which would have no effect on .*sampled, a loss of your"),
        ({"denominator": "group_mean"}, "denominator is group_mean, but .* divides"),
        ({"probe_every": 2}, "probe_every is 2, but the gradient probe"),
        ({"updates_per_batch": 3}, "updates_per_batch is 3, so that tokens .*ask for sampler_l"),
        (STALE, "rollout_lag is 1, so that tokens were .*ask for sampler_logp .* rollout_lag to 0"),
        ({"template": "[1]"}, r"template is '\[1\]'; it must be a JSON object"),
    ],
)
def test_settings_that_do_not_go_with_a_loss_are_refused(
    tiny_pair, functions: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    config = settings(tiny_pair, tmp_path, objective=f"{functions}/losses.py:sampled", **changes)
    [problem] = validate(config)
    assert re.search(message, problem), problem


@pytest.mark.parametrize("name", ["weighted", "reverse_kl"])
@pytest.mark.parametrize("changes", [{"updates_per_batch": 3}, STALE])
def test_a_loss_that_is_right_on_stale_samples_is_trained_with_them(
    tiny_pair, functions: Path, tmp_path: Path, name: str, changes: dict[str, object]
) -> None:
    config = settings(tiny_pair, tmp_path, objective=f"{functions}/losses.py:{name}", **changes)
    assert validate(config) == []


def test_several_ranks_are_refused(
    tiny_pair, functions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_pair, tmp_path, objective=f"{functions}/losses.py:sampled")
    assert not validate(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    [problem] = validate(config)
    assert "spread over several processes; start one process" in problem


def test_a_loss_that_asks_for_rewards_needs_answers(
    tiny_pair, functions: Path, tmp_path: Path
) -> None:
    source = tmp_path / "p.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"{i}+1"}) + "\n" for i in range(12)))
    config = settings(
        tiny_pair, tmp_path / "run", objective=f"{functions}/losses.py:rewarded", task=str(source)
    )
    with (
        pytest.warns(UserWarning, match="not graded"),
        pytest.raises(InvalidInput, match=r"rewarded asks for reward, but .* has no answers"),
    ):
        train(config)


def test_a_metric_of_ones_own_is_a_column_of_every_row(
    two_layer_pair, functions: Path, tmp_path: Path
) -> None:
    config = settings(
        two_layer_pair,
        tmp_path / "run",
        steps=2,
        eval_every=0,
        save_batch_every=1,
        metrics=(f"{functions}/metrics.py:unlikely",),
    )
    folder = train(config).folder
    for step, row in enumerate(rows(folder)):
        batch = load_batch(folder / "batches" / f"step_{step:06d}.safetensors")
        costs = [
            float(batch.teacher_logp[b, t]) < -5
            for b in range(len(batch))
            for t in range(batch.mask.shape[1])
            if batch.mask[b, t]
        ]
        assert row["mine/unlikely"] == pytest.approx(sum(costs) / len(costs))
        assert row["mine/unlikely_se"] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", "returned a float; it must return accumulators by column"),
        ("plain", "returned a mapping to float; it must return accumulators by column"),
        ("broken", "failed with AttributeError: .*nothing.* on a random batch"),
        ("repeated", "both return divergence/k1"),
        ("two", r"takes \(batch, other\), but is called with \(batch\)"),
    ],
)
def test_a_metric_that_fails_is_refused_in_one_line(
    functions: Path, name: str, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        try_metrics(load_metrics([f"{functions}/metrics.py:{name}"]), PANEL, 8)
    assert f"metrics.py:{name}" in str(caught.value)


def test_the_random_batch_has_every_field() -> None:
    batch = random_batch(4).validate()
    assert batch.support is not None
    assert batch.student_support is not None
    assert batch.prefix is not None
