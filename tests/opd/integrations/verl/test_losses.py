"""Objectives as verl's losses, called through verl's functions, and what verl cannot supply."""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.adapters.verl import sampled_tokens
from opd.integrations.verl.losses import check_settings, missing_inputs
from opd.integrations.verl.topk_loss import TOPK_OBJECTIVES
from opd.objectives.catalogue import OBJECTIVES
from opd.objectives.divergences import forward_kl
from opd.objectives.factory import make_objective
from opd.objectives.objective import Objective
from opd.objectives.surrogates import Form, support_log_probs
from tests.opd.integrations.verl.test_topk_loss import TOP, VOCABULARY, scattered

PROMPTS = ([7, 8], [7, 8], [5, 6, 7], [9])
MASKS = ([1, 1, 1], [1, 0, 1, 1, 1], [1, 1], [1, 1, 1, 0])
TOTAL = sum(map(sum, MASKS))
SUPPLIED = {
    "sampled_token",
    "sampled_token_weighted",
    "sampled_token_clipped",
    "k2",
    "k3",
    "teacher_topk",
    "teacher_topk_stopped",
    "teacher_topk_bucket",
}


def test_only_what_verl_sends_is_supplied() -> None:
    missing_by_name = {}
    for name in OBJECTIVES:
        objective = make_objective(
            name, gamma=0.5 if name == "mean_future" else 0.0, allow_collapse=True
        )
        missing_by_name[name] = missing_inputs(objective.requirements)
    assert {name for name, reason in missing_by_name.items() if not reason} - SUPPLIED == {
        "teacher_topk_unnormalised"
    }
    assert "not the log-probabilities of the student's ids" in missing_by_name["union_topk"]
    assert "sampled token's log-probability" in missing_by_name["teacher_topk_sampled_tail"]
    assert "no full next-token distributions" in missing_by_name["mean_future"]
    assert "no full next-token distributions" in missing_by_name["full_jsd"]


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("use_policy_gradient", True, "set False"),
        ("loss_max_clamp", 10.0, "set null"),
        ("log_prob_min_clamp", -10.0, "set null"),
    ],
)
def test_settings_that_would_make_another_objective_are_refused(
    name: str, value: Any, remedy: str
) -> None:
    neutral = {"use_policy_gradient": False, "loss_max_clamp": None, "log_prob_min_clamp": None}
    check_settings(SimpleNamespace(**neutral), {"temperature": 1.0})
    with pytest.raises(ValueError, match=f"{name} is {value} .*{remedy}"):
        check_settings(SimpleNamespace(**neutral | {name: value}), {})
    with pytest.raises(ValueError, match=r"temperature is 0\.7"):
        check_settings(SimpleNamespace(**neutral), {"temperature": 0.7})


# --- through verl's own loss ---------------------------------------------------------------------


@pytest.fixture
def losses() -> Any:
    from verl.trainer.distillation import losses

    import opd.integrations.verl.register  # noqa: F401

    return losses


def rows(seed: int, topk: bool) -> list[dict[str, Tensor]]:
    """Return four responses of one step in the form of verl's rollouts and teacher scores."""
    batch_rows = []
    for i, (prompt, mask) in enumerate(zip(PROMPTS, MASKS, strict=True)):
        size, n = len(prompt) + len(mask), len(mask)
        g = torch.Generator().manual_seed(seed * 100 + i)
        response = torch.randint(VOCABULARY, (n,), generator=g)
        ids = torch.cat([torch.tensor(prompt), response])
        teacher = scattered(seed * 100 + 50 + i, size, VOCABULARY).log_softmax(-1)
        top = teacher.topk(TOP, -1)
        next_tokens = ids.roll(-1)[:, None]
        batch_rows.append(
            {
                "prompts": torch.tensor(prompt),
                "responses": response,
                "response_mask": torch.tensor(mask),
                "loss_mask": torch.tensor(mask),
                "input_ids": ids,
                "position_ids": torch.arange(size),
                "teacher_ids": (top.indices if topk else next_tokens).int(),
                "teacher_logprobs": top.values if topk else teacher.gather(-1, next_tokens),
                "old_log_probs": -3 * torch.rand(n, generator=g) - 0.1,
                "rollout_log_probs": -3 * torch.rand(n, generator=g) - 0.1,
            }
        )
    return batch_rows


def at_responses(values: list[Tensor], i: int) -> Tensor:
    """Return the values at the tokens that predict the response's tokens."""
    start = len(PROMPTS[i]) - 1
    return values[i][start : start + len(MASKS[i])]


