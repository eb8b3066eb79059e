"""The HTML report: its data, embedding and server."""

import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from diagnostics.alarms.alarms import replay
from diagnostics.alarms.rules import RULES
from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.monitor import Monitor
from diagnostics.records import rows, token_text
from diagnostics.records.batch_files import load_batch
from diagnostics.records.row_columns import COLUMNS
from diagnostics.records.token_dumps import save_dump
from diagnostics.terminal import escape_control_chars
from opd.lab.build import make_tokenizer
from opd.report import build, rollout_viewer, run_data, tokenizer_panel
from opd.report.server import HOST, data_version, make_server
from opd.training.train import train
from tests.helpers.paths import ROOT
from tests.helpers.runs import settings

HOSTILE = (
    "</script><script>window.owned=1</script>",
    "<img src=x onerror=window.owned=1>",
    "\u202egnp.exe\u202c",
    "a\u2028b\u2029c",
    "\x00\x1b[31m\x7f\u200b\ufeff",
    "\ud800 lone",
    "{{data}} {{scripts}}",
)


class Scripts(html.parser.HTMLParser):
    """Collects the text of every script of a page, with its type."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "script":
            self.inside = True
            self.found.append((dict(attrs).get("type", ""), ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1] = (self.found[-1][0], self.found[-1][1] + data)


class Attributes(html.parser.HTMLParser):
    """Collects every attribute of a page with its value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found += attrs


def attributes(page: str) -> set[str]:
    parser = Attributes()
    parser.feed(page)
    return {name for name, _ in parser.found}


def links(page: str) -> list[str]:
    parser = Attributes()
    parser.feed(page)
    return [value for name, value in parser.found if name == "href"]


def policy(page: str) -> dict[str, str]:
    """Return the content security policy by directive."""
    text = page.split('http-equiv="Content-Security-Policy" content="')[1].split('"')[0]
    return dict(directive.strip().split(" ", 1) for directive in text.split(";"))


def scripts(page: str) -> list[tuple[str, str]]:
    parser = Scripts()
    parser.feed(page)
    return parser.found


@pytest.fixture(scope="module")
def run(tiny_pair, tmp_path_factory) -> Path:
    """Train a short run that saves the batch of every step."""
    folder = tmp_path_factory.mktemp("report") / "run"
    return train(settings(tiny_pair, folder, steps=3, save_batch_every=1, eval_every=1)).folder


