"""Losses that cannot be judged, exit statuses of the command, and its JSON."""

import io
import json
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from diagnostics.errors import InvalidInput
from diagnostics.io.command import run_command
from opd.cli import audit as command_module
from opd.objectives.audit import audit as audit_module
from opd.objectives.audit.audit import audit
from opd.objectives.audit.card import CAVEATS, FAULTS, WARNINGS
from opd.objectives.audit.verdict import same_target
from opd.objectives.user_loss import PARAMETERS
from tests.helpers.warm_process import run_module, run_process

BANK = Path(__file__).parent / "bank"
SCHEMA = {"verdict", "faults", "warnings", "caveats", "target", "noise", "rest", "evidence"}
"""Keys that the card has in any case."""


def raises(student_logits):
    raise ZeroDivisionError("no rows of prompt 3")


def wrong_shape(student_logits, mask):
    return student_logits[mask].log_softmax(-1).sum(-1)


def no_tensor(student_logits):
    return 1.5


def whole_number(tokens, student_logp):
    return tokens.sum()


def changes_its_argument(student_logp, teacher_logp, mask):
    teacher_logp[~mask] = 0.0
    return ((student_logp - teacher_logp) ** 2).sum() / mask.sum()


def changes_the_reward(student_logp, reward, mask):
    reward -= reward.mean()
    return -(reward[:, None] * student_logp)[mask].sum()


def asks_for_unknown(student_logits, advantages, mask):
    return (student_logits.sum(-1) * advantages * mask).sum()


def needs_cuda(student_logits, mask):
    return student_logits.cuda()[mask.cuda()].sum()


def keeps_defaults(student_logits, teacher_logits, mask, advantages=None, *extra, **options):
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)[mask].mean()


def draws_other_tokens(student_logits, teacher_logits, mask):
    """Estimate the reverse KL from several tokens a prefix, so that few calls give its mean."""
    p, q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    drawn = p.detach().exp().flatten(0, 1).multinomial(32, replacement=True)
    drawn = drawn.unflatten(0, mask.shape)
    own, goal = p.gather(-1, drawn), q.gather(-1, drawn)
    return (((own - goal).detach() * own).mean(-1) * mask).sum() / mask.sum()


