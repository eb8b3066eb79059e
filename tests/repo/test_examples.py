"""The examples run as they stand, and print numbers that make sense."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import EXAMPLES


def test_the_handwritten_loop_learns(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "handwritten_loop.py"), run_name="__main__")
    output = capsys.readouterr().out
    loss = [float(x) for x in re.findall(r"loss (\S+)", output)]
    assert [float(x) for x in re.findall(r"divergence/reverse_kl (\S+)", output)] == loss
    assert loss[-1] < 0.8 * loss[0]
    assert all(abs(float(z)) < 4 for z in re.findall(r"z_H (\S+)", output))
    assert "not computed: sampler_ratio (this run has no sampler_logp)" in output


def test_trl_is_attached(
    tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["attach_trl.py", *map(str, tiny_pair)])
    runpy.run_path(str(EXAMPLES / "attach_trl.py"), run_name="__main__")
    steps = re.findall(r"^step (\S+)  divergence/reverse_kl", capsys.readouterr().out, re.M)
    assert steps == ["2", "4", "6", "8", "10"]
    rows = [json.loads(x) for x in (tmp_path / "runs/trl/panel.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    assert all(row["divergence/tokens"] > 0 for row in rows)
