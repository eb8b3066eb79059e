"""`opd map`: which runs it makes, their settings, and that finished runs are kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from diagnostics.errors import InvalidInput, MissingFile, OperationFailed
from diagnostics.records.run_folder import RunFolder
from opd.config.groups import EvalConfig
from opd.data import chain_task, sort_task
from opd.evaluation.folder import evaluate_folder
from opd.experiments.regimes import command
from opd.experiments.regimes.bank import has_collapsed, write_bank
from opd.experiments.regimes.command import MapOptions, cells_to_run, run_all
from opd.experiments.regimes.evaluation import evaluate_cell, evaluate_start
from opd.experiments.regimes.methods import (
    CORE_METHODS,
    MASKED,
    METHODS,
    RunSettings,
    learning_rate,
    train_config,
)
from opd.experiments.regimes.regimes import CENTER, REGIMES
from opd.experiments.regimes.runs import Cell, MapFolder, run_cell
from opd.lab.knobs import knob_problems

RECORD = {
    "knobs": {"second_end": False},
    "limits": {"max_prompt": 40, "max_response": 12},
}


def test_the_knobs_of_every_regime_can_be_built_and_differ_from_the_centre() -> None:
    for name, regime in REGIMES.items():
        assert not knob_problems(regime.knobs), name
        assert name.startswith(regime.family + "-")
        assert (regime.knobs == CENTER) == (name == "density-1")
    assert len({repr(regime.knobs) for regime in REGIMES.values()}) == len(REGIMES)


def test_presets_and_what_replaces_them() -> None:
    small = cells_to_run(MapOptions(preset="small"))
    assert len(small) == len(set(small)) == 3 * 4 * 2
    full = cells_to_run(MapOptions())
    assert len(full) == len(set(full)) == 5 * sum(len(x.methods) for x in REGIMES.values())
    assert {cell.pair for cell in full} == {0, 1, 2, 3, 4}
    chosen = MapOptions(regimes=("ends-1",), methods=("lsm",), pairs=2, first_pair=7)
    assert cells_to_run(chosen) == [Cell("ends-1", "lsm", 7), Cell("ends-1", "lsm", 8)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regimes": ("density-9",)}, "unknown 'density-9'; known: density-0"),
        ({"methods": ("v9",)}, "unknown 'v9'; known: sampled"),
        ({"pairs": -1}, "--pairs is -1"),
        ({"jobs": 0}, "--jobs is 0; it must be at least 1"),
        ({"steps": 0}, "--steps is 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        MapOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_every_method_are_valid(method: str, tmp_path: Path) -> None:
    settings = train_config(
        method, tmp_path / "pair", RECORD, 3, RunSettings("validation"), tmp_path / "run"
    )
    assert settings.seed == 3
    assert settings.evaluation.eval_task == str(tmp_path / "pair" / "validation.jsonl")
    assert settings.data.task == str(tmp_path / "pair" / "train.jsonl")
    assert settings.optimizer.lr == learning_rate(method)
    assert (settings.data.max_prompt, settings.rollout.max_response) == (40, 12)
    assert settings.objective.mask == (("string:<s>",) if "mask" in method else ())
    assert settings.data.prompts_per_step * settings.data.group_size == 32
    assert (settings.teacher == "none") == (method == "sft")
    assert settings.objective.gamma == {"0.5": 0.5, "1": 1.0}.get(
        method.removeprefix("sampled_gamma_").removesuffix("_baseline"), 0.0
    )
    assert (settings.objective.baseline != "none") == method.endswith("_baseline")


def test_a_second_end_is_masked_too(tmp_path: Path) -> None:
    record = {**RECORD, "knobs": {"second_end": True}}
    config = train_config("lsm_mask", tmp_path, record, 0, RunSettings(), tmp_path)
    assert config.objective.mask == ("string:<s>", "token:<|endoftext|>")


def test_core_methods_are_methods_and_one_learning_rate_replaces_all(tmp_path: Path) -> None:
    assert set(CORE_METHODS) <= set(METHODS)
    assert set(METHODS) >= MASKED
    settings = RunSettings(steps=9, lr=0.125)
    config = train_config("lsm", tmp_path, RECORD, 0, settings, tmp_path)
    assert (config.optimizer.lr, config.steps, config.record.eval_every) == (0.125, 9, 3)


@pytest.fixture
def folder(tmp_path: Path, tiny_pair: tuple[Path, Path]) -> MapFolder:
    """Return a map with one pair, whose models are those of all tests."""
    folder = MapFolder(tmp_path)
    pair = folder.pair("density-1", 0)
    pair.mkdir(parents=True)
    for name, source in zip(("student", "teacher"), tiny_pair, strict=True):
        (pair / name).symlink_to(source)
    (pair / "pair.json").write_text(json.dumps(RECORD))
    for split, problems in (("train", "train"), ("test", "test")):
        rows = [
            {"prompt": x.prompt, "answer": x.answer, "response": x.solution, "grader": "lab"}
            for x in chain_task.problems(problems, 40, 0)
        ]
        (pair / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("method", ["sampled_mask", "sft"])
def test_a_finished_run_is_kept_and_its_output_logged(folder: MapFolder, method: str) -> None:
    cell, settings = Cell("density-1", method, 0), RunSettings(steps=2)
    run_cell(folder, cell, settings)
    run = folder.run(cell)
    rows = RunFolder(run).rows()
    assert [row["step"] for row in rows] == [0, 1]
    assert [row["step"] for row in RunFolder(run).evaluations()] == [0, 1, 2]
    log = folder.root / "logs" / f"density-1-{method}-0.log"
    assert "step 2: accuracy" in log.read_text()
    before = (run / "rows.jsonl").read_bytes()
    run_cell(folder, cell, settings)
    assert (run / "rows.jsonl").read_bytes() == before


def test_the_bank_has_the_outcome_and_the_measurements_of_each_finished_run(
    folder: MapFolder,
) -> None:
    cells = [Cell("density-1", "lsm", 0), Cell("density-1", "sampled", 0)]
    path = folder.measurements("density-1", 0)
    path.parent.mkdir()
    path.write_text(json.dumps({"reverse_kl": 0.1234567, "snr": float("nan")}))
    with pytest.raises(InvalidInput, match="no finished run"):
        write_bank(folder, cells, folder.root / "bank.csv")
    run = folder.run(cells[0])
    (run / "final").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    evaluations = [(0, 0.5), (10, 0.75), (20, 0.25), (40, 0.625)]
    lines = [
        json.dumps({"step": step, "accuracy": accuracy, "outcomes": ""}) + "\n"
        for step, accuracy in evaluations[::-1]
    ]
    (run / "evals.jsonl").write_text("".join(lines))
    line = write_bank(folder, cells, folder.root / "bank.csv")
    assert "bank.csv: 1 of 2 runs; it lacks density-1/sampled-0, which are not finished" in line
    header, row = (folder.root / "bank.csv").read_text().splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True)) == {
        "pair": "density-1-0",
        "family": "density",
        "seed": "0",
        "method": "lsm",
        "start": "0.5",
        "final": "0.625",
        "gain": "0.125",
        "collapsed": "true",
        "reverse_kl": "0.123457",
        "snr": "nan",
    }


def finish_run(folder: MapFolder, cell: Cell, measurements: dict[str, float]) -> None:
    """Write what a bank reads of a finished run and its pair; no measurements, no file."""
    run, measured = folder.run(cell), folder.measurements(cell.regime, cell.pair)
    (run / "final").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    lines = (json.dumps({"step": step, "accuracy": 0.5, "outcomes": ""}) for step in (0, 30))
    (run / "evals.jsonl").write_text("\n".join(lines) + "\n")
    measured.parent.mkdir(exist_ok=True)
    if measurements:
        measured.write_text(json.dumps(measurements))


@pytest.mark.parametrize(
    ("measurements", "message"),
    [
        ({}, "the pair of density-1/lsm-1 was not measured .* there is no .*density-1-1.json; run"),
        (
            {"snr": 2.0},
            r"density-1-1.json and that of density-1/lsm-0 differ .*\(reverse_kl, snr\)",
        ),
    ],
)
def test_a_bank_with_a_pair_that_lacks_measurements_is_not_written(
    tmp_path: Path, measurements: dict[str, float], message: str
) -> None:
    folder, cells = MapFolder(tmp_path), [Cell("density-1", "lsm", seed) for seed in (0, 1)]
    finish_run(folder, cells[0], {"reverse_kl": 0.25})
    finish_run(folder, cells[1], measurements)
    path = tmp_path / "bank.csv"
    for earlier in (None, "the earlier bank"):
        if earlier:
            path.write_text(earlier)
        with pytest.raises(InvalidInput, match=message):
            write_bank(folder, cells, path)
        assert (path.read_text() if path.exists() else None) == earlier


def test_a_failure_is_reported_beside_a_bank_of_what_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of the pair is a file, so that it cannot be built."""
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "density-1-0").touch()
    finish_run(MapFolder(tmp_path), Cell("density-1", "lsm", 0), {"reverse_kl": 0.25})
    argv = ["--root", str(tmp_path), "--regimes", "density-1", "--methods", "lsm", "sft"]
    argv += ["--pairs", "1", "--jobs", "1", "--bank", str(tmp_path / "bank.csv")]
    with pytest.raises(OperationFailed, match=r"1 of 1 pairs failed, see .*logs; run the same"):
        command.main(argv)
    printed = capsys.readouterr().out
    assert "1 of 2 runs; it lacks density-1/sft-0, which are not" in printed
    assert "runs are in" not in printed
    assert len((tmp_path / "bank.csv").read_text().splitlines()) == 2


