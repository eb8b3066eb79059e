"""The verdict of a file or log, and dumps on the command line."""

import json
import math
from pathlib import Path

import pytest
import torch

from diagnostics.alarms.rules import RULES
from diagnostics.catalogue import PANEL
from diagnostics.monitor import Monitor
from diagnostics.records.writer import save_records
from opd.analysis.verdict import (
    HEADLINES,
    MAX_NAMES,
    NO_COLUMN,
    RUN_ONLY,
    TEXT,
    TREND,
    judge_log,
    judge_row,
)
from opd.cli.diagnose import main
from opd.teachers.pair import load_pair
from tests.helpers.batches import batch
from tests.helpers.dumps.dump_arrays import outside_share, sampled_responses

EXAMPLES = Path(__file__).parents[2] / "diagnostics" / "formats" / "examples"


def test_every_rule_is_applied_or_has_a_reason() -> None:
    row = Monitor()(0, [batch()])
    verdict = judge_row(row)
    reasons = {rule.name: why for why, group in verdict.not_applied.items() for rule in group}
    assert sorted([*verdict.applied, *reasons]) == sorted(rule.name for rule in RULES)
    for rule in RULES:
        if rule.num_reference:
            assert reasons[rule.name] == TREND
        elif math.isfinite(row.get(rule.metric, math.nan)):
            assert rule.name in verdict.applied
        else:
            assert reasons[rule.name] in (NO_COLUMN, RUN_ONLY)
    assert reasons["dead_gradient"] == reasons["loss_sign"] == reasons["teacher_mask"] == RUN_ONLY
    assert reasons["end_renamed"] == NO_COLUMN
    assert verdict.alarms == ()
    text_reasons = judge_row(row, is_text=True).not_applied[TEXT]
    assert {"sampler_mismatch", "teacher_mismatch"} <= {rule.name for rule in text_reasons}


def test_one_reading_far_outside_its_range_is_an_alarm() -> None:
    """A file is a single reading: no persistence is asked for, but the standard error counts."""
    row = {"response/truncated_share": 0.99, "response/truncated_share_se": 0.01}
    assert [a.rule.name for a in judge_row(row).alarms] == ["budget"]
    assert judge_row(row | {"response/truncated_share_se": 0.03}).alarms == ()
    swapped = batch()
    swapped = swapped.with_fields(
        student_logp=swapped.student_logp.roll(1, 1) * swapped.sampled,
        sampler_logp=swapped.sampler_logp,
    )
    names = [a.rule.name for a in judge_row(Monitor()(0, [swapped])).alarms]
    assert {"stale_sampler", "support_values"} <= {*names}


def test_headlines_are_columns_of_the_panel() -> None:
    row = Monitor(PANEL)(0, [batch()])
    assert len(HEADLINES) == 10
    assert {h.column for h in HEADLINES} <= row.keys()
    for (headline, value, error), h in zip(judge_row(row).headlines, HEADLINES, strict=True):
        assert headline is h
        assert value == row[h.column]
        assert error == row.get(f"{h.column}_se", math.nan) or math.isnan(error)


def test_a_log_raises_what_is_in_it() -> None:
    rows = [{"step": i, "loss": 1.0, "grad_norm": 0.0 if i > 2 else 1.0} for i in range(9)]
    verdict = judge_log(rows)
    assert [(a.rule.name, a.step) for a in verdict.alarms] == [("dead_gradient", 5)]
    assert verdict.applied == ("dead_gradient", "not_finite")
    (others,) = verdict.not_applied.values()
    assert len(others) == len(RULES) - 2


def test_the_command_ends_with_a_verdict(tmp_path: Path, capsys) -> None:
    save_records(tmp_path / "r.jsonl", [batch()])
    main([str(tmp_path / "r.jsonl")])
    output = capsys.readouterr().out
    tail = output[output.index(" verdict: no alarm from ") :]
    row = Monitor()(0, [batch()])
    assert "rules not applied, they compare with the first steps of a run: drift_support" in tail
    (line,) = [x for x in tail.splitlines() if "cost per token" in x]
    assert f"{row['divergence/k1']:.4g} ± {row['divergence/k1_se']:.2g}" in line
    assert line.endswith("falls over training")
    assert max(map(len, tail.splitlines())) <= 120
    main([str(tmp_path / "r.jsonl"), "--json"])
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert verdict["alarms"] == {}
    assert "budget" in verdict["applied"]


