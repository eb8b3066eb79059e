"""Charts of the report in a browser: ranges, ticks, folding, data, and narrow screens."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opd.report import build

SHARE, STEPS = "response/truncated_share", 30


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright import sync_api as playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as machine:
        chromium_browser = machine.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium_browser
        chromium_browser.close()


@pytest.fixture(scope="module")
def curve_folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short run with thirty rows of known values."""
    folder = tmp_path_factory.mktemp("curves") / "=long run, of a name with a comma"
    shutil.copytree(run, folder)
    row = json.loads((run / "rows.jsonl").read_text().splitlines()[0])
    text = ""
    for step in range(STEPS):
        values = {
            "step": step,
            SHARE: 0.02 if step % 2 else 0.98,
            f"{SHARE}_se": 0.2,
            "response/length": 1.0 + step,
            "response/length_se": 5.0,
            "divergence/k1": 0.01 * step - 0.1,
            "divergence/k1_se": 0.5,
            "divergence/student_entropy": 5.55 + 1e-4 * step,
            "divergence/student_entropy_se": 1e-5,
            "response/reward": 0.0,
            "lr": 1e-3 / (1 + step) ** 4,
            "machine/tokens_per_second": 1000.0 + step,
            "machine/peak_gib": 2.0 + 0.01 * step,
        }
        text += json.dumps(row | values) + "\n"
    (folder / "rows.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def address(curve_folder: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(build.render_page(build.report_data([curve_folder])), encoding="utf-8")
    return file.as_uri()


@pytest.fixture(scope="module")
def page(browser: Any, address: str) -> Any:
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    opened.goto(address)
    opened.wait_for_selector(".chart canvas")
    return opened


def points(page: Any, column: str) -> list[dict[str, str]]:
    """Return the rows of a chart's download."""
    with page.expect_download() as event:
        page.get_by_label(f"Download {column} as CSV").click()
    assert event.value.suggested_filename == f"{re.sub(r'[^A-Za-z0-9_]+', '_', column)}.csv"
    return list(csv.DictReader(Path(event.value.path()).read_text().splitlines()))


def test_a_charts_data_are_what_was_recorded(page: Any, curve_folder: Path) -> None:
    recorded = [json.loads(x) for x in (curve_folder / "rows.jsonl").read_text().splitlines()]
    for column in ("divergence/k1", "machine/tokens_per_second"):
        rows = points(page, column)
        assert [int(row["step"]) for row in rows] == list(range(STEPS))
        for row, own in zip(rows, recorded, strict=True):
            assert row["run"] == f"'{curve_folder.name}", "no formula of a spreadsheet"
            assert float(row["value"]) == pytest.approx(own[column], rel=1e-4)
            if error := own.get(f"{column}_se"):
                edges = [own[column] + sign * 1.96 * error for sign in (-1, 1)]
                assert [float(row[x]) for x in ("low", "high")] == pytest.approx(edges, rel=1e-3)


def test_bands_end_where_their_quantity_ends(page: Any) -> None:
    share = points(page, SHARE)
    assert {float(row["high"]) for row in share[::2]} == {1.0}
    assert {float(row["low"]) for row in share[1::2]} == {0.0}
    assert min(float(row["low"]) for row in points(page, "response/length")) == 0
    assert min(float(row["low"]) for row in points(page, "divergence/k1")) < -0.9, "may be negative"
    plot = page.locator(f"[data-column='{SHARE}'] .plot")
    plot.focus()
    plot.press("ArrowRight")
    readout = page.locator(f"[data-column='{SHARE}'] .readout").inner_text()
    assert "0.98 [0.588, 1]" in readout


def test_tick_labels_differ(browser: Any, address: str) -> None:
    """The labels are drawn on a canvas: what is drawn there is recorded."""
    opened = browser.new_page()
    opened.add_init_script(
        """window.drawn = new Map(); const fill = CanvasRenderingContext2D.prototype.fillText;
        CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
          const name = this.canvas.closest(".chart")?.dataset.column;
          const at = [text, this.getTransform().f + rest[1], rest[0]];
          if (name) drawn.set(name, [...(drawn.get(name) ?? []), at]);
          return fill.call(this, text, ...rest); };"""
    )
    opened.goto(address)
    opened.wait_for_selector(".chart canvas")
    labels = dict(opened.evaluate("[...drawn]"))
    for column in ("divergence/student_entropy", "lr", "divergence/k1"):
        column_labels = labels[column]
        left = min(x for *_, x in column_labels)
        texts = {(text, y) for text, y, x in column_labels if x == left and text}
        names = [text for text, _ in texts]
        assert len(names) >= 3, column
        assert len(set(names)) == len(names), (column, names)
        assert max(map(len, names)) <= 7, (column, names)
    opened.close()


def test_constant_curves_are_folded_and_can_be_shown(page: Any) -> None:
    assert page.locator("[data-column='response/reward']").count() == 0
    summary = page.locator("#constants summary")
    assert re.fullmatch(r"\d+ \w+ the same at every step", summary.inner_text())
    summary.click()
    assert "Reward of the rollouts: 0" in page.locator("#constants").inner_text()
    page.locator("#column").fill("response/reward")
    page.locator("#column").press("Enter")
    assert page.locator("[data-column='response/reward'] canvas").count() == 1
    page.get_by_label("Remove response/reward").click()
    assert page.locator("[data-column='response/reward']").count() == 0
    for column in ("lr", "machine/tokens_per_second", "machine/peak_gib", "held-out accuracy"):
        assert page.locator(f"[data-column='{column}'] canvas").count() == 1, column


def test_every_chart_says_what_healthy_looks_like(page: Any) -> None:
    for chart in page.locator(".chart").all():
        mark = chart.locator(".mark")
        assert "Healthy: " in mark.get_attribute("title")
        assert mark.get_attribute("aria-expanded") == "false"
        mark.click()
        text = chart.locator("p.small").first
        assert text.is_visible()
        assert "Healthy: " in text.inner_text()
        mark.click()
        assert not text.is_visible()


CUT_OFF = """() => [...document.querySelectorAll("body *")].filter((node) => {
  const box = node.getBoundingClientRect(), style = getComputedStyle(node);
  if (!box.width || !node.checkVisibility()) return false;
  const wider = node.clientWidth && node.scrollWidth > node.clientWidth + 1;
  return box.right > innerWidth + 1 || (wider && style.overflowX !== "visible");
}).map((node) => `${node.tagName}.${node.className}: ${node.textContent.slice(0, 60)}`)"""


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_cut_off(browser: Any, address: str, width: int) -> None:
    opened = browser.new_page(viewport={"width": width, "height": 900})
    opened.goto(address)
    opened.wait_for_selector(".chart canvas")
    for mark in opened.locator(".chart .mark").all():
        mark.click()
    opened.evaluate("document.querySelectorAll('details').forEach((x) => { x.open = true; })")
    opened.wait_for_timeout(100)
    kept = {"PRE.", "CODE.", "DIV.scroll"}  # code and settings scroll
    found = [text for text in opened.evaluate(CUT_OFF) if text.partition(":")[0] not in kept]
    assert not found
    tables = opened.evaluate(
        "[...document.querySelectorAll('#gains .scroll, #tokens .scroll')]"
        ".filter((x) => x.scrollWidth > x.clientWidth + 1).map((x) => x.textContent.slice(0, 60))"
    )
    assert tables == []
    opened.close()
