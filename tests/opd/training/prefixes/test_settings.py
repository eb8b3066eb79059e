"""Which settings of prefixes are refused, and what rows and alarms they leave out."""

import json
from pathlib import Path
from typing import Any

import pytest

from diagnostics.alarms.rules import RULES
from diagnostics.errors import InvalidInput
from opd.config.prefixes import parse_prefixes
from opd.config.settings import Config
from opd.objectives.factory import OBJECTIVES
from opd.runs.alarm_rules import rules_of
from opd.training.setup import panel_of
from opd.training.train import train
from opd.training.validation import validate
from tests.helpers.runs import settings


def config_of(tiny_pair: tuple[Path, Path], **changes: object) -> Config:
    return settings(tiny_pair, Path("unused"), **changes)


def problems_of(tiny_pair: tuple[Path, Path], **changes: object) -> str:
    return " ".join(validate(config_of(tiny_pair, **changes)))


GIVEN = {"prefixes": "dataset", "group_size": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefixes": "mixed:2"}, "must lie in [0, 1]"),
        ({**GIVEN, "objective": "sampled_token"}, "have no importance ratio"),
        ({**GIVEN, "objective": "sampled_token", "ratio": "token"}, "the sampler is not known"),
        ({**GIVEN, "objective": "k2"}, "takes each token as a sample of the student"),
        ({**GIVEN, "objective": "full_reverse_kl", "gamma": 0.5}, "later costs or the reward"),
        ({**GIVEN, "reward_weight": 1.0, "group_size": 2}, "later costs or the reward"),
        ({"prefixes": "mixed:0.5:dataset", "objective": "k3"}, "have no importance ratio"),
        ({"prefixes": "teacher", "objective": "sampled_token"}, "set ratio to token or sequence"),
        (
            {"prefixes": "teacher", "objective": "sampled_token", "ratio": "token", "gamma": 1.0},
            "set ratio to sequence",
        ),
        ({"prefixes": "replay:1", "objective": "sampled_token"}, "set ratio to token or sequence"),
        ({"objective": "negative_log_likelihood"}, "its mean gradient is zero"),
        (
            {"objective": "negative_log_likelihood", "prefixes": "mixed:0.5"},
            "its mean gradient is zero",
        ),
        ({"prefixes": "dataset"}, "group would be copies of it; set group_size to 1"),
        ({**GIVEN, "task": "env:household"}, "is a game"),
        ({"prefixes": "teacher", "teacher": "http://h:1/v1"}, "cannot be sampled from"),
        ({"prefixes": "teacher", "teacher": "none"}, "cannot be sampled from"),
        (
            {
                "prefixes": "replay:1",
                "rollout_lag": 1,
                "engine": "servers",
                "rollout_servers": ("http://h:1/v1",),
            },
            "set rollout_lag to 0",
        ),
        (
            {"prefixes": "teacher", "objective": "negative_log_likelihood", "teacher": "ema"},
            "starts as a copy of the student, so the divergence and its gradient are zero",
        ),
        ({"response_column": "text"}, "only if prefixes is dataset"),
        ({"objective": "reward_only"}, "reward_weight is 0"),
        ({"teacher": "none"}, "objective teacher_topk with baseline none reads one"),
        (
            {"teacher": "none", "objective": "reward_only", "reward_weight": 1.0, "probe_every": 1},
            "probe_every 1 compares",
        ),
        ({"teacher": "none", "objective": "k2"}, "objective k2 with baseline none reads one"),
        (
            {
                "teacher": "none",
                "objective": "reward_only",
                "reward_weight": 1.0,
                "map_eos": True,
                "entropy_top_fraction": 0.5,
            },
            "map_eos reads its EOS ids",
        ),
    ],
)
def test_combinations_that_are_refused(tiny_pair, changes: dict[str, Any], message: str) -> None:
    assert message in problems_of(tiny_pair, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {**GIVEN, "objective": "negative_log_likelihood"},
        {
            "prefixes": "teacher",
            "objective": "negative_log_likelihood",
            "teacher": "base",
            "lora_rank": 2,
            "teacher_system": "Know all.",
        },
        {"prefixes": "teacher", "objective": "sampled_token", "ratio": "sequence", "gamma": 1.0},
        {"prefixes": "mixed:0.5", "objective": "k2", "ratio": "token"},
        {**GIVEN, "objective": "sampled_token", "allow_unweighted": True},
        {"prefixes": "replay:2", "objective": "teacher_topk"},
        {"prefixes": "replay:2", "objective": "sampled_token", "ratio": "token", "gamma": 0.5},
        *({**GIVEN, "objective": name} for name in ("full_forward_kl", "union_topk", "full_jsd")),
        {"teacher": "none", "objective": "reward_only", "reward_weight": 1.0, "temperature": 0.7},
        {**GIVEN, "objective": "negative_log_likelihood", "teacher": "none"},
    ],
)
def test_combinations_that_are_valid(tiny_pair, changes: dict[str, Any]) -> None:
    assert problems_of(tiny_pair, **changes) == ""


def test_rows_without_a_response_are_named(tiny_pair, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": f"p{i}", "answer": "1", "response": "r"} for i in range(12)]
    del lines[3]["response"]
    lines[7]["response"] = " "
    path.write_text("\n".join(map(json.dumps, lines)))
    config = settings(
        tiny_pair,
        tmp_path / "run",
        prefixes="dataset",
        objective="negative_log_likelihood",
        group_size=1,
        task=str(path),
        grader="exact",
    )
    with pytest.raises(InvalidInput, match=r"row 3 lacks the response .*row 7 has an empty"):
        train(config)
    assert {"full_forward_kl", "union_topk", "full_jsd"} <= OBJECTIVES.keys()


def test_alarms_that_would_compare_different_things_are_left_out() -> None:
    def left_out(text: str) -> set[str]:
        names = {rule.name for rule in rules_of(parse_prefixes(text))}
        return {rule.name for rule in RULES} - names

    trends = {rule.name for rule in RULES if rule.num_reference}
    assert left_out("student") == left_out("replay:2") == set()
    assert left_out("teacher") == left_out("mixed:0.5:dataset") == {"drift_k1"}
    assert left_out("mixed:1-0") == trends
    assert "drift_k1" in trends
    assert panel_of(parse_prefixes("mixed:0-1")) == panel_of(parse_prefixes("student"))
    missing = (
        panel_of(parse_prefixes("student")).keys() - panel_of(parse_prefixes("teacher")).keys()
    )
    assert missing == {"martingales", "sampler_ratio"}
