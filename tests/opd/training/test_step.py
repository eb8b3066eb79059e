"""Training steps against dense references from the formulas, and invariances of a step."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.catalogue import CATALOGUE, PANEL, Metric
from diagnostics.core.optional_fields import MissingField
from diagnostics.core.totals import compute
from diagnostics.records.batch_files import load_batch
from opd.config.settings import Config
from opd.data.chain_task import problems
from opd.data.prompts import encode_prompts
from opd.models.loading import load_model
from opd.scoring import loss as scoring_loss
from opd.training import shared_pass
from opd.training import update as updates
from opd.training.train import train
from tests.helpers.runs import rows, settings

TEMPERATURE = 0.8


def one_step_config(tiny_pair, out: Path, **changes: object) -> Config:
    """One step of 4 prompts x 2, with as little evaluation as possible, and a saved batch."""
    small = {"steps": 1, "prompts_per_step": 4, "eval_every": 0, "eval_problems": 1}
    fixed = {"save_batch_every": 1, "temperature": TEMPERATURE, "max_grad_norm": 0.05}
    return settings(tiny_pair, out, **(small | fixed | changes))


def dense(network, config: Config, batch: ScoredRollouts) -> Tensor:
    """(B, T, V) log-probabilities, each row scored without padding."""
    tokenizer, _ = load_model(config.student, "cpu", "float32")
    prompts = encode_prompts(tokenizer, problems("train", 4, config.seed * 1_000_003), 2, 64)
    logits_by_row = []
    for i in range(len(batch)):
        prompt = prompts.tokens[i][prompts.mask[i]]
        logits = network(torch.cat([prompt, batch.tokens[i]])[None]).logits[0]
        logits_by_row.append(logits[len(prompt) - 1 : -1])
    return (torch.stack(logits_by_row) / config.rollout.temperature).log_softmax(-1)


def adamw_by_hand(network, losses, config: Config) -> None:
    """Clipped AdamW steps (no decay) from the formula, one per loss of the changing network."""
    first_moments = [torch.zeros_like(p) for p in network.parameters()]
    second_moments = copy.deepcopy(first_moments)
    for t, loss in enumerate(losses, 1):
        gradients = torch.autograd.grad(loss(), list(network.parameters()))
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        scale = min(1.0, config.optimizer.max_grad_norm / (float(norm) + 1e-6))
        a, b = config.optimizer.betas
        with torch.no_grad():
            for p, g, m, v in zip(
                network.parameters(), gradients, first_moments, second_moments, strict=True
            ):
                m.mul_(a).add_((1 - a) * scale * g)
                v.mul_(b).add_((1 - b) * (scale * g).square())
                p -= config.optimizer.lr * (m / (1 - a**t)) / ((v / (1 - b**t)).sqrt() + 1e-8)


def final(folder: Path):
    return load_model(str(folder / "final"), "cpu", "float32")[1]


def check_weights(actual_network, expected_network, lr: float) -> None:
    """Compare weights: Adam's first steps have size lr unless the gradient is rounding error."""
    actual, expected_network = (
        torch.cat([p.detach().flatten() for p in n.parameters()])
        for n in (actual_network, expected_network)
    )
    difference = (actual - expected_network).abs()
    assert float((difference < 0.02 * lr).double().mean()) > 0.98
    assert float(difference.mean()) < 0.01 * lr


def test_a_step_of_support_matching_is_the_dense_one(tiny_pair, tmp_path: Path) -> None:
    config = one_step_config(tiny_pair, tmp_path / "run", objective="teacher_topk", support_k=5)
    folder = train(config).folder
    batch = load_batch(folder / "batches" / "step_000000.safetensors")
    network, teacher = (load_model(str(x), "cpu", "float32")[1] for x in tiny_pair)
    with torch.no_grad():
        q = dense(teacher, config, batch)
    best, ids = q.topk(5, -1)
    assert torch.equal(ids[batch.mask], batch.support.ids[batch.mask])

    def loss() -> Tensor:
        p = dense(network, config, batch).gather(-1, ids)
        p, teacher_logp = p - p.logsumexp(-1, keepdim=True), best - best.logsumexp(-1, keepdim=True)
        return ((p.exp() * (p - teacher_logp)).sum(-1) * batch.mask).sum() / batch.mask.sum()

    assert float(loss().detach()) == pytest.approx(rows(folder)[0]["loss"], rel=1e-4)
    adamw_by_hand(network, [loss], config)
    check_weights(final(folder), network, config.optimizer.lr)