def test_a_metric_log_on_the_command_line(tmp_path: Path, capsys) -> None:
    lines = [{"step": i, "loss": 1.0, "grad_norm": 0.0} for i in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    main([str(path)])
    output = capsys.readouterr().out
    assert "verdict: 1 alarm from 2 rules (dead_gradient, not_finite)" in output
    assert "ALARM step 2, dead_gradient: the gradient is zero" in output
    assert "drift_k1 (divergence/k1)" in output
    assert f"and {len(RULES) - 2 - MAX_NAMES} more, which --json lists" in " ".join(output.split())
    main([str(path), "--json"])
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert len(verdict["not_applied"]) == len(RULES) - 2
    main([str(path), "--rename", "grad_norm=divergence/k1"])
    assert "from 2 rules (drift_k1, not_finite)" in capsys.readouterr().out
    for words, message in (
        (["--rename", "grads=divergence/k1"], "has no column grads; it has step, loss"),
        (["--rename", "loss=a", "--rename", "grad_norm=b"], r"any of the 2 columns \(a, b\); map"),
        (["--task", "math"], "is a log of metrics, without responses; --student"),
    ):
        with pytest.raises(ValueError, match=message):
            main([str(path), *words])
    with pytest.raises(ValueError, match="no column tokens"):
        main([str(path), "--format", "records"])


def test_a_dump_of_one_model_has_the_numbers_that_need_one(capsys) -> None:
    responses = sampled_responses(tools=False)
    main([str(EXAMPLES / "vllm.jsonl"), "--json"])
    row = json.loads(capsys.readouterr().out)
    assert row["divergence/outside_student_topk"] == pytest.approx(
        outside_share(responses, 3, "student")
    )
    assert row["repetition/repeated_share"] == 0
    main([str(EXAMPLES / "vllm_scored.jsonl"), "--json"])
    row = json.loads(capsys.readouterr().out)
    assert row["divergence/outside_topk"] == pytest.approx(outside_share(responses, 3, "teacher"))
    masses = [torch.tensor(r.teacher).topk(3).values.exp().sum(-1) for r in responses]
    assert row["divergence/topk_teacher_mass"] == pytest.approx(float(torch.cat(masses).mean()))


def dense_cost(pair, rows: list[tuple[list[int], list[int]]]) -> float:
    costs = []
    for prompt, tokens in rows:
        ids = torch.tensor([prompt + tokens])
        with torch.no_grad():
            logits = [
                network(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
                for network in (pair.student.network, pair.teacher.model.network)
            ]
        y = torch.tensor(tokens)[:, None]
        costs.append((logits[0].gather(1, y) - logits[1].gather(1, y))[:, 0])
    return float(torch.cat(costs).mean())


def test_text_is_tokenised_and_scored_where_models_are_given(tiny_pair, capsys) -> None:
    models = ["--student", str(tiny_pair[0]), "--teacher", str(tiny_pair[1]), "--device", "cpu"]
    pair = load_pair(*map(str, tiny_pair), "cpu", "float32")

    def ids(text: str) -> list[int]:
        return pair.tokenizer.encode(text, add_special_tokens=False)

    main([str(EXAMPLES / "verl_text.jsonl"), *models, "--json"])
    output = capsys.readouterr()
    row = json.loads(output.out)
    rows = [(ids("2 3 1"), ids("1 2 3")), (ids("5 4"), ids("4 5"))]
    assert row["divergence/k1"] == pytest.approx(dense_cost(pair, rows), rel=1e-4)
    assert row["response/reward"] == 0.5
    assert "tests of the sampler do not apply" in output.err
    assert "sampler_mismatch" in row["verdict"]["not_applied"]

    import pandas as pd

    table = pd.read_parquet(EXAMPLES / "trl_completions.parquet")
    rows = [
        (
            pair.tokenizer.apply_chat_template(
                [*prompt], add_generation_prompt=True, return_dict=False
            ),
            ids(completion[0]["content"]),
        )
        for prompt, completion in zip(table.prompt, table.completion, strict=True)
    ]
    main([str(EXAMPLES / "trl_completions.parquet"), *models, "--json"])
    row = json.loads(capsys.readouterr().out)
    assert row["divergence/k1"] == pytest.approx(dense_cost(pair, rows), rel=1e-4)
    assert row["response/reward"] == pytest.approx(table.digits.mean())


def test_options_for_dumps(tmp_path: Path, capsys) -> None:
    lines = [json.loads(x) for x in (EXAMPLES / "slime.jsonl").read_text().splitlines()]
    for line in lines:
        line["kd"] = line.pop("teacher_log_probs")
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    main([str(EXAMPLES / "slime.jsonl"), "--json"])
    expected = json.loads(capsys.readouterr().out)["divergence/k1"]
    main([str(path), "--format", "slime", "--rename", "kd=teacher_log_probs", "--json"])
    assert json.loads(capsys.readouterr().out)["divergence/k1"] == expected
    main([str(EXAMPLES / "slime.jsonl"), "--scores", "sampler", "--json"])
    output = capsys.readouterr()
    assert "divergence/k1" not in json.loads(output.out)
    for option, message in (
        (("--rename", "kd"), "expected FIELD=COLUMN"),
        (("--rename", "kd=tokenz"), r"unknown columns \['tokenz'\]"),
        (("--rename", "kd=reward", "--rename", "x=reward"), "a name occurs twice"),
        (("--format", "trll"), "is none of records, vllm"),
    ):
        with pytest.raises(ValueError, match=message):
            main([str(path), *option])