def through_verl(
    losses: Any,
    mode: str,
    batch_rows: list[dict[str, Tensor]],
    logits: list[Tensor],
    **settings: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Call verl's `distillation_ppo_loss` as its FSDP engine does, on one micro-batch."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import ActorConfig, DistillationConfig, DistillationLossConfig

    topk = losses.get_distillation_loss_settings(mode).use_topk
    loss_settings = {
        "use_task_rewards": False,
        "use_policy_gradient": False,
        "loss_max_clamp": None,
        "log_prob_min_clamp": None,
    }
    loss = DistillationLossConfig(loss_mode=mode, topk=TOP, **loss_settings | settings)
    distillation = DistillationConfig.__new__(DistillationConfig)
    object.__setattr__(distillation, "distillation_loss", loss)
    actor = ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    batch_rows = [{**row, "advantages": torch.zeros(len(row["responses"]))} for row in batch_rows]

    def nested(parts: list[Tensor]) -> Any:
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    tensors = {name: nested([row[name] for row in batch_rows]) for name in batch_rows[0]}
    data = TensorDict(tensors, batch_size=[len(batch_rows)])
    tu.assign_non_tensor(
        data,
        dp_size=1,
        batch_num_tokens=TOTAL,
        global_batch_size=4,
        temperature=1.0,
        distillation_only=topk and not loss.use_policy_gradient,
    )
    call = partial(losses.distillation_ppo_loss, actor, distillation)
    packed = torch.cat(logits)
    output = {}
    offsets = data["input_ids"].offsets()
    if topk:
        outputs = call(data=data, student_logits=packed[None])
        output = {
            key: torch.nested.nested_tensor_from_jagged(x[0], offsets) for key, x in outputs.items()
        }
    if not data["distillation_only"]:
        next_tokens = data["input_ids"].values().roll(-1)
        logp = packed.log_softmax(-1).gather(-1, next_tokens[:, None])[:, 0]
        output["log_probs"] = torch.nested.nested_tensor_from_jagged(logp, offsets)
    return call(model_output=output, data=data)


def gradients(loss: Tensor, logits: list[Tensor]) -> Tensor:
    return torch.cat(torch.autograd.grad(loss, logits, retain_graph=True))


def student(seed: int) -> list[Tensor]:
    return [
        scattered(seed * 100 + 20 + i, len(p) + len(m), VOCABULARY).requires_grad_()
        for i, (p, m) in enumerate(zip(PROMPTS, MASKS, strict=True))
    ]


@pytest.mark.verl
@pytest.mark.parametrize("name", sorted(n for n in SUPPLIED if "topk" in n))
def test_topk_modes_are_the_dense_objective_through_verl(losses: Any, name: str) -> None:
    batch_rows, logits = rows(1, topk=True), student(1)
    loss, metrics = through_verl(losses, f"opdlab_{name}", batch_rows, logits)
    total, mass, outside, mean_shift = torch.zeros(()), 0.0, 0.0, 0.0
    for i, row in enumerate(batch_rows):
        logp = at_responses(logits, i).log_softmax(-1)
        ids = at_responses([r["teacher_ids"] for r in batch_rows], i).long()
        teacher_logp = at_responses([r["teacher_logprobs"] for r in batch_rows], i)
        student_logp, keep = logp.gather(-1, ids), row["response_mask"].bool()
        if name == "teacher_topk":  # by hand, from the definition
            a, b = (
                student_logp.exp() / student_logp.exp().sum(-1, True),
                teacher_logp.exp() / teacher_logp.exp().sum(-1, True),
            )
            token = (a * (a / b).log()).sum(-1)
        elif name == "teacher_topk_stopped":
            token = (student_logp.exp() * (student_logp - teacher_logp).detach()).sum(-1)
        else:
            a = torch.cat([student_logp.exp(), 1 - student_logp.exp().sum(-1, True)], -1)
            b = torch.cat([teacher_logp.exp(), 1 - teacher_logp.exp().sum(-1, True)], -1)
            token = (a * (a / b).log()).sum(-1)
        total = total + (token * keep).sum() / TOTAL
        mass += float((student_logp.detach().exp().sum(-1) * keep).sum()) / TOTAL
        outside += float(((ids != row["responses"][:, None]).all(-1) & keep).sum()) / TOTAL
        shift = sampled_logp(batch_rows, logits, i).detach() - row["rollout_log_probs"]
        mean_shift += float((shift * keep).sum()) / TOTAL
    assert float(loss.detach()) == pytest.approx(float(total.detach()), abs=2e-6)
    torch.testing.assert_close(gradients(loss, logits), gradients(total, logits), rtol=0, atol=3e-6)
    assert metrics["divergence/topk_student_mass"].aggregate() == pytest.approx(mass, rel=1e-5)
    assert metrics["divergence/outside_topk"].aggregate() == pytest.approx(outside, rel=1e-5)
    observed = metrics["consistency/sampler_log_ratio"].aggregate()
    assert observed == pytest.approx(mean_shift, rel=1e-5)


def credit_by_hand(batch_rows: list[dict[str, Tensor]], gamma: float) -> list[Tensor]:
    """Return the discounted cost to go, token by token; masked tokens only advance gamma."""
    credits = []
    for i, row in enumerate(batch_rows):
        teacher_logp = at_responses([r["teacher_logprobs"] for r in batch_rows], i)[:, 0]
        cost, running = row["old_log_probs"] - teacher_logp, 0.0
        credit = torch.zeros(len(cost))
        for t in reversed(range(len(cost))):
            running *= gamma if row["rollout_log_probs"][t] else 1.0
            if row["response_mask"][t]:
                running += float(cost[t])
                credit[t] = running
        credits.append(credit)
    return credits


def sampled_logp(batch_rows: list[dict[str, Tensor]], logits: list[Tensor], i: int) -> Tensor:
    logp = at_responses(logits, i).log_softmax(-1)
    return logp.gather(-1, batch_rows[i]["responses"][:, None])[:, 0]


@pytest.mark.verl
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_sampled_token_modes_spread_the_credit_and_leave_masks_out(
    losses: Any, gamma: float
) -> None:
    from opd.integrations.verl.losses import register

    batch_rows, logits = rows(2, topk=False), student(2)
    mode = "opdlab_sampled_token"
    if gamma:
        mode = f"half_{gamma}"
        if mode not in losses.DISTILLATION_LOSS_REGISTRY:
            assert register("sampled_token", mode=mode, gamma=gamma) == mode
    loss, metrics = through_verl(losses, mode, batch_rows, logits)
    credit = credit_by_hand(batch_rows, gamma)
    parts = [(credit[i] * sampled_logp(batch_rows, logits, i)).sum() for i in range(4)]
    total = torch.stack(parts).sum() / TOTAL
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    torch.testing.assert_close(gradients(loss, logits), gradients(total, logits))
    k1 = sum(
        float(
            (
                (
                    sampled_logp(batch_rows, logits, i)
                    - at_responses([r["teacher_logprobs"] for r in batch_rows], i)[:, 0]
                )
                * batch_rows[i]["response_mask"]
            ).sum()
        )
        for i in range(4)
    )
    assert metrics["divergence/k1"].aggregate() == pytest.approx(k1 / TOTAL, rel=1e-5)


@pytest.mark.verl
def test_a_ratio_reads_what_the_sampler_said(losses: Any) -> None:
    from opd.integrations.verl.losses import register

    batch_rows, logits = rows(2, topk=False), student(2)
    if "reweighted" not in losses.DISTILLATION_LOSS_REGISTRY:
        register("sampled_token", mode="reweighted", ratio="token")
    loss, _ = through_verl(losses, "reweighted", batch_rows, logits)
    credit = credit_by_hand(batch_rows, 0.0)
    total = torch.zeros(())
    for i, row in enumerate(batch_rows):
        ratio = (row["old_log_probs"] - row["rollout_log_probs"]).exp()
        total = total + (ratio * credit[i] * sampled_logp(batch_rows, logits, i)).sum() / TOTAL
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)


