"""Our objectives as verl's losses, through its own functions; what it cannot supply."""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.adapters.verl import sampled_tokens
from opd.integrations.verl.losses import check_settings, unsupplied
from opd.integrations.verl.topk_loss import TOPK
from opd.objectives.catalogue import local
from opd.objectives.divergences import forward_kl
from opd.objectives.factory import OBJECTIVES, make
from opd.objectives.surrogates import Form, pair
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
    found = {}
    for name in OBJECTIVES:
        found[name] = unsupplied(make(name, allow_collapse=True))
    assert {name for name, why in found.items() if not why} - SUPPLIED == {
        "teacher_topk_unnormalised"
    }
    assert "not the log-probabilities of the student's ids" in found["union_topk"]
    assert "sampled token's log-probability" in found["teacher_topk_sampled_tail"]
    assert "no whole next-token distributions" in found["mean_future"]
    assert "no whole next-token distributions" in found["full_jsd"]


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
    """Four responses of one step, as verl's rollouts and teacher leave them."""
    found = []
    for i, (prompt, mask) in enumerate(zip(PROMPTS, MASKS, strict=True)):
        size, n = len(prompt) + len(mask), len(mask)
        g = torch.Generator().manual_seed(seed * 100 + i)
        response = torch.randint(VOCABULARY, (n,), generator=g)
        ids = torch.cat([torch.tensor(prompt), response])
        teacher = scattered(seed * 100 + 50 + i, size, VOCABULARY).log_softmax(-1)
        top = teacher.topk(TOP, -1)
        follows = ids.roll(-1)[:, None]
        found.append(
            {
                "prompts": torch.tensor(prompt),
                "responses": response,
                "response_mask": torch.tensor(mask),
                "loss_mask": torch.tensor(mask),
                "input_ids": ids,
                "position_ids": torch.arange(size),
                "teacher_ids": (top.indices if topk else follows).int(),
                "teacher_logprobs": top.values if topk else teacher.gather(-1, follows),
                "old_log_probs": -3 * torch.rand(n, generator=g) - 0.1,
                "rollout_log_probs": -3 * torch.rand(n, generator=g) - 0.1,
            }
        )
    return found


def at_responses(values: list[Tensor], i: int) -> Tensor:
    """What stands at the tokens that predict the response's."""
    start = len(PROMPTS[i]) - 1
    return values[i][start : start + len(MASKS[i])]