@pytest.mark.parametrize(("scope", "ratio"), [("cost", "none"), ("loss", "sequence")])
def test_two_clipped_updates_are_the_dense_ones(
    tiny_pair, tmp_path: Path, scope: str, ratio: str
) -> None:
    """Each update uses half of the prompts; in the second, the ratios differ from 1.

    The sampler is a nucleus, so that the sequence ratio is not 1, also at masked tokens.
    """
    config = one_step_config(
        tiny_pair,
        tmp_path / "run",
        objective="sampled_token_clipped",
        gamma=0.5,
        updates_per_batch=2,
        lr=0.02,
        mask=tuple(f"id:{token}" for token in range(60, 110)),
        mask_scope=scope,
        ratio=ratio,
        top_p=1.0 if ratio == "none" else 0.9,
        max_response=12,  # so long that the ratios of the responses differ by enough
    )
    folder = train(config).folder
    batch = load_batch(folder / "batches" / "step_000000.safetensors")
    network, teacher = (load_model(str(x), "cpu", "float32")[1] for x in tiny_pair)
    y, mask = batch.tokens[..., None], batch.mask
    with torch.no_grad():
        old_logp, teacher_logp = (
            dense(n, config, batch).gather(-1, y)[..., 0] for n in (network, teacher)
        )
    cost, credit = old_logp - teacher_logp, torch.zeros_like(old_logp)
    for i in range(len(batch)):
        running = 0.0
        for t in reversed(range(int(batch.lengths[i]))):
            running = 0.5 * running
            if mask[i, t] or scope == "loss":
                running += float(cost[i, t])
            if mask[i, t]:
                credit[i, t] = running
    assert 0 < int(mask.sum()) < int(batch.lengths.sum())
    sequence_log_ratio = torch.zeros(len(batch), 1)
    for i in range(len(batch)):
        for t in range(int(batch.lengths[i]) if ratio == "sequence" else 0):
            sequence_log_ratio[i] += old_logp[i, t] - batch.sampler_logp[i, t]
    supervised = (batch.student_logp - batch.sampler_logp) * mask
    assert (
        ratio == "none" or float((sequence_log_ratio[:, 0] - supervised.sum(1)).abs().max()) > 0.05
    )
    ratio_changes = []

    def loss(part: slice) -> Tensor:
        ratio = (dense(network, config, batch).gather(-1, y)[..., 0] - old_logp).exp()
        ratio_changes.append(float(((ratio.detach() - 1).abs() * mask)[part].max()))
        advantage = -credit
        raw = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
        raw = (
            torch.where(advantage < 0, torch.min(raw, -3 * advantage), raw)
            * sequence_log_ratio.exp()
        )
        return (raw * mask)[part].sum() / mask[part].sum()

    halves = [slice(0, 4), slice(4, 8)]
    adamw_by_hand(network, [lambda h=h: loss(h) for h in halves], config)
    assert ratio_changes[0] < 1e-4
    assert ratio_changes[1] > 0.2  # the clip is at work
    check_weights(final(folder), network, config.optimizer.lr)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "teacher_topk", "updates_per_batch": 2, "denominator": "group_mean"},
        {"objective": "sampled_token", "mask": ("id:20", "id:21"), "gamma": 1.0},
        {"objective": "full_jsd", "entropy_top_fraction": 0.5},
        {"objective": "union_topk_bucket", "reward_weight": 0.5, "denominator": "sequence_mean"},
    ],
)
def test_the_split_into_micro_batches_changes_nothing(
    tiny_pair, tmp_path: Path, changes: dict[str, object]
) -> None:
    run_rows = [
        rows(
            train(
                one_step_config(
                    tiny_pair, tmp_path / str(size), max_tokens_per_microbatch=size, **changes
                )
            ).folder
        )[0]
        for size in (50, 100_000)
    ]
    assert run_rows[0].keys() == run_rows[1].keys()
    for name, value in run_rows[0].items():
        if value is None:  # as a NaN is written
            assert run_rows[1][name] is None
            continue
        assert value == pytest.approx(run_rows[1][name], rel=2e-4, abs=2e-5, nan_ok=True), name


def test_recomputed_layers_give_the_same_bits(tiny_pair, tmp_path: Path) -> None:
    plain, recomputed = (
        train(
            one_step_config(
                tiny_pair, tmp_path / str(enabled), steps=2, gradient_checkpointing=enabled
            )
        ).folder
        for enabled in (False, True)
    )
    assert rows(plain) == rows(recomputed)
    final_weights = [(d / "final" / "model.safetensors").read_bytes() for d in (plain, recomputed)]
    assert final_weights[0] == final_weights[1]


