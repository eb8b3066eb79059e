"""Masks, padding and joint prompt-response ids of other trainers are parsed or rejected by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.errors import InvalidInput
from diagnostics.metrics.topk import top_k_list
from diagnostics.monitor import Monitor
from diagnostics.records.columns import parse_record
from diagnostics.records.reader import Records
from diagnostics.records.writer import save_records

STUDENT, TEACHER = [-1.0, -2.0, -4.0], [-0.5, -3.0, -1.0]
"""Costs -0.5, 1, -3."""
PLAIN = {"tokens": [5, 6, 7], "student_logp": STUDENT, "teacher_logp": TEACHER, "prompt": 1}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def record(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in (PLAIN | changes).items() if v is not ...}


def mean_cost(path: Path) -> float:
    return Monitor()(0, Records(path))["divergence/k1"]


PADDED = {
    "tokens": [5, 6, 7, 0, 0],
    "student_logp": [*STUDENT, 0, 0],
    "teacher_logp": [*TEACHER, 0, 0],
}
FORMATS = {
    # name: (row, prompt without padding or None, response, its supervised positions)
    "TRL": (
        record(
            tokens=...,
            prompt_ids=[0, 0, 8, 9],
            prompt_mask=[0, 0, 1, 1],
            completion_ids=[5, 6, 7, 0, 0],
            completion_mask=[1, 1, 1, 0, 0],
            tool_mask=[1, 0, 1, 1, 1],
            student_logp=...,
            old_per_token_logps=[*STUDENT, 0, 0],
            teacher_logp=[*TEACHER, 0, 0],
        ),
        [8, 9],
        [5, 6, 7, 0, 0],
        [0, 2],
    ),
    "verl": (
        record(
            tokens=...,
            input_ids=[0, 8, 9, 5, 6, 7, 0],
            attention_mask=[0, 1, 1, 1, 1, 1, 0],
            position_ids=[0, 0, 1, 2, 3, 4, 5],
            responses=[5, 6, 7, 0],
            response_mask=[1, 1, 0, 0],
            student_logp=...,
            old_log_probs=[*STUDENT, 0],
            teacher_logp=[*TEACHER, 0],
            token_level_scores=[0, 0, 1, 0],
        ),
        [8, 9],
        [5, 6, 7, 0],
        [0, 1],
    ),
    "slime": (
        record(tokens=[8, 9, 5, 6, 7], response_length=3, loss_mask=[0, 1, 1], status="completed"),
        [8, 9],
        [5, 6, 7],
        [1, 2],
    ),
    "slime without prompt": (record(response_length=3), [], [5, 6, 7], [0, 1, 2]),
    "slime removed": (record(response_length=3, remove_sample=True), [], [5, 6, 7], []),
    "OpenRLHF": (
        record(
            tokens=...,
            sequences=[0, 8, 9, 5, 6, 7],
            response_length=3,
            attention_mask=[0, 1, 1, 1, 1, 1],
            action_mask=[1, 1, 0],
            student_logp=...,
            action_log_probs=STUDENT,
            teacher_logp=...,
            base_action_log_probs=TEACHER,
        ),
        [8, 9],
        [5, 6, 7],
        [0, 1],
    ),
    "SkyRL": (
        record(
            tokens=...,
            prompt_token_ids=[8, 9],
            response_ids=[5, 6, 7],
            loss_mask=[1, 0, 1],
            rollout_logprobs=STUDENT,
        ),
        [8, 9],
        [5, 6, 7],
        [0, 2],
    ),
    "whole mask": (
        record(prompt_tokens=[8, 9], token_loss_mask=[0, 0, 1, 0, 1]),
        [8, 9],
        [5, 6, 7],
        [0, 2],
    ),
    "padding by attention alone": (
        record(**PADDED, attention_mask=[1, 1, 1, 0, 0]),
        None,
        [5, 6, 7, 0, 0],
        [0, 1, 2],
    ),
    "loss and response": (
        record(loss_mask=[1, 1, 0], response_mask=[0, 1, 1]),
        None,
        [5, 6, 7],
        [1],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_ids_and_masks_of_trainers_are_understood(name: str, tmp_path: Path) -> None:
    raw, prompt, response, places = FORMATS[name]
    row = parse_record(raw, "here")
    assert row["tokens"].tolist() == response
    assert row["mask"].nonzero()[0].tolist() == places
    assert (row["prompt_tokens"].tolist() if "prompt_tokens" in row else None) == prompt
    if places:
        costs = [a - b for a, b in zip(STUDENT, TEACHER, strict=True)]
        expected = sum(costs[t] for t in places) / len(places)
        assert mean_cost(write_lines(tmp_path / "r.jsonl", [raw])) == pytest.approx(expected)


def test_what_was_sampled_and_is_not_supervised_keeps_its_numbers(tmp_path: Path) -> None:
    raw = record(loss_mask=[1, 1, 0], response_mask=[0, 1, 1], sampler_logp=[None, -2.5, -4.5])
    (batch,) = Records(write_lines(tmp_path / "r.jsonl", [raw]))
    assert batch.mask.tolist() == [[False, True, False]]
    assert batch.sampled.tolist() == [[False, True, True]]
    assert batch.student_logp.tolist() == [[0.0, -2.0, -4.0]]
    assert batch.sampler_logp.tolist() == [[0.0, -2.5, -4.5]]
    save_records(tmp_path / "again.jsonl", [batch])
    (reread,) = Records(tmp_path / "again.jsonl")
    for name in ("mask", "sampled", "student_logp", "teacher_logp", "sampler_logp"):
        assert getattr(reread, name).tolist() == getattr(batch, name).tolist(), name


REFUSED = {
    "unknown mask": (
        {"assistant_masks": [1, 0, 1]},
        "column 'assistant_masks' has a name like a mask",
    ),
    "mask of another length": ({"my_mask": [1, 0]}, "column 'my_mask' has a name like a mask"),
    "mask of the sample": ({"sample_mask": 0.0}, "column 'sample_mask' has a name like a mask"),
    "unnamed mask": ({"keep": [True, False, True]}, "column 'keep' holds only 0 and 1"),
    "unnamed mask of floats": ({"weights": [1.0, 0.0, 1.0]}, "column 'weights' holds only 0 and 1"),
    "unnamed mask of all ids": (
        {"prompt_tokens": [8, 9], "trained": [0, 0, 1, 1, 0]},
        "column 'trained' holds only 0 and 1",
    ),
    "labels": ({"labels": [-100, 6, 7]}, "column 'labels' holds -100, which marks"),
    "weights": ({"token_weights": [1.0, 0.5, 0]}, "'token_weights' has a name like token weights"),
    "digits": ({"generation_mask": "101"}, "column 'generation_mask' has a name like a mask"),
    "within an object": ({"extra": {"keep": [1, 0, 1]}}, "column 'extra.keep' holds only 0 and 1"),
    "deep in objects": (
        {"info": {"rollout": {"loss_mask": [1, 1, 0]}}},
        "column 'info.rollout.loss_mask' has a name like a mask",
    ),
    "padding": (
        {"student_logp": [-1, 0, 0], "teacher_logp": [-1, 0, 0], "tokens": [5, 0, 0]},
        "the last 2 tokens have id 0 and log-probability 0 of both models",
    ),
    "padding after an end": (
        {
            "tokens": [5, 2, 2, 2],
            "student_logp": [-1, -0.1, 0, 0],
            "teacher_logp": [-1, -0.2, 0.0, 0],
            "finish_reason": "stop",
        },
        "the last 2 tokens have id 2",
    ),
    "two loss masks": ({"mask": [1, 1, 1], "loss_mask": [1, 0, 1]}, "both mean mask"),
    "short": ({"response_mask": [1, 0]}, "field response_mask: 2 values, tokens has 3"),
    "attention": ({"attention_mask": [1] * 4}, "field attention_mask: 4 values, tokens has 3"),
    "two": ({"completion_mask": [1, 2, 0]}, "field completion_mask: .* holds values other than"),
    "prompt length": (
        {"prompt_tokens": [8, 9], "prompt_mask": [1]},
        "field prompt_mask: 1 values, prompt_tokens has 2",
    ),
    "no prompt": (
        {"prompt_tokens": [8, 9], "prompt_mask": [0, 0]},
        "prompt_mask: all tokens of the prompt are padding",
    ),
    "hole in the prompt": (
        {"prompt_tokens": [8, 9, 4], "prompt_mask": [1, 0, 1]},
        "prompt_mask: 0 between two 1",
    ),
    "length": ({"response_length": 4}, "response_length: 4, expected an integer from 0 to 3"),
    "length false": ({"response_length": False}, "response_length: False, expected"),
    "sequence alone": ({"tokens": ..., "input_ids": [8, 9, 5]}, "add response_length"),
    "sequence of another": ({"input_ids": [8, 5, 6, 4]}, "field tokens: .5, 6, 7. differs from"),
    "whole log-probs": ({"tokens": [8, 9, 5, 6], "response_length": 2}, "3 values, tokens has 2"),
    "without length": (
        {"tokens": [8, 9, 5, 6, 7]},
        "tokens has 5 .*add response_length",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_be_a_mask_is_never_dropped(name: str, tmp_path: Path) -> None:
    changes, pattern = REFUSED[name]
    path = write_lines(tmp_path / "r.jsonl", [record(**changes)])
    with pytest.raises(InvalidInput, match=f"r.jsonl row 1.*{pattern}"):
        list(Records(path))


NO_PADDING: dict[str, dict[str, Any]] = {
    "marked": {"tokens": [5, 0, 0], "response_mask": [1, 0, 0]},
    "one certain end": {"tokens": [5, 6, 2], "student_logp": [-1, -1, 0]},
    "a loop": {"tokens": [5, 7, 7], "finish_reason": "length"},
    "other ids": {"tokens": [5, 6, 7]},
    "one model is certain": {"tokens": [5, 0, 0], "teacher_logp": [-1, -1e-7, -1e-7]},
    "numbers of an object": {"tokens": [5, 6, 7], "usage": {"masked": 1, "values": [1, 0]}},
}


@pytest.mark.parametrize("name", NO_PADDING)
def test_what_is_no_padding_is_read(name: str, tmp_path: Path) -> None:
    row = record(student_logp=[-1, 0, 0], teacher_logp=[-1, 0, 0]) | NO_PADDING[name]
    (batch,) = Records(write_lines(tmp_path / "r.jsonl", [row]))
    assert batch.sampled.sum() == (1 if name == "marked" else 3)


def test_a_mask_within_an_object_can_be_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", [record(extra={"keep": [1, 0, 1]})])
    (batch,) = Records(path, rename={"extra.keep": "mask"})
    assert batch.mask.tolist() == [[True, False, True]]


def test_a_mask_that_only_a_later_row_has_is_refused(tmp_path: Path) -> None:
    rows = [record(keep=[0.5, 0.5, 1]), record(keep=[0, 1, 1])]
    with pytest.raises(InvalidInput, match="row 2: the unknown column 'keep' holds only 0 and 1"):
        list(Records(write_lines(tmp_path / "r.jsonl", rows)))


@pytest.mark.parametrize("sign", [-999.0, -9999, -9999.0, -1e30, -1e9, -3.4e38])
@pytest.mark.parametrize("name", ["student_logp", "teacher_logp", "sampler_logp"])
def test_a_sign_for_no_log_probability_is_no_cost(sign: float, name: str, tmp_path: Path) -> None:
    values = [-1.0, sign, -2.0]
    path = write_lines(tmp_path / "r.jsonl", [record(**{name: values})])
    with pytest.raises(
        InvalidInput, match=rf"row 1, field {name}: .* at position 1 is .* missing log-prob"
    ):
        list(Records(path))
    masked = record(mask=[1, 0, 1], **{name: values})
    (batch,) = Records(write_lines(tmp_path / "r.jsonl", [masked]))
    assert getattr(batch, name).tolist() == [[-1.0, 0.0, -2.0]]


SUPPORT = {"topk_ids": [[5, 1], [6, 2], [7, 3]], "topk_teacher_logp": [[-0.5, -1.0]] * 3}
WRONG = {
    "mass": ({"topk_teacher_logp": [[-0.5, -1.0]] * 2 + [[-0.1, -0.2]]}, "2 sum to 1.724"),
    "twice": ({"topk_ids": [[5, 1], [6, 6], [7, 3]]}, "duplicate id 6 at position 1"),
    "negative": (
        {"topk_ids": [[5, 1], [6, -1], [7, 3]]},
        "support.ids: -1 at position 1 is not an id",
    ),
    "large": (
        {"topk_ids": [[5, 1], [6, 2], [7, 2**40]]},
        "ids: 1099511627776 at position 2 is not",
    ),
    "no id": ({"topk_ids": [[]] * 3, "topk_teacher_logp": [[]] * 3}, "ids: no id at any position"),
    "text": (
        {"student_logp": ["-1.0", "-2", "-4"]},
        "student_logp: .* does not hold numbers only",
    ),
    "nested": ({"student_logp": [[-1.0], [-2.0], [-4.0]]}, "student_logp: .* nested more deeply"),
    "sign": (
        {"topk_teacher_logp": [[-0.5, -9999.0]] * 3},
        "-9999.0 at position 0 is .* missing log-prob",
    ),
    "false in it": ({"topk_teacher_logp": [[-0.5, False]] * 3}, "true or false among the values"),
    "false id": ({"topk_ids": [[5, False], [6, 2], [7, 3]]}, "ids: true or false among the values"),
    "false": ({"student_logp": [-1.0, False, -4.0]}, "student_logp: true or false among"),
    "true id": ({"tokens": [5, True, 7]}, "field tokens: true or false among the values"),
    "huge id": ({"tokens": [5, 2**24, 7]}, "tokens: 16777216 at position 1 is not a token id"),
    "huger id": ({"tokens": [5, 10**30, 7]}, "tokens: 10{30} at position 1 is not a token id"),
    "false temperature": ({"temperature": True}, "field temperature: True is not a number"),
    "temperature": ({"temperature": 0}, "field temperature: 0, expected a number above 0"),
    "top-p": ({"top_p": 1.5}, r"field top_p: 1.5, expected a number in \(0, 1\]"),
    "reward": ({"reward": math.inf}, "field reward: inf is not a number"),
    "huge reward": ({"reward": 10**400}, "field reward: 1000.* is not a number"),
    "reward object": ({"reward": {"acc": 1}}, "field reward: {'acc': 1} is not a number"),
    "task": ({"task": {"a": 1}}, "field task: {'a': 1} is neither a name nor a number"),
    "turn": ({"turn": 1.5}, "field turn: .* integers"),
    "rule": ({"mask_rule": 3}, "field mask_rule: 3 is not text"),
    "abort": ({"finish_reason": "abort"}, "field finish_reason: 'abort' is none of stop"),
    "object": ({"finish_reason": {"type": "abort"}}, "finish_reason: .* is none of stop"),
    "list": ({"finish_reason": ["stop"]}, "field finish_reason: .'stop'. is none of stop"),
    "aborted": ({"response_length": 3, "status": "aborted"}, "field status: 'aborted' is none of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_impossible_values_are_refused_with_their_place(name: str, tmp_path: Path) -> None:
    changes, pattern = WRONG[name]
    path = write_lines(tmp_path / "r.jsonl", [record(**SUPPORT | changes)])
    with pytest.raises(InvalidInput, match=f"r.jsonl row 1, .*{pattern}") as raised:
        list(Records(path))
    assert len(str(raised.value)) < 400


def test_a_rounded_mass_and_slots_that_do_not_count_are_read(tmp_path: Path) -> None:
    rounded = {"topk_teacher_logp": [[math.log(0.502), math.log(0.503)]] * 3}
    (batch,) = Records(write_lines(tmp_path / "r.jsonl", [record(**SUPPORT | rounded)]))
    assert batch.support.masses is not None
    absent = {
        "topk_ids": [[5, 5], [6, 6], [7, 3]],
        "support.present": [[1, 0], [1, 0], [1, 1]],
        "topk_teacher_logp": [[-0.5, -9999.0], [-0.5, None], [-0.5, -1.0]],
        "topk_student_logp": [[-0.5, -9999.0], [-0.5, None], [-0.5, -1.0]],
    }
    (batch,) = Records(write_lines(tmp_path / "r.jsonl", [record(**absent)]))
    expected = [math.exp(-0.5), math.exp(-0.5), math.exp(-0.5) + math.exp(-1)]
    assert batch.support.masses()[1][0].tolist() == pytest.approx(expected)


def test_lists_out_of_order_are_read_as_sorted_ones(tmp_path: Path) -> None:
    """vLLM puts the sampled token first; metrics of smaller K read the first ids."""
    in_order = {
        "topk_ids": [[9, 5, 1], [6, 2, 3], [4, 7, 3]],
        "topk_teacher_logp": [[-0.5, -1.0, -4.0], [-0.6, -2.0, -3.0], [-0.7, -1.5, -5.0]],
        "topk_student_logp": [[-1.0, -0.6, -3.0], [-0.9, -1.0, -2.0], [-0.8, -0.9, -4.0]],
    }
    token_first = {
        "topk_ids": [[5, 9, 1], [6, 2, 3], [7, 4, 3]],
        "topk_teacher_logp": [[-1.0, -0.5, -4.0], [-0.6, -2.0, -3.0], [-1.5, -0.7, -5.0]],
        "topk_student_logp": [[-0.6, -1.0, -3.0], [-0.9, -1.0, -2.0], [-0.9, -0.8, -4.0]],
    }
    for columns in (in_order, token_first):
        (batch,) = Records(write_lines(tmp_path / "r.jsonl", [record(**columns)]))
        assert top_k_list(batch, "teacher").position_of(batch.tokens).tolist() == [[1, 0, 1]]
        expected = torch.tensor([in_order["topk_student_logp"]])
        torch.testing.assert_close(batch.support.student_logp, expected)
    by_student = token_first | {"support.source": "student"}
    (batch,) = Records(write_lines(tmp_path / "r.jsonl", [record(**by_student)]))
    assert batch.support.ids.tolist() == [[[5, 9, 1], [6, 2, 3], [4, 7, 3]]]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", [record()])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(list(Records(path))) == 1


def test_reasons_of_servers_are_read(tmp_path: Path) -> None:
    reasons = ["stop", {"type": "stop", "matched": 2}, {"type": "length", "length": 8}, "length"]
    (batch,) = Records(
        write_lines(tmp_path / "r.jsonl", [record(finish_reason=x) for x in reasons])
    )
    assert batch.ended.tolist() == [True, True, False, False]
    rows = [record(finish_reason="stop"), record(finish_reason=None)]
    with pytest.raises(InvalidInput, match=r"row 2: field ended \(column finish_reason\) is only"):
        list(Records(write_lines(tmp_path / "r.jsonl", rows)))


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    row = {"step": 0} | {f"divergence/column_{i}": 0.1 for i in range(400)}
    with pytest.raises(InvalidInput, match=r"and 389 more; .* see `opd report`") as raised:
        Records(write_lines(tmp_path / "rows.jsonl", [row]))
    assert len(str(raised.value)) < 600


def test_a_long_row_beside_short_ones_is_not_padded_beyond_the_file(tmp_path: Path) -> None:
    def row(i: int, size: int) -> dict[str, Any]:
        return {"tokens": [1] * size, "prompt": i}

    rows = [row(i, 1) for i in range(60)] + [row(60, 500)] + [row(61 + i, 1) for i in range(60)]
    records = Records(write_lines(tmp_path / "r.jsonl", rows), positions=100)
    shapes = [tuple(batch.tokens.shape) for batch in records]
    assert sum(b for b, _ in shapes) == 121
    assert max(b * t for b, t in shapes) <= 16 * 100