@pytest.mark.verl
def test_a_sequence_ratio_counts_what_a_rule_took_out(losses: Any) -> None:
    """A tool's text, whose log-probability verl writes as 0, must not be counted."""
    from opd.integrations.verl.losses import register

    batch_rows, logits = rows(2, topk=False), student(2)
    batch_rows[1]["rollout_log_probs"][1] = 0.0
    if "prefixes" not in losses.DISTILLATION_LOSS_REGISTRY:
        register("sampled_token", mode="prefixes", gamma=0.5, ratio="sequence")
    loss, _ = through_verl(losses, "prefixes", batch_rows, logits)
    credit = credit_by_hand(batch_rows, 0.5)
    total = torch.zeros(())
    for i, row in enumerate(batch_rows):
        log_weight = sum(
            float(row["old_log_probs"][t] - row["rollout_log_probs"][t])
            for t in range(len(row["responses"]))
            if row["rollout_log_probs"][t] != 0
        )
        total = (
            total
            + math.exp(log_weight) * (credit[i] * sampled_logp(batch_rows, logits, i)).sum() / TOTAL
        )
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)


def test_sampled_tokens_of_verl_are_told_from_a_tools_text() -> None:
    mask = torch.tensor([[True, False, False, True], [True, True, False, False]])
    logp = torch.tensor([[-0.5, -0.2, 0.0, 0.0], [-1.0, 0.0, 0.0, -0.1]])
    is_sampled = sampled_tokens(mask, logp)
    assert is_sampled.tolist() == [[True, True, False, True], [True, True, False, True]]
    assert sampled_tokens(mask, None) is mask


