"""The whole house at its smallest, as a user runs it; a second call keeps what is done."""

import re
import subprocess
import sys
from pathlib import Path

from diagnostics.records.run_tables import gains, training_table


def demo(out: Path) -> str:
    line = [sys.executable, "-m", "opd.cli.main", "demo", "--smoke", "--out", str(out)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_demo_runs_and_runs_again(tmp_path: Path) -> None:
    first = demo(tmp_path)
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) >= 4
    for row in gains(training_table(runs)).to_dict("records"):
        line = next(x for x in first.splitlines() if x.startswith(row["objective"]))
        assert f"{row['gain']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" in line
    for name in ("figures/training.png", "figures/bias_variance.pdf", "report.html"):
        assert (tmp_path / name).stat().st_size > 10_000
    stamps = {p: p.stat().st_mtime_ns for run in runs for p in run.glob("final/*")}
    again = demo(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    table = [re.sub(r"seconds .*", "", text) for text in (first, again)]
    assert table[0] == table[1]