def returns_nan(student_logp, mask):
    return (student_logp * mask).sum() * float("nan")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (raises, r"raises failed with ZeroDivisionError: no rows of prompt 3"),
        (wrong_shape, r"wrong_shape returned a tensor of shape .*scalar"),
        (no_tensor, r"no_tensor returned a float.*scalar"),
        (whole_number, r"whole_number returned"),
        (changes_its_argument, r"changes_its_argument changes its argument teacher_logp in place"),
        (changes_the_reward, r"changes_the_reward changes its argument reward in place"),
        (needs_cuda, r"needs_cuda failed with .*(CUDA|NVIDIA)"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_loss_that_cannot_be_judged_is_named_with_the_reason(loss, message: str) -> None:
    if loss is needs_cuda and torch.cuda.is_available():
        pytest.skip("CUDA is there")
    with pytest.raises(InvalidInput, match=message):
        audit(loss)


def test_unknown_parameter_is_refused_with_the_known_names() -> None:
    with pytest.raises(InvalidInput, match="asks for advantages") as error:
        audit(asks_for_unknown)
    assert all(name in str(error.value) for name in PARAMETERS)


def test_parameter_with_default_keeps_it() -> None:
    assert audit(keeps_defaults).target.name == "token_reverse_kl"


def test_slow_loss_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(audit_module, "CALL_SECONDS", 0.0)
    with pytest.raises(InvalidInput, match=r"took .* s; an audit needs"):
        audit(keeps_defaults)


def test_random_numbers_are_averaged_and_said() -> None:
    state = torch.random.get_rng_state()
    card = audit(draws_other_tokens)
    assert (card.verdict, card.target.name) == ("ok", "token_reverse_kl")
    assert "random" in card.caveats
    assert torch.equal(state, torch.random.get_rng_state())


def test_nan_is_a_fault() -> None:
    card = audit(returns_nan)
    assert card.verdict == "faulty"
    assert "non_finite" in card.faults


# --- the command --------------------------------------------------------------------------------


def audit_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which spares the start of an interpreter."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            run_command("opd audit", lambda: command_module.main([*arguments]))
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def check_schema(text: str) -> dict:
    card = json.loads(text, parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    assert {*card} >= SCHEMA
    assert card["verdict"] in ("ok", "warn", "faulty")
    for key, known in (("faults", FAULTS), ("warnings", WARNINGS), ("caveats", CAVEATS)):
        assert {*card[key]} <= {*known}
        assert {*card[key]} <= {*card["evidence"]}
    assert {*card["target"]} >= {"name", "cosine", "relative_bias", "scale"}
    if card["noise"] is not None:
        assert {*card["noise"]} >= {"total_variance", "ratio_to_best"}
    return card


def test_status_0_for_a_right_loss() -> None:
    done = audit_here(f"{BANK / 'right.py'}:reverse_kl_token_mean", "--json")
    card = check_schema(done.stdout)
    assert (done.returncode, card["verdict"], card["faults"]) == (0, "ok", [])
    assert card["target"]["cosine"] == pytest.approx(1.0)
    assert card["noise"]["ratio_to_best"] == pytest.approx(1.0)


def test_status_0_for_a_warning_and_a_module() -> None:
    name = "tests.opd.objectives.audit.bank.right_sampled:row_mean_of_scores"
    done = audit_here(name, "--json")
    assert (done.returncode, check_schema(done.stdout)["warnings"]) == (0, ["sequence_mean"])


def test_status_1_for_a_faulty_loss_and_for_a_false_claim(tmp_path: Path) -> None:
    loss = f"{BANK / 'faulty' / 'vanishing.py'}:k1_direct"
    process = run_process(tmp_path, run_module, ["opd.cli.main", "audit", loss, "--json"])
    assert (process.exit_code, check_schema(process.stdout)["faults"]) == (1, ["zero_gradient"])
    loss = f"{BANK / 'right.py'}:k3_direct"
    done = audit_here(loss, "--claims", "token_reverse_kl")
    assert done.returncode == 1
    assert "claimed token_reverse_kl, found token_forward_kl" in done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{Path(__file__)}:wrong_shape", "must return a scalar tensor"),
        (f"{Path(__file__)}:asks_for_unknown", "asks for advantages"),
        (f"{Path(__file__)}:absent", "has no function"),
        ("absent.py:loss", "does not exist"),
        ("absent_module:loss", "cannot be imported"),
    ],
    ids=["vector", "unknown", "function", "file", "module"],
)
def test_status_2_and_one_line_where_nothing_could_be_judged(name: str, message: str) -> None:
    done = audit_here(name, "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def never_ends(student_logp):
    while True:
        try:
            student_logp.sum()
        except Exception:  # a loss that catches everything does not catch the limit
            continue


def test_loss_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_module, "TIME_LIMIT", 1)
    done = audit_here(f"{Path(__file__)}:never_ends")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did not end within 1 s" in done.stderr


@pytest.mark.parametrize("claim", ["token_rkl", "reverse_kl(0.5)", ""])
def test_claim_that_names_no_target_is_refused(claim: str) -> None:
    done = audit_here(f"{BANK / 'right.py'}:reverse_kl_token_mean", "--claims", claim)
    assert done.returncode == 2
    assert "names no target; known: sequence_reverse_kl, token_reverse_kl" in done.stderr


@pytest.mark.parametrize(
    ("claim", "name", "agrees"),
    [
        ("token_jsd(.50)", "token_jsd(0.5)", True),
        ("token_jsd", "token_jsd(0.5)", True),
        ("token_jsd(0.4)", "token_jsd(0.5)", False),
        ("topk_reverse_kl( bucket,teacher )", "topk_reverse_kl(bucket, teacher)", True),
        ("topk_reverse_kl(bucket, student)", "topk_reverse_kl(bucket, teacher)", False),
        ("discounted_reverse_kl(0.9)", "token_jsd(0.9)", False),
    ],
)
def test_claims_are_compared_by_their_parameters(claim: str, name: str, agrees: bool) -> None:
    assert same_target(claim, name) is agrees