@pytest.mark.verl
@pytest.mark.parametrize("mode", ["k2", "k3"])
def test_estimators_that_verl_has_too_are_equal(losses: Any, mode: str) -> None:
    batch_rows, logits = rows(3, topk=False), student(3)
    own_loss, _ = through_verl(losses, f"opdlab_{mode}", batch_rows, logits)
    verl_loss, _ = through_verl(losses, mode, batch_rows, [x * 1 for x in logits])
    # verl clamps k3 at 10, so compare where no token reaches it
    values = [float(x.detach()) for x in (own_loss, verl_loss)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    torch.testing.assert_close(gradients(own_loss, logits), gradients(verl_loss, logits))


@pytest.mark.verl
def test_forward_kl_on_the_support_is_verls(losses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward KL that is not one of the objectives gives verl's numbers through the same code."""
    monkeypatch.setitem(
        TOPK_OBJECTIVES,
        "opdlab_teacher_topk",
        Objective(
            support="teacher",
            local=Form(surrogate=lambda inputs: forward_kl(*support_log_probs(inputs))),
        ),
    )
    batch_rows, logits = rows(4, topk=True), student(4)
    own_loss, own_metrics = through_verl(losses, "opdlab_teacher_topk", batch_rows, logits)
    verl_loss, verl_metrics = through_verl(
        losses, "forward_kl_topk", batch_rows, [x * 1 for x in logits]
    )
    assert float(verl_metrics["distillation/loss_min"].aggregate()) > 0, "no token is clamped at 0"
    assert float(own_loss.detach()) == pytest.approx(float(verl_loss.detach()), rel=1e-6)
    torch.testing.assert_close(gradients(own_loss, logits), gradients(verl_loss, logits))
    assert own_metrics["divergence/topk_student_mass"].aggregate() == pytest.approx(
        float(verl_metrics["distillation/student_mass"]), rel=1e-5
    )


@pytest.mark.verl
def test_the_clipped_objective_is_verls_k1_under_its_policy_gradient(losses: Any) -> None:
    """Both make the cost of the tokens an advantage under PPO's clip; verl's is of the student now,
    ours of the student when it was scored, so that they are one where nothing has moved yet."""
    batch_rows, logits = rows(5, topk=False), student(5)
    for i, row in enumerate(batch_rows):
        row["old_log_probs"] = sampled_logp(batch_rows, logits, i).detach()
    verl_loss, _ = through_verl(losses, "k1", batch_rows, logits, use_policy_gradient=True)
    for mode in ("opdlab_sampled_token_clipped", "opdlab_sampled_token"):
        own_loss, _ = through_verl(losses, mode, batch_rows, logits)
        torch.testing.assert_close(gradients(own_loss, logits), gradients(verl_loss, logits))


@pytest.mark.verl
def test_what_would_be_wrong_in_verl_is_refused(losses: Any) -> None:
    from verl.workers.config import DistillationLossConfig

    from opd.integrations.verl.losses import register

    batch_rows, logits = rows(6, topk=False), student(6)
    mode = "opdlab_sampled_token"
    with pytest.raises(ValueError, match="use_policy_gradient is True"):
        through_verl(losses, mode, batch_rows, logits, use_policy_gradient=True)
    with pytest.raises(ValueError, match="loss_max_clamp is 10"):
        through_verl(losses, mode, batch_rows, logits, loss_max_clamp=10.0)
    with pytest.raises(ValueError, match="log-normaliser's gradient"):
        through_verl(
            losses,
            "opdlab_teacher_topk_bucket",
            rows(6, topk=True),
            logits,
            use_policy_gradient=True,
        )
    batch_rows[2]["teacher_ids"] = (batch_rows[2]["teacher_ids"] + 1) % VOCABULARY
    with pytest.raises(ValueError, match=r"ids other than the student's at 2 of 12"):
        through_verl(losses, mode, batch_rows, logits)
    refused = DistillationLossConfig(loss_mode="opdlab_student_topk").loss_settings
    with pytest.raises(ValueError, match="not the log-probabilities of the student's ids"):
        _ = refused.use_topk
    collapsing = DistillationLossConfig(loss_mode="opdlab_teacher_topk_unnormalised").loss_settings
    with pytest.raises(ValueError, match="collapses"):
        _ = collapsing.use_topk
    with pytest.raises(ValueError, match="needs the whole step"):
        register("sampled_token", mode="b", gamma=1.0, baseline="leave_one_out")
    with pytest.raises(ValueError, match="ratio 'sequence' is not available"):
        register("teacher_topk", mode="b", ratio="sequence")
    with pytest.raises(ValueError, match="use_task_rewards"):
        register("sampled_token", mode="b", reward_weight=1.0)