def test_a_finished_map_says_where_its_runs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run_all", lambda *_: None)
    command.main(["--root", str(tmp_path), "--preset", "small"])
    line = f"24 runs are in {tmp_path}/runs; draw them with `opd figures dose --run {tmp_path}/runs"
    assert capsys.readouterr().out.startswith(line)


@pytest.mark.parametrize(
    ("accuracies", "collapsed"),
    [([0.5], False), ([0.5, 0.25], False), ([0.5, 0.24], True), ([0.2, 0.9, 0.4, 0.9], True)],
)
def test_a_collapse_is_a_fall_below_half_of_the_best(
    accuracies: list[float], collapsed: bool
) -> None:
    assert has_collapsed(accuracies) == collapsed


def test_the_final_model_is_measured_against_its_start_and_its_teacher(folder: MapFolder) -> None:
    """A number as the answer is right now and then, also from models that were never trained."""
    pair = folder.pair("density-1", 0)
    for name, problems in (("test", chain_task), ("other_task", sort_task)):
        rows = [
            {"prompt": x.prompt, "answer": x.answer[0], "grader": "numeric"}
            for x in problems.problems("test", 20, 0)
        ]
        (pair / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cell, settings = Cell("density-1", "lsm", 0), RunSettings(steps=1)
    run_cell(folder, cell, settings)
    evaluate_start(folder, "density-1", 0, settings)
    evaluate_cell(folder, cell, settings)
    start, final = (
        json.loads(path.read_text())
        for path in (
            folder.start_evaluation("density-1", 0, "test"),
            folder.run(cell) / "evaluation.json",
        )
    )
    sampling = EvalConfig(eval_task=str(pair / "test.jsonl"), eval_problems=20, eval_samples=4)
    expected = [
        evaluate_folder(
            str(model),
            "lab",
            evaluation=sampling,
            max_prompt=40,
            max_response=12,
            seed=0,
            device="cpu",
        )
        for model in (pair / "student", folder.run(cell) / "final", pair / "teacher")
    ]
    assert start["outcomes"] == expected[0]["outcomes"]
    assert final["outcomes"] == expected[1]["outcomes"]
    assert final["teacher/accuracy"] == expected[2]["accuracy"] != expected[1]["accuracy"]
    assert final["against/gain"] == pytest.approx(final["accuracy"] - start["accuracy"])
    assert final["other/problem_set"] == start["other/problem_set"] != final["problem_set"]
    assert final["cost/steps"] == 1
    for name in ("gap@4", "calibration/brier", "recovery/loss", "against/other/gain"):
        assert name in final
    assert not [name for name in start if name.startswith(("teacher/", "against/", "cost/"))]
    start_path, path = (
        folder.start_evaluation("density-1", 0, "test"),
        folder.evaluation(cell, "test"),
    )
    start_path.write_text(json.dumps(start | {"kept": 1}))
    path.write_text(json.dumps({"kept": 1, "cost/steps": 1}))
    evaluate_start(folder, "density-1", 0, settings)
    evaluate_cell(folder, cell, settings)
    assert json.loads(start_path.read_text())["kept"] == json.loads(path.read_text())["kept"] == 1
    path.write_text(json.dumps({"kept": 1, "cost/steps": 2}))
    evaluate_cell(folder, cell, settings)
    assert json.loads(path.read_text()).keys() == final.keys()


def test_a_failed_run_is_named_with_its_log(folder: MapFolder) -> None:
    with pytest.raises(FileNotFoundError):
        run_cell(folder, Cell("density-1", "lsm", 1), RunSettings(steps=2))
    with pytest.raises(MissingFile):
        run_cell(folder, Cell("density-1", "lsm", 0), replace(RunSettings(), split="nothing"))
    log = (folder.root / "logs" / "density-1-lsm-0.log").read_text()
    assert "nothing.jsonl" in log


def test_all_calls_are_made_although_one_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = MapOptions(root=tmp_path, jobs=1)
    existing = tmp_path / "there"
    existing.mkdir()
    paths = [(existing,), (tmp_path / "new",)]
    with pytest.raises(OperationFailed, match=r"1 of 2 folders failed, see .*logs; run the same"):
        run_all("folders", command.os.mkdir, paths, options)
    assert (tmp_path / "new").is_dir()
    assert "File exists" in capsys.readouterr().err
