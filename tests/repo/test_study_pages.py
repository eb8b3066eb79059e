"""Pages about an experiment print its recorded results as `opd study show` does."""

import pandas as pd
import pytest

from synthetic.runner import run as study
from tests.helpers.paths import ROOT


def page_text(name: str) -> str:
    return " ".join((ROOT / "docs" / f"{name}.md").read_text().split())


@pytest.mark.parametrize("name", ["hidden_context", "prefix_sources"])
def test_a_page_has_every_recorded_headline(name: str) -> None:
    page = page_text(name)
    table, _ = study.load_recorded_table(name)
    for line in study.format_headlines(name, table):
        assert line in page, f"docs/{name}.md lacks {line!r}; see `opd study show {name}`"


def test_the_page_of_hidden_contexts_has_the_recorded_resting_points() -> None:
    page, (table, _) = page_text("hidden_context"), study.load_recorded_table("hidden_context")
    for estimator, name in (
        ("plain", "sampled token, γ = 0"),
        ("full_forward_kl", "forward KL"),
        ("full_jsd", "JSD"),
        ("teacher_topk", "teacher's top 2, renormalised"),
        ("teacher_topk_bucket", "with a tail bucket"),
        ("teacher_topk_sampled_tail", "with a sampled tail"),
        ("student_topk", "student's top 2, renormalised"),
    ):
        rows = table[(table["estimator"] == estimator) & (table["gamma"] == 0)]
        cells = [cell(rows, quantity) for quantity in ("bias", "excess", "noise_left")]
        assert f"| {name} | {' | '.join(cells)} |" in page


def cell(rows: pd.DataFrame, quantity: str) -> str:
    row = rows[rows["quantity"] == quantity].iloc[0]
    value, low, high = (f"{row[x]:.2g}" for x in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