def through_verl(
    losses: Any, mode: str, made: list[dict[str, Tensor]], logits: list[Tensor], **settings: Any
) -> tuple[Tensor, dict[str, Any]]:
    """verl's `distillation_ppo_loss` called as its FSDP engine calls it, on one micro-batch."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import ActorConfig, DistillationConfig, DistillationLossConfig

    topk = losses.get_distillation_loss_settings(mode).use_topk
    chosen = {
        "use_task_rewards": False,
        "use_policy_gradient": False,
        "loss_max_clamp": None,
        "log_prob_min_clamp": None,
    }
    loss = DistillationLossConfig(loss_mode=mode, topk=TOP, **chosen | settings)
    distillation = DistillationConfig.__new__(DistillationConfig)
    object.__setattr__(distillation, "distillation_loss", loss)
    actor = ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    made = [{**row, "advantages": torch.zeros(len(row["responses"]))} for row in made]

    def nested(parts: list[Tensor]) -> Any:
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    tensors = {name: nested([row[name] for row in made]) for name in made[0]}
    data = TensorDict(tensors, batch_size=[len(made)])
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
        found = call(data=data, student_logits=packed[None])
        output = {
            key: torch.nested.nested_tensor_from_jagged(x[0], offsets) for key, x in found.items()
        }
    if not data["distillation_only"]:
        follows = data["input_ids"].values().roll(-1)
        logp = packed.log_softmax(-1).gather(-1, follows[:, None])[:, 0]
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
    made, logits = rows(1, topk=True), student(1)
    loss, metrics = through_verl(losses, f"opdlab_{name}", made, logits)
    total, mass, outside, away = torch.zeros(()), 0.0, 0.0, 0.0
    for i, row in enumerate(made):
        logp = at_responses(logits, i).log_softmax(-1)
        ids = at_responses([r["teacher_ids"] for r in made], i).long()
        theirs = at_responses([r["teacher_logprobs"] for r in made], i)
        ours, keep = logp.gather(-1, ids), row["response_mask"].bool()
        if name == "teacher_topk":  # by hand, from the definition
            a, b = ours.exp() / ours.exp().sum(-1, True), theirs.exp() / theirs.exp().sum(-1, True)
            token = (a * (a / b).log()).sum(-1)
        elif name == "teacher_topk_stopped":
            token = (ours.exp() * (ours - theirs).detach()).sum(-1)
        else:
            a = torch.cat([ours.exp(), 1 - ours.exp().sum(-1, True)], -1)
            b = torch.cat([theirs.exp(), 1 - theirs.exp().sum(-1, True)], -1)
            token = (a * (a / b).log()).sum(-1)
        total = total + (token * keep).sum() / TOTAL
        mass += float((ours.detach().exp().sum(-1) * keep).sum()) / TOTAL
        outside += float(((ids != row["responses"][:, None]).all(-1) & keep).sum()) / TOTAL
        moved = sampled_logp(made, logits, i).detach() - row["rollout_log_probs"]
        away += float((moved * keep).sum()) / TOTAL
    assert float(loss.detach()) == pytest.approx(float(total.detach()), abs=2e-6)
    torch.testing.assert_close(gradients(loss, logits), gradients(total, logits), rtol=0, atol=3e-6)
    assert metrics["divergence/topk_student_mass"].aggregate() == pytest.approx(mass, rel=1e-5)
    assert metrics["divergence/outside_topk"].aggregate() == pytest.approx(outside, rel=1e-5)
    observed = metrics["consistency/sampler_log_ratio"].aggregate()
    assert observed == pytest.approx(away, rel=1e-5)


def credit_by_hand(made: list[dict[str, Tensor]], gamma: float) -> list[Tensor]:
    """Discounted cost to go, token by token; what the mask takes out advances gamma alone."""
    found = []
    for i, row in enumerate(made):
        theirs = at_responses([r["teacher_logprobs"] for r in made], i)[:, 0]
        cost, running = row["old_log_probs"] - theirs, 0.0
        credit = torch.zeros(len(cost))
        for t in reversed(range(len(cost))):
            running *= gamma if row["rollout_log_probs"][t] else 1.0
            if row["response_mask"][t]:
                running += float(cost[t])
                credit[t] = running
        found.append(credit)
    return found


def sampled_logp(made: list[dict[str, Tensor]], logits: list[Tensor], i: int) -> Tensor:
    logp = at_responses(logits, i).log_softmax(-1)
    return logp.gather(-1, made[i]["responses"][:, None])[:, 0]


@pytest.mark.verl
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_sampled_token_modes_spread_the_credit_and_leave_masks_out(
    losses: Any, gamma: float
) -> None:
    from opd.integrations.verl.losses import register

    made, logits = rows(2, topk=False), student(2)
    mode = "opdlab_sampled_token"
    if gamma:
        mode = f"half_{gamma}"
        if mode not in losses.DISTILLATION_LOSS_REGISTRY:
            assert register("sampled_token", mode=mode, gamma=gamma) == mode
    loss, metrics = through_verl(losses, mode, made, logits)
    credit = credit_by_hand(made, gamma)
    parts = [(credit[i] * sampled_logp(made, logits, i)).sum() for i in range(4)]
    total = torch.stack(parts).sum() / TOTAL
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    torch.testing.assert_close(gradients(loss, logits), gradients(total, logits))
    k1 = sum(
        float(
            (
                (
                    sampled_logp(made, logits, i)
                    - at_responses([r["teacher_logprobs"] for r in made], i)[:, 0]
                )
                * made[i]["response_mask"]
            ).sum()
        )
        for i in range(4)
    )
    assert metrics["divergence/k1"].aggregate() == pytest.approx(k1 / TOTAL, rel=1e-5)


@pytest.mark.verl
def test_a_ratio_reads_what_the_sampler_said(losses: Any) -> None:
    from opd.integrations.verl.losses import register

    made, logits = rows(2, topk=False), student(2)
    if "reweighted" not in losses.DISTILLATION_LOSS_REGISTRY:
        register("sampled_token", mode="reweighted", ratio="token")
    loss, _ = through_verl(losses, "reweighted", made, logits)
    credit = credit_by_hand(made, 0.0)
    total = torch.zeros(())
    for i, row in enumerate(made):
        ratio = (row["old_log_probs"] - row["rollout_log_probs"]).exp()
        total = total + (ratio * credit[i] * sampled_logp(made, logits, i)).sum() / TOTAL
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)


@pytest.mark.verl
def test_a_sequence_ratio_counts_what_a_rule_took_out(losses: Any) -> None:
    """But not a tool's text, whose log-probability verl writes as 0."""
    from opd.integrations.verl.losses import register

    made, logits = rows(2, topk=False), student(2)
    made[1]["rollout_log_probs"][1] = 0.0
    if "prefixes" not in losses.DISTILLATION_LOSS_REGISTRY:
        register("sampled_token", mode="prefixes", gamma=0.5, ratio="sequence")
    loss, _ = through_verl(losses, "prefixes", made, logits)
    credit = credit_by_hand(made, 0.5)
    total = torch.zeros(())
    for i, row in enumerate(made):
        away = sum(
            float(row["old_log_probs"][t] - row["rollout_log_probs"][t])
            for t in range(len(row["responses"]))
            if row["rollout_log_probs"][t] != 0
        )
        total = total + math.exp(away) * (credit[i] * sampled_logp(made, logits, i)).sum() / TOTAL
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)


