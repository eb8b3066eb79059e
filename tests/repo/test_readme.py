"""What the README names exists, its example runs as printed, and recorded values are right."""

import re
from pathlib import Path

import pytest

from benchmarks.estimates import family_table
from tests.helpers.batches import batch
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text()


def test_ten_lines_instrument_a_strangers_run(capsys: pytest.CaptureFixture[str]) -> None:
    _, code = re.findall(r"```python\n(.*?)```", README, re.S)
    b = batch()
    names = ("tokens", "mask", "student_logp", "teacher_logp", "sampler_logp", "prompt", "ended")
    step = {name: vars(b)[name] for name in names}
    exec(code, {"my_steps": [step, step]})
    first, second, unavailable = capsys.readouterr().out.splitlines()
    assert first == second
    share = float((b.log_ratio > 0)[b.mask].double().mean())
    assert float(first.split()[0]) == pytest.approx(share)
    assert "martingales" in unavailable


def test_the_files_it_names_exist() -> None:
    for line in README.splitlines():
        cells = line.split("|")
        if len(cells) > 2 and cells[1].strip().startswith("`"):
            folder = ""
            for name in re.findall(r"`([^`]+)`", cells[1]):
                folder = str(Path(name).parent) if "/" in name else folder
                path = ROOT / name if "/" in name else ROOT / folder / name
                assert path.exists(), name
    for name in re.findall(r"\((figures/[^)]+)\)", README):
        assert (ROOT / name).exists(), name


def test_the_estimates_are_held_against_the_exact_values_on_record(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """benchmarks/README.md names each quantity beside its exact value."""
    record = (ROOT / "benchmarks" / "README.md").read_text()
    family_table(batches=2, sequences=6)
    printed = re.findall(r"^(\S.*?) {2,}(\d\.\d{3}) ", capsys.readouterr().out, re.M)
    assert len(printed) == 20
    for name, value in printed:
        assert f"| {name} | {value} |" in record, name