def test_layers_are_recomputed_in_an_update_and_nowhere_else(tiny_pair, tmp_path: Path) -> None:
    from opd.models.contexts import activation_checkpointing

    network = load_model(str(tiny_pair[0]), "cpu", "float32")[1]
    calls = []
    network.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.arange(6)[None]
    for enabled, count in ((False, 1), (True, 2)):
        calls.clear()
        with activation_checkpointing(network, enabled):
            network(ids).logits.sum().backward()
        assert len(calls) == count
    assert not any(m.training for m in network.modules())


def test_only_the_most_uncertain_tokens_are_trained_on(tiny_pair, tmp_path: Path) -> None:
    config = one_step_config(
        tiny_pair, tmp_path / "run", objective="full_reverse_kl", entropy_top_fraction=0.25
    )
    folder = train(config).folder
    batch = load_batch(folder / "batches" / "step_000000.safetensors")
    entropy = batch.prefix.student_entropy[batch.mask]
    count = round(0.25 * len(entropy))
    selected_tokens = entropy.topk(count).indices
    kl = batch.prefix.reverse_kl[batch.mask][selected_tokens]
    assert rows(folder)[0]["loss"] == pytest.approx(float(kl.mean()), rel=1e-4)


def test_steps_without_exact_measures_train_the_same(tiny_pair, tmp_path: Path) -> None:
    """The teacher's top-K and the sampler's numbers suffice for the loss, not for all metrics."""
    full_run, lean_run = (
        train(one_step_config(tiny_pair, tmp_path / str(n), steps=3, full_metrics_every=n)).folder
        for n in (1, 2)
    )
    pairs = list(zip(rows(full_run), rows(lean_run), strict=True))
    for step, (full, lean) in enumerate(pairs):
        assert ("divergence/reverse_kl" in lean) == (step % 2 == 0)
        if step % 2 == 0:
            assert lean["divergence/reverse_kl"] == pytest.approx(
                full["divergence/reverse_kl"], rel=2e-3, abs=1e-5
            )
        assert full["divergence/reverse_kl"] > 0
        for name in ("loss", "grad_norm", "divergence/k1", "signal/negative_share"):
            assert lean[name] == pytest.approx(full[name], rel=2e-3, abs=1e-5), name
    weights = [list(final(folder).parameters()) for folder in (full_run, lean_run)]
    for a, b in zip(*weights, strict=True):
        assert float((a - b).detach().abs().mean()) < 0.02 * 1e-3


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_gradient_probe_watches_and_changes_nothing(
    tiny_pair, tmp_path: Path, top_p: float
) -> None:
    options = {"steps": 3, "objective": "sampled_token", "gamma": 0.5, "top_p": top_p}
    plain, probed = (
        train(one_step_config(tiny_pair, tmp_path / str(n), probe_every=n, **options)).folder
        for n in (0, 2)
    )
    for step, (a, b) in enumerate(zip(rows(plain), rows(probed), strict=True)):
        assert {k: b[k] for k in a} == a
        probe_columns = {k for k in b if k.startswith("gradient/")}
        assert bool(probe_columns) == (step % 2 == 0)
        if probe_columns:
            assert b["gradient/variance"] > 0
            assert b["gradient/noise/plain@0.5"] > 0
    final_weights = [(d / "final" / "model.safetensors").read_bytes() for d in (plain, probed)]
    assert final_weights[0] == final_weights[1]


def test_the_probes_noise_is_that_of_head_gradients_by_autograd(tiny_pair, tmp_path) -> None:
    """n times the variance of the mean of the prompts' gradients, up to the error of the sketch."""
    config = one_step_config(
        tiny_pair, tmp_path / "run", objective="sampled_token", gamma=0.5, probe_every=1
    )
    folder = train(config).folder
    batch, row = load_batch(folder / "batches" / "step_000000.safetensors"), rows(folder)[0]
    network = load_model(str(tiny_pair[0]), "cpu", "float32")[1]
    head = network.get_output_embeddings().weight
    hidden: list[Tensor] = []
    network.get_output_embeddings().register_forward_hook(lambda _, x, __: hidden.append(x[0]))
    with torch.no_grad():
        dense(network, config, batch)
    cost, gradients = batch.log_ratio, []
    for i, mask in enumerate(batch.mask):
        weight = head.detach().clone().requires_grad_()
        states = hidden[i][0][-1 - mask.shape[0] : -1]
        logp = (states @ weight.T / config.rollout.temperature).log_softmax(-1)
        running, credit = 0.0, torch.zeros_like(cost[i])
        for t in reversed(range(len(mask))):
            running = float(cost[i, t]) + 0.5 * running if mask[t] else running
            credit[t] = running * float(mask[t])
        loss = (logp.gather(-1, batch.tokens[i][:, None])[:, 0] * credit).sum()
        gradients.append(torch.autograd.grad(loss, weight)[0].flatten())
    prompts = torch.stack(gradients).view(4, 2, -1).mean(1)
    expected = float(prompts.var(0).sum()) * 2  # of 8 rollouts, two a prompt
    error = 4 * row["gradient/noise/plain@0.5_sketch_se"]
    assert row["gradient/noise/plain@0.5"] == pytest.approx(expected, abs=error)
    assert error < 2 * expected