def test_the_page_is_self_contained_and_keeps_its_data(run: Path) -> None:
    data = build.report_data([run])
    page = build.render_page(data)
    page_scripts = scripts(page)
    assert [kind for kind, _ in page_scripts] == ["application/json", "", ""]
    assert json.loads(page_scripts[0][1]) == json.loads(json.dumps(data))
    style = page.split("<style>")[1].split("</style>")[0]
    script_hashes = " ".join(f"'sha256-{build.csp_digest(text)}'" for _, text in page_scripts[1:])
    expected_policy = {
        "default-src": "'none'",
        "script-src": script_hashes,
        "style-src": f"'sha256-{build.csp_digest(style)}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert policy(page) == expected_policy
    assert policy(build.render_page(data, watch=True)) == expected_policy | {
        "connect-src": "'self'"
    }
    assert not {"src", "href", "action", "style"} & (attributes(page) - {"href"})
    assert all(link.startswith("#") for link in links(page))


def test_every_column_of_a_row_is_described(run: Path) -> None:
    batch = load_batch(run / "batches" / "step_000002.safetensors")
    assert isinstance(batch, ScoredRollouts)
    panel_row = Monitor()(2, [batch])
    patterns = [name for names, _ in COLUMNS for name in names.split(", ")]
    row = rows.read_rows(run / "rows.jsonl")[-1]
    other_columns = {name.removesuffix("_se") for name in row if name not in panel_row}
    assert {"loss", "consistency/loss_error", "grading/readable_share"} <= other_columns
    other_columns |= {rule.metric for rule in RULES} - panel_row.keys()
    for name in other_columns:
        assert any(fnmatch(name, pattern) for pattern in patterns), name


def test_hostile_text_is_escaped() -> None:
    data = {"words": list(HOSTILE), "runs": []}
    page = build.render_page(data)
    page_scripts = scripts(page)
    assert len(page_scripts) == 3
    assert json.loads(page_scripts[0][1]) == data
    assert not set("<>&\u2028\u2029") & set(page_scripts[0][1])
    page.encode()  # a lone surrogate must not prevent writing the file
    with pytest.raises(ValueError, match="JSON compliant"):
        build.embed_json({"x": float("nan")})


def test_invisible_characters_are_escaped() -> None:
    for text in HOSTILE:
        assert escape_control_chars(text).isprintable()
    assert escape_control_chars("é漢 a\n\tb") == "é漢 a\n\tb"
    assert escape_control_chars("\u202e\x00\ud800\U000e0001") == "\\u202e\\u0000\\ud800\\U000e0001"
    wild = {"\u202e": ["\x00", (1, float("nan"), float("-inf"), True, None)]}
    assert build.sanitize(wild) == {"\\u202e": ["\\u0000", [1, None, None, True, None]]}


def test_a_hostile_run_folder_is_shown_safely(tmp_path: Path) -> None:
    folder = tmp_path / "run\u202e"
    folder.mkdir()
    config = {"objective": HOSTILE[0], "seed": 0, "steps": 3, "student": HOSTILE[2], "teacher": "t"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.txt").write_bytes(b"commit \xff\x00\nline")
    lines = [
        '{"step": 0, "task": "a\u2028b", "loss": NaN, "divergence/k1": Infinity}',
        '{"step": 1, "task": "a\u2028b", "loss": -Infinity, "divergence/k1": 1.5, '
        '"divergence/k1_se": NaN}',
        json.dumps({"step": 2, "task": "a\u2028b", "loss": 2, "divergence/k1": 1, HOSTILE[1]: 3.0}),
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "lo', "utf-8")
    data = build.report_data([folder])
    page = build.render_page(data)
    assert json.loads(scripts(page)[0][1]) == data
    (run_entry,) = data["runs"]
    assert run_entry["name"] == "run\\u202e"
    assert run_entry["config"]["student"] == escape_control_chars(HOSTILE[2])
    assert run_entry["code"] == "commit \ufffd\\u0000\nline"
    (part,) = run_entry["tasks"]
    assert part["task"] == "a\\u2028b"
    steps, curves = part["steps"], part["curves"]
    assert (steps[curves["loss"][0]], curves["loss"][1]) == ([0, 1, 2], [None, None, 2.0])
    assert curves["divergence/k1"][1:] == [[None, 1.5, 1.0], None]
    assert curves[HOSTILE[1]][1] == [3.0]
    assert {alarm["rule"] for alarm in part["alarms"]} >= {"not_finite"}


def test_curves_alarms_and_accuracy_are_those_of_the_record(run: Path) -> None:
    entry = run_data.run_page_data(run_data.read_run(run))
    run_rows = rows.read_rows(run / "rows.jsonl")
    part = entry["tasks"][0]
    step_list, values, errors = part["curves"]["divergence/k1"]
    assert part["steps"][step_list] == [0, 1, 2]
    for row, value, error in zip(run_rows, values, errors, strict=True):
        assert value == pytest.approx(row["divergence/k1"], rel=1e-4)
        assert error == pytest.approx(row["divergence/k1_se"], rel=1e-4)
    curve_columns = {
        k for row in run_rows for k in row if not set("@%") & set(k) and not k.endswith("_se")
    }
    assert curve_columns - {"step"} - set(part["curves"]) == {
        k
        for k in curve_columns - {"step"}
        if not any(isinstance(row.get(k), int | float) for row in run_rows)
    }
    assert entry["done"] == 3
    assert [x["accuracy"] for x in entry["evals"]] == [
        x["accuracy"] for x in rows.read_rows(run / "evals.jsonl")
    ]


def test_of_rows_with_one_step_the_last_counts(tmp_path: Path) -> None:
    file_rows = [{"step": s, "loss": float(i)} for i, s in enumerate((0, 2, 3, 2, 1))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in file_rows))
    entry = run_data.run_page_data(run_data.read_run(tmp_path))
    part = entry["tasks"][0]
    assert part["steps"] == [[0, 1, 2, 3]]
    assert part["curves"]["loss"] == [0, [0.0, 4.0, 3.0, 2.0], None]
    assert entry["done"] == 4


def test_rows_of_another_trainer_may_have_any_file_name(tmp_path: Path) -> None:
    panel = tmp_path / "panel.jsonl"
    (tmp_path / "evals.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match="nor exactly one other"):
        run_data.read_run(tmp_path)
    panel.write_text('{"step": 3, "loss": 1.5}\n')
    assert run_data.read_run(tmp_path).rows == [{"step": 3, "loss": 1.5}]
    version_before = data_version([tmp_path])
    with open(panel, "a") as file:
        file.write('{"step": 4, "loss": 1.0}\n')
    assert data_version([tmp_path]) != version_before
    (tmp_path / "other.jsonl").write_text('{"step": 9}\n')
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        run_data.read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"pass its folder, {re.escape(str(tmp_path))}$"):
        run_data.read_run(panel)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rows.jsonl").write_text('{"step": 0}\n')
    run = re.escape(str(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match=f"a monitor; it contains run folders: {run}$"):
        run_data.read_run(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"step": 7}\n')
    assert run_data.read_run(tmp_path).rows == [{"step": 7}]


GRADED = {"step": 0, "accuracy": 0.5, "problems": 2, "outcomes": "01"}
IMPOSSIBLE: dict[str, tuple[str, Any, str]] = {
    "text as a metric": (
        "rows.jsonl",
        {"step": 0, "divergence/k1": "x"},
        "row 1, field divergence/k1: 'x'",
    ),
    "list as a loss": (
        "rows.jsonl",
        {"step": 0, "loss": [1]},
        "row 1, field loss: .1. is not a nu",
    ),
    "beyond floats": ("rows.jsonl", {"step": 0, "loss": 10**400}, "row 1, field loss: 1000"),
    "list as a task": (
        "rows.jsonl",
        {"step": 0, "task": [1]},
        "row 1, field task: .1. is not text",
    ),
    "outcomes of another kind": (
        "evals.jsonl",
        GRADED | {"outcomes": "0x"},
        "field outcomes: '0x'",
    ),
    "outcomes of others": (
        "evals.jsonl",
        GRADED | {"outcomes": "011"},
        "'011' does not fit 2 problems",
    ),
    "no problems": ("evals.jsonl", GRADED | {"problems": 0}, "row 1, field problems: 0"),
    "length": ("evals.jsonl", GRADED | {"length": [1]}, "row 1, field length: .1."),
    "tasks": ("config.json", {"tasks": 3}, "field tasks: 3 is not a list"),
    "task": ("config.json", {"tasks": [1]}, r"tasks\[0\]: 1 is not an object"),
    "nameless": ("config.json", {"tasks": [{}]}, r"tasks\[0\]: the field 'name'"),
    "no path": ("config.json", {"student": "a\0"}, "is not a folder or the name of a model"),
    "too long": ("config.json", {"teacher": "a" * 5000}, "is not a folder or the name of a model"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_values_of_a_record_are_named(name: str, tmp_path: Path) -> None:
    settings = {"student": "s", "teacher": "t", "objective": "k3", "seed": 0}
    contents = {
        "config.json": settings,
        "rows.jsonl": {"step": 0, "loss": None},
        "evals.jsonl": GRADED,
    }
    file, changes, message = IMPOSSIBLE[name]
    for path, value in (contents | {file: contents[file] | changes}).items():
        (tmp_path / path).write_text(json.dumps(value) + "\n")
    with pytest.raises(InvalidInput, match=f"{file}.*{message}") as raised:
        run_data.read_run(tmp_path)
    assert len(str(raised.value)) < 400


def test_alarms_are_those_that_a_replay_raises(run: Path) -> None:
    bad = [{"step": s, "loss": None, "repetition/repeated_share": 0.9} for s in range(9)]
    part_entry = run_data.task_page_data("", bad)
    alarms, replayed = part_entry["alarms"], replay(bad)
    assert [(a["rule"], a["step"]) for a in alarms] == [(a.rule.name, a.step) for a in replayed]
    assert [(a["means"], a["remedy"]) for a in alarms] == [
        (a.rule.means, a.rule.remedy) for a in replayed
    ]
    assert {a["rule"] for a in alarms} == {"not_finite", "repetition"}
    assert all(a["on"] for a in alarms)
    watched_rules = {
        rule.name for rule in RULES if rule.metric in ("loss", "repetition/repeated_share")
    }
    assert set(part_entry["unwatched"]) == {rule.name for rule in RULES} - watched_rules
    longer_rows = [
        *bad,
        *({"step": s, "loss": 1.0, "repetition/repeated_share": 0.0} for s in range(9, 20)),
    ]
    assert not any(a["on"] for a in run_data.task_page_data("", longer_rows)["alarms"])


def test_tasks_that_take_turns_have_curves_of_their_own(run: Path) -> None:
    record = run_data.read_run(run)
    alternating_rows = [row | {"task": "ab"[i % 2]} for i, row in enumerate(record.rows)]
    entry = run_data.run_page_data(replace(record, rows=alternating_rows))
    assert [part["task"] for part in entry["tasks"]] == ["a", "b"]
    assert [part["steps"][part["curves"]["loss"][0]] for part in entry["tasks"]] == [[0, 2], [1]]


def test_long_curves_keep_their_ends_extremes_gaps_and_alarms() -> None:
    points = [(i, float((i * 7919) % 2003), None) for i in range(20_000)]
    points[12_345] = (12_345, 1e6, None)
    points[777] = (777, None, None)
    points[9_999] = (9_999, -1e6, None)
    thinned = run_data.thin_points(points, 400, {4_321})
    assert len(thinned) <= 404
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])
    for step in (12_345, 9_999, 777, 4_321):
        assert points[step] in thinned
    assert thinned == sorted(thinned)
    assert run_data.thin_points(points[:100], 100) == points[:100]
    rising_rows = [
        {"step": s, "loss": 1.0, "repetition/repeated_share": s / 4000} for s in range(2000)
    ]
    part_entry = run_data.task_page_data("", rising_rows)
    (alarm,) = part_entry["alarms"]
    assert (
        alarm["step"] in part_entry["steps"][part_entry["curves"]["repetition/repeated_share"][0]]
    )


def test_heat_maps_and_breakdown_are_the_columns_by_position(run: Path) -> None:
    run_rows = rows.read_rows(run / "rows.jsonl")
    part_entry = run_data.task_page_data("", run_rows)
    assert {"divergence/k1", "divergence/reverse_kl", "consistency/z_H"} <= set(part_entry["maps"])
    for name in ("divergence/k1", "consistency/z_H"):
        heat_map = part_entry["maps"][name]
        assert heat_map["steps"] == [0, 1, 2]
        for i, row in enumerate(run_rows):
            for j, (low, high) in enumerate(heat_map["bins"]):
                value, count = row[f"{name}@{low}-{high}"], row[f"divergence/tokens@{low}-{high}"]
                assert heat_map["values"][i][j] == (
                    None if value is None else pytest.approx(value, 1e-4)
                )
                assert heat_map["tokens"][i][j] == count
    last_breakdown = part_entry["anatomy"]["rows"][-1]
    for k, name in enumerate(run_data.BREAKDOWN_METRICS):
        for j, (low, high) in enumerate(part_entry["anatomy"]["bins"]):
            value = run_rows[-1][f"{name}@{low}-{high}"]
            if value is not None:
                assert last_breakdown["parts"][k][j] == pytest.approx(value, rel=1e-4, abs=1e-9)
    assert run_data.task_page_data("", [*run_rows, {"step": 3}])["maps"] == part_entry["maps"]
    long_rows = [run_rows[i % 3] | {"step": i} for i in range(500)]
    thinned_steps = run_data.heat_maps(long_rows, run_data.position_bins(long_rows), 50)[
        "divergence/k1"
    ]["steps"]
    assert (len(thinned_steps), thinned_steps[0], thinned_steps[-1]) == (50, 0, 499)


def test_viewer_data_equals_the_batch(run: Path) -> None:
    data = rollout_viewer.viewer_data(run_data.read_run(run), tokens=10_000)
    batch = load_batch(run / "batches" / "step_000001.safetensors")
    assert isinstance(batch, ScoredRollouts)
    assert batch.support is not None
    assert batch.prefix is not None
    batch_entries = [roll for roll in data["rollouts"] if roll["step"] == 1]
    assert [roll["row"] for roll in batch_entries] == list(range(len(batch)))
    for roll in batch_entries:
        i, n = roll["row"], len(roll["ids"])
        is_supervised = batch.mask[i]
        assert (roll["prompt"], roll["turn"]) == (int(batch.prompt[i]), int(batch.turn[i]))
        assert n == int(is_supervised.nonzero()[-1]) + 1
        assert roll["ids"] == batch.tokens[i, :n].tolist()
        assert roll["off"] == [k for k in range(n) if not is_supervised[k]]
        assert [x / 100 for x in roll["s"]] == close(batch.student_logp[i, :n])
        assert [x / 100 for x in roll["t"]] == close(batch.teacher_logp[i, :n])
        inside = batch.support.contains(batch.tokens)[i, :n]
        assert roll["in"] == "".join("1" if x else "0" for x in inside)
        assert roll["rank"] == batch.prefix.teacher_rank[i, :n].tolist()
        p = batch.student_logp[i, :n].exp()
        energy = batch.log_ratio[i, :n] ** 2 * (1 - 2 * p + batch.prefix.collision[i, :n])
        assert [x / 100 for x in roll["e"]] == close(energy.sqrt())
        for shown_masses, masses in zip(roll["mass"], batch.support.masses(), strict=True):
            assert [x / 1e4 for x in shown_masses] == pytest.approx(
                masses[i, :n].tolist(), abs=6e-5
            )
        assert (roll["source"], roll["k"]) == (batch.support.source, batch.support.k)
        for k in range(n):
            check_tops(batch, i, k, roll["tops"][k])
    assert all(str(i) in data["texts"] for roll in batch_entries for i in roll["ids"])
    assert [batch_entry["step"] for batch_entry in data["saved"]] == [0, 1, 2]


def close(x: torch.Tensor) -> Any:
    return pytest.approx(x.tolist(), abs=0.0051)


def check_tops(batch: ScoredRollouts, i: int, k: int, shown_values: list[int]) -> None:
    """Compare with a loop: five likeliest ids of each model above 0.1 %, sorted by the teacher."""
    support = batch.support
    assert support is not None
    table = [
        (int(v), float(s), float(t))
        for v, s, t in zip(
            support.ids[i, k], support.student_logp[i, k], support.teacher_logp[i, k], strict=True
        )
    ]
    expected_ids = {
        row[0]
        for column in (1, 2)
        for row in sorted(table, key=lambda row: -row[column])[: rollout_viewer.TOP_IDS]
        if math.exp(row[column]) >= rollout_viewer.MIN_PROBABILITY
    }
    shown_rows = [shown_values[j : j + 3] for j in range(0, len(shown_values), 3)]
    assert {row[0] for row in shown_rows} == expected_ids
    assert [row[2] for row in shown_rows] == sorted((row[2] for row in shown_rows), reverse=True)
    exact = {v: (s, t) for v, s, t in table}
    for v, s, t in shown_rows:
        assert (s / 100, t / 100) == pytest.approx(exact[v], abs=0.0051)


def test_ids_that_are_absent_or_masked_are_not_shown_as_likely(run: Path) -> None:
    batch = load_batch(run / "batches" / "step_000001.safetensors")
    assert isinstance(batch, ScoredRollouts)
    assert batch.support is not None
    present = (torch.arange(batch.support.k) > 0).expand(batch.support.ids.shape)
    reduced_support = replace(batch.support, present=present)
    mask_with_gap = batch.mask.clone()
    mask_with_gap[:, 1] = False
    changed_batch = replace(batch, support=reduced_support, mask=mask_with_gap)
    roll = rollout_viewer.rollout_entry(
        changed_batch, 0, 0, 3, [], token_text.TokenDecoder(), set()
    )
    assert (
        rollout_viewer.rollout_entry(batch, 0, 0, 3, ["math"], token_text.TokenDecoder(), set())[
            "task"
        ]
        == "math"
    )
    first = int(batch.support.ids[0, 0, 0])
    assert first not in roll["tops"][0][::3]
    assert roll["off"] == [1]
    assert roll["tops"][1] == []


def test_likely_ids_do_not_depend_on_the_order_of_the_support(run: Path) -> None:
    batch = load_batch(run / "batches" / "step_000001.safetensors")
    assert isinstance(batch, ScoredRollouts)
    assert batch.support is not None
    order = torch.randperm(batch.support.k, generator=torch.Generator().manual_seed(0))
    permuted = {
        name: getattr(batch.support, name)[..., order]
        for name in ("ids", "student_logp", "teacher_logp")
    }
    changed_batch = replace(batch, support=replace(batch.support, **permuted))
    for i in range(len(batch)):
        assert rollout_viewer.top_tokens(changed_batch, i, 3) == rollout_viewer.top_tokens(
            batch, i, 3
        )


def test_a_dump_is_shown_as_the_batch_that_it_was_made_of(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stranger"
    (folder / "dumps").mkdir(parents=True)
    shutil.copy(run / "rows.jsonl", folder)
    shutil.copytree(run / "final", folder / "final")
    batch = load_batch(run / "batches" / "step_000001.safetensors")
    assert isinstance(batch, ScoredRollouts)
    save_dump(folder / "dumps" / "step_00000001.parquet", batch, 1)
    dump_data = rollout_viewer.viewer_data(run_data.read_run(folder), 10_000)
    batch_data = rollout_viewer.viewer_data(run_data.read_run(run), 10_000)
    expected_rollouts = [
        roll | {"asked": None} for roll in batch_data["rollouts"] if roll["step"] == 1
    ]
    assert dump_data["rollouts"] == expected_rollouts  # a dump has no prompts
    assert build.report_data([folder])["runs"][0]["config"] == {}


def test_attribution_equals_a_count(run: Path) -> None:
    data = rollout_viewer.viewer_data(run_data.read_run(run), tokens=10_000)
    batch = load_batch(run / "batches" / "step_000002.safetensors")
    assert isinstance(batch, ScoredRollouts)
    r, total_signal = batch.log_ratio, float(batch.log_ratio.abs()[batch.mask].sum())
    for row in data["blame"]:
        is_this_id = batch.mask & (batch.tokens == row["id"])
        assert row["count"] == int(is_this_id.sum())
        assert row["signal"] == pytest.approx(
            float(r.abs()[is_this_id].sum()) / total_signal, abs=1e-5
        )
        assert row["cost"] == pytest.approx(float(r[is_this_id].mean()), abs=1e-3)
    shares = [row["signal"] for row in data["blame"]]
    assert shares == sorted(shares, reverse=True)
    impossible = data["sheet"]["impossible"]
    is_impossible = (
        batch.mask & (batch.student_logp.exp() > 0.9) & (batch.teacher_logp.exp() < 1e-4)
    )
    assert impossible["share"] == pytest.approx(
        float(is_impossible.sum() / batch.mask.sum()), abs=1e-5
    )
    assert sum(row["count"] for row in impossible["rows"]) == int(is_impossible.sum())
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    special = {row["id"]: row for row in data["sheet"]["special"]}
    assert set(special) == {i for i, x in tokenizer.added_tokens_decoder.items() if x.special}
    for i, row in special.items():
        is_this_id = batch.mask & (batch.tokens == i)
        assert row["count"] == int(is_this_id.sum())
        assert row["signal"] == pytest.approx(
            float(r.abs()[is_this_id].sum()) / total_signal, abs=1e-5
        )


def test_impossible_tokens_are_named(run: Path) -> None:
    batch = load_batch(run / "batches" / "step_000002.safetensors")
    assert isinstance(batch, ScoredRollouts)
    student_logp, teacher_logp = batch.student_logp.clone(), batch.teacher_logp.clone()
    student_logp[0, 0], teacher_logp[0, 0] = -0.01, -12.0
    teacher_logp[1, 0] = 0.0  # a negative log ratio, which counts by its absolute value
    changed_batch = replace(batch, student_logp=student_logp, teacher_logp=teacher_logp)
    panel = tokenizer_panel.impossible_ids(changed_batch, set())
    assert {"id": int(batch.tokens[0, 0]), "count": 1, "student": -0.01, "teacher": -12.0} in panel[
        "rows"
    ]
    is_impossible = (student_logp.exp() > 0.9) & (teacher_logp.exp() < 1e-4) & batch.mask
    signal_size = (student_logp - teacher_logp).abs()
    signal = float(signal_size[is_impossible].sum() / signal_size[batch.mask].sum())
    assert panel["signal"] == pytest.approx(signal, abs=1e-5)
    assert panel["share"] == pytest.approx(float(is_impossible.sum() / batch.mask.sum()), abs=1e-5)
    assert panel["ended"] == pytest.approx(float(batch.ended.float().mean()), abs=1e-4)


def test_end_tokens_and_the_doctor_report_are_read(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    student, teacher = folder / "final", tmp_path / "teacher"
    shutil.copytree(student, teacher)
    tokenizer = AutoTokenizer.from_pretrained(student)
    for name in ("generation_config.json", "config.json"):
        model_config = json.loads((student / name).read_text()) if (student / name).exists() else {}
        (student / name).write_text(json.dumps(model_config | {"eos_token_id": [2, 1]}))
        (teacher / name).write_text(json.dumps(model_config | {"eos_token_id": None}))
    config = json.loads((folder / "config.json").read_text())
    changed_config = config | {"student": str(student), "teacher": "teacher"}
    (folder / "config.json").write_text(json.dumps(changed_config))
    item = {"item": "eos", "verdict": "fail", "found": "1 is not 2", "advice": "mend"}
    findings = {"verdict": "fail", "items": [item | {"numbers": {}}]}
    (folder / "doctor.json").write_text(json.dumps(findings))
    panel_of_folder = tokenizer_panel.tokenizer_panel(
        run_data.read_run(folder), token_text.TokenDecoder(), None, set()
    )
    assert [end["role"] for end in panel_of_folder["ends"]] == ["student"]
    assert panel_of_folder["unread"] == [f"teacher: {teacher}"]
    panel = tokenizer_panel.tokenizer_panel(
        run_data.read_run(folder, models=True), token_text.TokenDecoder(), None, set()
    )
    assert panel["unread"] == []
    own_eos = {"own": tokenizer.eos_token}
    assert panel["ends"] == [
        {
            "role": "student",
            "ids": [1, 2],
            "texts": tokenizer.convert_ids_to_tokens([1, 2]),
            **own_eos,
        },
        {
            "role": "teacher",
            "ids": [tokenizer.eos_token_id],
            "texts": [tokenizer.eos_token],
            **own_eos,
        },
    ]
    assert panel["doctor"] == {"verdict": "fail", "items": [item]}
    tasks = [{"name": "a", "teacher": None}, {"name": "b", "teacher": str(student)}]
    (folder / "config.json").write_text(json.dumps(changed_config | {"tasks": tasks}))
    end_tokens = tokenizer_panel.model_eos_tokens(run_data.read_run(folder, models=True))
    assert [(x["role"], x["ids"]) for x in end_tokens] == [
        ("student", [1, 2]),
        ("teacher of a", [tokenizer.eos_token_id]),
        ("teacher of b", [1, 2]),
    ]


def test_end_ids_are_read_from_a_nested_text_config(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    decoder = token_text.load_token_decoder(tmp_path)
    settings = tmp_path / "config.json"
    own_ids = tokenizer_panel.read_eos_ids(tmp_path, decoder)
    settings.write_text('{"text_config": {"eos_token_id": [5, 6]}}')
    assert tokenizer_panel.read_eos_ids(tmp_path, decoder) == sorted({*own_ids, 5, 6})
    for value in ('"5"', "true", "[[1]]", "[1, null]", "1.0"):
        settings.write_text(f'{{"eos_token_id": {value}}}')
        with pytest.raises(
            InvalidInput, match=r"config\.json, field eos_token_id: .* is not an id"
        ):
            tokenizer_panel.read_eos_ids(tmp_path, decoder)


def test_few_tokens_show_the_worst_responses(run: Path) -> None:
    batch = load_batch(run / "batches" / "step_000000.safetensors")
    assert isinstance(batch, ScoredRollouts)
    mean = batch.log_ratio.abs().sum(1) / batch.mask.sum(1)
    worst = int(mean.argmax())
    budget = 3 * int(batch.mask.sum(1)[worst])  # divided among three batches
    data = rollout_viewer.viewer_data(run_data.read_run(run), budget)
    assert worst in [roll["row"] for roll in data["rollouts"] if roll["step"] == 0]
    for step in range(3):
        assert sum(len(r["ids"]) for r in data["rollouts"] if r["step"] == step) <= budget // 3


def test_runs_without_batches_or_rows_are_shown(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "config.json", bare)
    data = build.report_data([bare, run], 120)
    num_tokens = sum(
        len(roll["ids"]) for run_entry in data["runs"] for roll in run_entry["rollouts"]
    )
    assert num_tokens <= 60  # half of the budget
    assert [(run_entry["done"], len(run_entry["rollouts"]) > 0) for run_entry in data["runs"]] == [
        (0, False),
        (3, True),
    ]
    build.render_page(data)
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor rows\.jsonl"):
        build.report_data([tmp_path])
    assert build.folder_labels([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    assert build.folder_labels([tmp_path / "a" / "x", tmp_path / "a" / "y"]) == ["x", "y"]


def test_rows_alone_are_reported_without_torch(run: Path, tmp_path: Path) -> None:
    for name in ("config.json", "rows.jsonl", "evals.jsonl"):
        shutil.copy(run / name, tmp_path)
    program = (
        "import sys; from pathlib import Path; from opd.report import build; "
        "build.render_page(build.report_data([Path(sys.argv[1])])); "
        "sys.exit(1 if {'torch', 'transformers'} & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=ROOT)


@pytest.fixture
def server(run: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "live"
    shutil.copytree(run, folder)
    http_server = make_server([folder], 1000, port=0)
    thread = threading.Thread(target=http_server.serve_forever, daemon=True)
    thread.start()
    yield f"http://{HOST}:{http_server.server_address[1]}", folder
    http_server.shutdown()
    http_server.server_close()


def get(address: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
        return answer.read().decode()


def test_the_server_serves_updates_to_this_machine_only(server: tuple[str, Path]) -> None:
    address, folder = server
    assert address.startswith("http://127.0.0.1:")
    version_before, data = get(address + "/version"), json.loads(get(address + "/data"))
    assert data["runs"][0]["done"] == 3
    assert get(address + "/version") == version_before
    row = rows.read_rows(folder / "rows.jsonl")[-1]
    rows.append_row(folder / "rows.jsonl", row | {"step": 3})
    assert get(address + "/version") != version_before
    assert json.loads(get(address + "/data"))["runs"][0]["done"] == 4
    assert "connect-src 'self'" in get(address + "/")
    for path, headers in (("/../config.json", {}), ("/data", {"Host": "evil.example"})):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(address + path, **headers)


def test_the_server_reports_an_unreadable_record_and_continues(server: tuple[str, Path]) -> None:
    address, folder = server
    rows_text = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text("{broken\n" + rows_text)
    with pytest.raises(urllib.error.HTTPError, match="503") as raised:
        get(address + "/data")
    assert "rows.jsonl line 1 is not JSON" in raised.value.read().decode()
    (folder / "rows.jsonl").write_text(rows_text)
    assert json.loads(get(address + "/data"))["runs"][0]["done"] == 3


def test_files_outside_the_run_folder_are_not_read(run: Path, tmp_path: Path) -> None:
    """Absolute and relative paths and symbolic links: only --models follows them."""
    secret = tmp_path / "secret"
    shutil.copytree(run / "final", secret)
    tokenizer = json.loads((secret / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "THE SECRET"
    (secret / "tokenizer.json").write_text(json.dumps(tokenizer))
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "tokenizer")
    config = json.loads((folder / "config.json").read_text())
    for name in (str(secret), "../secret", "link"):
        (folder / "config.json").write_text(json.dumps(config | {"student": name, "teacher": name}))
        if name == "link":
            (folder / "link").symlink_to(secret)
        data = build.report_data([folder])
        assert "THE SECRET" not in json.dumps(data)
        assert [text.split(":")[0] for text in data["runs"][0]["sheet"]["unread"]] == [
            "student",
            "teacher",
        ]
    (folder / "config.json").write_text(json.dumps(config | {"student": str(secret)}))
    assert "THE SECRET" in json.dumps(build.report_data([folder], models=True))
    batch_paths = sorted((folder / "batches").glob("*.safetensors"))
    batch_paths[0].rename(tmp_path / "elsewhere.safetensors")
    batch_paths[0].symlink_to(tmp_path / "elsewhere.safetensors")
    steps = [x["step"] for x in build.report_data([folder])["runs"][0]["saved"]]
    assert (
        steps
        == [x["step"] for x in build.report_data([folder], models=True)["runs"][0]["saved"]][1:]
    )
    (folder / "code.txt").unlink()
    (folder / "code.txt").symlink_to(secret / "tokenizer.json")
    with pytest.raises(ValueError, match=r"code.txt is a link to .*secret.tokenizer.json, outside"):
        build.report_data([folder])


def test_truncated_rows_are_noted(server: tuple[str, Path]) -> None:
    """A truncated row causes a note."""
    address, folder = server
    with open(folder / "rows.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert json.loads(get(address + "/data"))["runs"][0]["notes"] == [
        "rows.jsonl line 4 is truncated and was skipped"
    ]


def test_rollouts_show_their_prompts(run: Path) -> None:
    data = rollout_viewer.viewer_data(run_data.read_run(run), tokens=10_000)
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    file = run / "batches" / "step_000001.prompts.json"
    texts = json.loads(file.read_text())
    assert len(texts) == len(load_batch(run / "batches" / "step_000001.safetensors"))
    for roll in data["rollouts"]:
        if roll["step"] == 1:
            assert roll["asked"] == texts[roll["row"]]
            assert tokenizer.eos_token in roll["asked"] or "user" in roll["asked"]
