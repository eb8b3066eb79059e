"""The page of the report: its data, embedding and safety."""

import json
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from diagnostics.alarms.rules import RULES
from diagnostics.batch import ScoredRollouts
from diagnostics.monitor import Monitor
from diagnostics.records import rows
from diagnostics.records.batch_files import load_batch
from diagnostics.records.row_columns import COLUMNS
from diagnostics.terminal import escape_control_chars
from opd.report import build
from tests.helpers.pages import HOSTILE, attributes, links, policy, scripts
from tests.helpers.paths import ROOT


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