def read_if_known(metric: Metric, batch: ScoredRollouts) -> dict[str, float]:
    try:
        return compute(metric(batch))
    except MissingField:
        return {}


def test_a_mask_takes_its_tokens_out_of_loss_and_denominator(tiny_pair, tmp_path: Path) -> None:
    plain = train(
        one_step_config(tiny_pair, tmp_path / "plain", objective="full_reverse_kl")
    ).folder
    unmasked_batch = load_batch(plain / "batches" / "step_000000.safetensors")
    token = int(unmasked_batch.tokens[unmasked_batch.mask].mode().values)
    config = one_step_config(
        tiny_pair, tmp_path / "masked", objective="full_reverse_kl", mask=(f"id:{token}",)
    )
    folder = train(config).folder
    remaining = unmasked_batch.mask & (unmasked_batch.tokens != token)
    assert 0 < int(remaining.sum()) < int(unmasked_batch.mask.sum())
    row = rows(folder)[0]
    assert row["loss"] == pytest.approx(
        float(unmasked_batch.prefix.reverse_kl[remaining].mean()), rel=1e-4
    )
    assert row["response/length"] == pytest.approx(
        float(unmasked_batch.mask.sum(1).double().mean())
    )
    assert row["response/lengths_q50"] == rows(plain)[0]["response/lengths_q50"]
    share = 1 - float(remaining.sum() / unmasked_batch.mask.sum())
    assert row["mask/all/tokens"] == pytest.approx(share, rel=1e-5)
    healthy = rows(plain)[0]
    sampled = [PANEL[e.name] for e in CATALOGUE if e.token_set == "sampled" and e.name in PANEL]
    columns = [
        name for metric in sampled for name in read_if_known(metric, unmasked_batch) if name in row
    ]
    assert {"consistency/z_H", "consistency/z_K", "response/length"} < set(columns)
    for name in columns:  # the same rollouts: what tests them does not ask what is supervised
        if row[name] != healthy[name]:
            assert row[name] == pytest.approx(healthy[name], rel=1e-9), name
    assert row["divergence/k1"] != healthy["divergence/k1"]
    assert f"id:{token}" in load_batch(folder / "batches" / "step_000000.safetensors").mask_rule


def test_shares_keep_the_rollouts_of_a_prompt_together() -> None:
    prompts = [7, 7, 3, 3, 5, 5, 9, 9]
    assert updates.split_rows(prompts, 2) == [[2, 3, 4, 5], [0, 1, 6, 7]]
    assert updates.split_rows(prompts, 4) == [[2, 3], [4, 5], [0, 1], [6, 7]]


@pytest.mark.parametrize("is_shared", [True, False], ids=["one pass", "two passes"])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(
    tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, is_shared: bool
) -> None:
    """A fault in the second of three steps; the run continues with unchanged weights."""
    module = shared_pass if is_shared else scoring_loss
    original, calls = module.loss_from_hidden, []

    def faulty(*args, **kwargs):
        calls.append(1)
        loss = original(*args, **kwargs)
        return loss * float("inf") if len(calls) == 2 else loss

    monkeypatch.setattr(module, "loss_from_hidden", faulty)
    config = one_step_config(tiny_pair, tmp_path / "run", steps=3, share_forward_pass=is_shared)
    folder = train(config).folder
    run_rows = rows(folder)
    assert [row["skipped"] for row in run_rows] == [0, 1, 0]
    assert "1 of 1 updates skipped" in capsys.readouterr().err
    assert run_rows[1]["loss"] is None or run_rows[1]["loss"] == float("inf")
    assert json.loads((folder / "evals.jsonl").read_text().splitlines()[-1])["step"] == 3
    assert all(p.isfinite().all() for p in final(folder).parameters())


def test_updates_need_a_score_that_knows_how_far_the_student_moved(tiny_pair, tmp_path) -> None:
    for changes in ({"objective": "sampled_token"}, {"objective": "full_reverse_kl", "gamma": 0.5}):
        with pytest.raises(ValueError, match=r"updates_per_batch is 2: .* sampled_token_weighted"):
            train(one_step_config(tiny_pair, tmp_path / "run", updates_per_batch=2, **changes))
    with pytest.raises(
        ValueError, match="updates_per_batch is 3; it must be a divisor of prompts_per_step"
    ):
        train(one_step_config(tiny_pair, tmp_path / "run", updates_per_batch=3))