def test_sampled_tokens_of_verl_are_told_from_a_tools_text() -> None:
    mask = torch.tensor([[True, False, False, True], [True, True, False, False]])
    logp = torch.tensor([[-0.5, -0.2, 0.0, 0.0], [-1.0, 0.0, 0.0, -0.1]])
    told = sampled_tokens(mask, logp)
    assert told.tolist() == [[True, True, False, True], [True, True, False, True]]
    assert sampled_tokens(mask, None) is mask


@pytest.mark.verl
@pytest.mark.parametrize("mode", ["k2", "k3"])
def test_estimators_that_verl_has_too_are_equal(losses: Any, mode: str) -> None:
    made, logits = rows(3, topk=False), student(3)
    ours, _ = through_verl(losses, f"opdlab_{mode}", made, logits)
    theirs, _ = through_verl(losses, mode, made, [x * 1 for x in logits])
    # verl clamps k3 at 10, so compare where no token gets there
    values = [float(x.detach()) for x in (ours, theirs)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    torch.testing.assert_close(gradients(ours, logits), gradients(theirs, logits))


@pytest.mark.verl
def test_forward_kl_on_the_support_is_verls(losses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of our objectives, but the same way of verl's tensors ends in the same numbers."""
    monkeypatch.setitem(
        TOPK,
        "opdlab_teacher_topk",
        local("teacher", Form(surrogate=lambda at: forward_kl(*pair(at)))),
    )
    made, logits = rows(4, topk=True), student(4)
    ours, mine = through_verl(losses, "opdlab_teacher_topk", made, logits)
    theirs, verls = through_verl(losses, "forward_kl_topk", made, [x * 1 for x in logits])
    assert float(verls["distillation/loss_min"].aggregate()) > 0, "no token is clamped at 0"
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    torch.testing.assert_close(gradients(ours, logits), gradients(theirs, logits))
    assert mine["divergence/topk_student_mass"].aggregate() == pytest.approx(
        float(verls["distillation/student_mass"]), rel=1e-5
    )


@pytest.mark.verl
def test_the_clipped_objective_is_verls_k1_under_its_policy_gradient(losses: Any) -> None:
    """Both make the cost of the tokens an advantage under PPO's clip; verl's is of the student now,
    ours of the student when it was scored, so that they are one where nothing has moved yet."""
    made, logits = rows(5, topk=False), student(5)
    for i, row in enumerate(made):
        row["old_log_probs"] = sampled_logp(made, logits, i).detach()
    theirs, _ = through_verl(losses, "k1", made, logits, use_policy_gradient=True)
    for mode in ("opdlab_sampled_token_clipped", "opdlab_sampled_token"):
        ours, _ = through_verl(losses, mode, made, logits)
        torch.testing.assert_close(gradients(ours, logits), gradients(theirs, logits))


@pytest.mark.verl
def test_what_would_be_wrong_in_verl_is_refused(losses: Any) -> None:
    from verl.workers.config import DistillationLossConfig

    from opd.integrations.verl.losses import register

    made, logits = rows(6, topk=False), student(6)
    mode = "opdlab_sampled_token"
    with pytest.raises(ValueError, match="use_policy_gradient is True"):
        through_verl(losses, mode, made, logits, use_policy_gradient=True)
    with pytest.raises(ValueError, match="loss_max_clamp is 10"):
        through_verl(losses, mode, made, logits, loss_max_clamp=10.0)
    with pytest.raises(ValueError, match="log-normaliser's gradient"):
        through_verl(
            losses,
            "opdlab_teacher_topk_bucket",
            rows(6, topk=True),
            logits,
            use_policy_gradient=True,
        )
    made[2]["teacher_ids"] = (made[2]["teacher_ids"] + 1) % VOCABULARY
    with pytest.raises(ValueError, match=r"other ids than the student's at 2 of 12"):
        through_verl(losses, mode, made, logits)
    refused = DistillationLossConfig(loss_mode="opdlab_student_topk").loss_settings
    with pytest.raises(ValueError, match="not the log-probabilities of the student's ids"):
        _ = refused.use_topk
    collapsing = DistillationLossConfig(loss_mode="opdlab_teacher_topk_unnormalised").loss_settings
    with pytest.raises(ValueError, match="collapses"):
        _ = collapsing.use_topk
    with pytest.raises(ValueError, match="needs the whole step"):
        register("sampled_token", mode="b", gamma=1.0, baseline="leave_one_out")
    with pytest.raises(ValueError, match="ratio 'sequence' is not known"):
        register("teacher_topk", mode="b", ratio="sequence")
    with pytest.raises(ValueError, match="use_task_rewards"):
        register("sampled_token", mode="b", reward_weight=1.0)
