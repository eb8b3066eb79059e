"""The HTML report in a real browser; skipped where no Chromium is installed."""

import copy
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diagnostics.batch import ScoredRollouts
from diagnostics.records import rows
from diagnostics.records.batch_files import load_batch
from opd.report import build
from tests.helpers.pages import HOSTILE


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
def report(run: Path) -> dict[str, Any]:
    """The report of the run, which tests may copy but not change."""
    return build.report_data([run])


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., tuple[Any, list[str]]]]:
    """Function that opens a page; also returns console messages, errors and network requests."""
    contexts = []

    def open_address(address: str, **options: Any) -> tuple[Any, list[str]]:
        contexts.append(browser.new_context(**({"reduced_motion": "reduce"} | options)))
        page, problems = contexts[-1].new_page(), []
        page.on(
            "console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        allowed = "file:" if address.startswith("file:") else address
        page.on("request", lambda r: None if r.url.startswith(allowed) else problems.append(r.url))
        page.goto(address)
        page.wait_for_selector(".chart canvas")
        return page, problems

    yield open_address
    for context in contexts:  # a page of a live server would ask for news until the end
        context.close()


def save_page(data: dict[str, Any], folder: Path) -> str:
    file = folder / "page.html"
    file.write_text(build.render_page(data), encoding="utf-8")
    return file.as_uri()


def test_hostile_text_is_shown_as_text(
    open_page: Any, report: dict[str, Any], tmp_path: Path
) -> None:
    data = copy.deepcopy(report)
    first = data["runs"][0]
    for i, key in enumerate(list(first["texts"])[: len(HOSTILE)]):
        first["texts"][key] = HOSTILE[i]
    first["name"], first["config"]["objective"], first["code"] = HOSTILE[0], HOSTILE[1], HOSTILE[0]
    first["rollouts"][0]["task"] = first["tasks"][0]["task"] = HOSTILE[1]
    item = dict.fromkeys(("item", "verdict", "found", "advice"), HOSTILE[1])
    first["sheet"]["doctor"] = {"verdict": HOSTILE[0], "items": [item]}
    page, problems = open_page(save_page(build.sanitize(data), tmp_path))
    page.wait_for_timeout(100)
    assert page.evaluate("window.owned") is None
    assert page.locator("img, iframe, main script").count() == 0
    assert page.locator("#cards h3").first.inner_text() == HOSTILE[0]
    assert page.locator("#title").inner_text() == HOSTILE[0]
    assert problems == []


READ_TOKEN = """token => [
    token.style.getPropertyValue("--c"),
    token.classList.contains("out"),
    document.getElementById("detail").innerText,
    [...document.querySelectorAll("#detail .both tbody tr")].map(
        row => [...row.querySelectorAll("td")].map(cell => cell.textContent)),
]"""
"""Colour and mark of a token, the text of its details, and the cells of their table."""


def test_every_token_shows_its_numbers(
    open_page: Any, run: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    page, problems = open_page(save_page(report, tmp_path))
    roll = report["runs"][0]["rollouts"][0]
    batch = load_batch(run / "batches" / f"step_{roll['step']:06d}.safetensors")
    assert isinstance(batch, ScoredRollouts)
    cost = batch.log_ratio[roll["row"]].tolist()
    tokens = page.locator("#text .t")
    assert tokens.count() == len(roll["ids"])
    for k in range(len(roll["ids"])):
        tokens.nth(k).hover()
        colour, is_marked, detail_text, table_rows = tokens.nth(k).evaluate(READ_TOKEN)
        assert colour == ("var(--down)" if cost[k] > 0 else "var(--up)")
        assert is_marked == (roll["in"][k] == "0")
        detail_text = detail_text.replace("−", "-")
        assert f"id {roll['ids'][k]} · position {k}" in detail_text
        student_logp, teacher_logp = roll["s"][k] / 100, roll["t"][k] / 100
        signal = re.search(r"(\S+) nats", detail_text)[1]
        logps = re.search(r"log p, log q\s+(\S+), (\S+)", detail_text).groups()
        assert float(signal) == pytest.approx(teacher_logp - student_logp, rel=6e-3)
        assert [float(x) for x in logps] == pytest.approx([student_logp, teacher_logp], rel=6e-3)
        tops = [roll["tops"][k][j : j + 3] for j in range(0, len(roll["tops"][k]), 3)]
        if roll["ids"][k] not in [v for v, _, _ in tops]:
            tops.append([roll["ids"][k], roll["s"][k], roll["t"][k]])
        assert len(table_rows) == len(tops)
        for (name, *chances), (v, *logps) in zip(table_rows, tops, strict=True):
            if v != roll["ids"][k]:
                text = report["runs"][0]["texts"][str(v)].replace("\n", "\\n").replace("\t", "\\t")
                assert name == f'"{text}"'
            for chance, logp in zip(chances, logps, strict=True):
                exact = 100 * math.exp(logp / 100)
                number = chance.strip("< %")
                assert (
                    exact < 1e-4 if "<" in chance else float(number) == pytest.approx(exact, 0.06)
                )
    assert problems == []


def test_keys_move_through_tokens_and_rollouts(
    open_page: Any, run: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    page, problems = open_page(save_page(report, tmp_path))
    rolls = report["runs"][0]["rollouts"]
    size = [abs(a - b) for a, b in zip(rolls[0]["s"], rolls[0]["t"], strict=True)]
    order = sorted(range(len(size)), key=lambda k: -size[k])

    def focused_token() -> int:
        return int(page.locator("#text .t.on").get_attribute("data-k"))

    assert focused_token() == order[0]
    page.locator("#text").focus()
    for k in order[:3]:
        page.keyboard.press("w")
        assert focused_token() == k
    page.keyboard.press("Home")
    assert focused_token() == 0
    page.keyboard.press("ArrowRight")
    assert focused_token() == 1
    assert page.locator("#text").get_attribute("aria-activedescendant") == "t-1"
    page.keyboard.press("n")
    assert page.locator("#list [aria-selected=true]").count() == 1
    assert page.locator("#list .row").nth(1).get_attribute("aria-selected") == "true"
    page.locator("#list").focus()
    page.keyboard.press("ArrowUp")
    assert page.locator("#list .row").nth(0).get_attribute("aria-selected") == "true"
    page.locator(".plot").first.focus()
    page.keyboard.press("ArrowRight")
    assert "step 0" in page.locator(".chart .readout").first.inner_text()
    page.locator("[data-column='divergence/k1'] .plot").focus()
    page.keyboard.press("ArrowRight")
    row = rows.read_rows(run / "rows.jsonl")[0]
    readout_text = (
        page.locator("[data-column='divergence/k1'] .readout").inner_text().replace("−", "-")
    )
    value, spread = readout_text.removeprefix("step 0").split("±")
    assert float(value) == pytest.approx(row["divergence/k1"], rel=6e-3)
    assert float(spread) == pytest.approx(1.96 * row["divergence/k1_se"], rel=6e-2)
    page.locator(".map canvas").first.focus()
    page.keyboard.press("ArrowRight")
    assert "step 0, positions 0–1" in page.locator(".map .readout").first.inner_text()
    page.locator(".map canvas").first.hover(position={"x": 60, "y": 10})
    bins = next(iter(report["runs"][0]["tasks"][0]["maps"].values()))["bins"]
    last = "–".join(map(str, bins[-1]))
    assert f"step 0, positions {last}" in page.locator(".map .readout").first.inner_text()
    page.locator(".map canvas").first.hover(position={"x": 60, "y": 130})
    assert "step 0, positions 0–1" in page.locator(".map .readout").first.inner_text()
    assert problems == []


def test_filters_choose_rollouts(open_page: Any, report: dict[str, Any], tmp_path: Path) -> None:
    data = copy.deepcopy(report)
    rolls = data["runs"][0]["rollouts"]
    for i, roll in enumerate(rolls):
        roll.update(reward=float(i % 2), ended=i % 3 > 0, task="ab"[i % 2])
    page, problems = open_page(save_page(data, tmp_path))
    list_rows = page.locator("#list .row")

    def outcome(roll: dict[str, Any]) -> str:
        return "truncated" if not roll["ended"] else "right" if roll["reward"] else "wrong"

    for name in ("right", "wrong", "truncated"):
        page.locator("#f-outcome").select_option(name)
        assert list_rows.count() == sum(outcome(roll) == name for roll in rolls)
    page.locator("#f-outcome").select_option("")
    page.locator("#f-step").select_option("2")
    page.locator("#f-task").select_option("a")
    assert list_rows.count() == sum(roll["step"] == 2 and roll["task"] == "a" for roll in rolls)
    page.locator("#f-step").select_option("")
    page.locator("#f-task").select_option("")
    page.locator("#f-order").select_option("long")
    longest = max(len(roll["ids"]) for roll in rolls)
    assert f"{longest} tokens" in list_rows.first.inner_text()
    assert problems == []


def test_any_column_may_be_drawn_and_the_theme_changed(
    open_page: Any, report: dict[str, Any], tmp_path: Path
) -> None:
    page, problems = open_page(save_page(report, tmp_path), color_scheme="dark")
    back = "getComputedStyle(document.body).backgroundColor"
    first = page.evaluate(back)
    page.locator("#theme").click()
    assert page.evaluate(back) != first
    charts = page.locator(".chart canvas").count()
    page.locator("#column").fill("divergence/abs_ratio")
    page.locator("#column").press("Enter")
    assert page.locator("[data-column='divergence/abs_ratio'] canvas").count() == 1
    assert page.locator(".chart canvas").count() == charts + 1
    page.locator("#column").fill("no/such")
    page.locator("#column").press("Enter")
    assert "no/such" in page.locator("#picked").inner_text()
    page.get_by_label("Remove divergence/abs_ratio").click()
    assert page.locator(".chart canvas").count() == charts
    page.locator("#map").select_option("consistency/z_H")
    assert page.locator(".quantity").count() == 1
    assert problems == []


def test_a_narrow_page_does_not_scroll_horizontally(
    open_page: Any, run: Path, tmp_path: Path
) -> None:
    long = tmp_path / ("a-very-long-name-of-a-run-" * 4)
    shutil.copytree(run, long)
    data = build.report_data([run, long])
    page, problems = open_page(save_page(data, tmp_path), viewport={"width": 360, "height": 780})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert problems == []


def test_a_page_opens_at_its_top_and_the_list_follows_the_choice(
    open_page: Any, report: dict[str, Any], tmp_path: Path
) -> None:
    page, _ = open_page(save_page(report, tmp_path), viewport={"width": 900, "height": 300})
    assert page.locator("#list .row").count() > 1
    assert page.evaluate("window.scrollY") == 0
    page.evaluate("document.getElementById('list').style.maxHeight = '60px'")
    last = page.locator("#list .row").last
    last.evaluate("row => row.click()")
    inside = """row => {
      const list = row.parentElement.getBoundingClientRect(), at = row.getBoundingClientRect();
      return [at.bottom <= list.bottom + 1, window.scrollY];
    }"""
    assert last.evaluate(inside) == [True, 0]


def test_an_update_keeps_selection_and_scroll_position(
    open_page: Any, server: tuple[str, Path]
) -> None:
    address, folder = server
    page, problems = open_page(address + "/", reduced_motion="no-preference")
    page.locator("#list .row").nth(2).click()
    page.locator("#text .t").nth(1).hover()
    page.locator("#column").fill("divergence/abs_ratio")
    page.locator("#column").press("Enter")
    page.wait_for_function("document.getElementById('made').textContent.startsWith('live')")
    page.wait_for_timeout(700)  # the page scrolls smoothly
    selected_text = page.locator("#list [aria-selected=true]").inner_text()
    y = page.evaluate("window.scrollY")
    assert y > 100
    last_row = rows.read_rows(folder / "rows.jsonl")[-1]
    rows.append_row(folder / "rows.jsonl", last_row | {"step": 3})
    page.get_by_text("step 4 of 3").wait_for(timeout=20_000, state="attached")
    assert page.locator("#list [aria-selected=true]").inner_text() == selected_text
    assert page.locator("#text .t.on").get_attribute("data-k") == "1"
    assert page.locator("[data-column='divergence/abs_ratio'] canvas").count() == 1
    assert abs(page.evaluate("window.scrollY") - y) <= 1
    assert problems == []


def test_a_run_with_one_row_is_shown(open_page: Any, run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "config.json", bare)
    (bare / "rows.jsonl").write_text(json.dumps({"step": 0, "loss": 1.0}) + "\n")
    page, problems = open_page(save_page(build.report_data([bare, run]), tmp_path))
    assert "saved no batches" in page.locator("#list").inner_text()
    page.locator("#f-run").select_option("1")
    assert page.locator("#list .row").count() > 0
    assert problems == []


def test_special_tokens_outside_the_loss_are_one_line(
    open_page: Any, report: dict[str, Any], tmp_path: Path
) -> None:
    data = copy.deepcopy(report)
    ids = [int(i) for i in list(data["runs"][0]["texts"])[:3]]
    data["runs"][0]["sheet"]["special"] = [
        {"id": i, "count": count, "signal": 0.5 * count, "cost": 1.0 if count else None}
        for i, count in zip(ids, (0, 2, 0), strict=True)
    ]
    page, problems = open_page(save_page(data, tmp_path))
    panel = page.locator(".panel", has=page.get_by_text("Special tokens, last saved batch"))
    assert panel.locator("tbody tr").count() == 1
    assert panel.locator("tbody td").nth(1).inner_text() == str(ids[1])
    line = panel.locator("p.small")
    assert line.inner_text().startswith("Not in the loss: ")
    assert line.locator("code").count() == 2
    assert problems == []


def test_a_card_has_the_colour_of_its_result(open_page: Any, run: Path, tmp_path: Path) -> None:
    falling = [1.0 - 0.05 * i for i in range(12)]
    histories = {"shrinks": falling, "stays": [1.0] * 12, "grows": falling[::-1]}
    histories["shrinks, same answers"] = falling
    for name, costs in histories.items():
        (tmp_path / name).mkdir()
        shutil.copy(run / "config.json", tmp_path / name)
        for step, cost in enumerate(costs):
            rows.append_row(tmp_path / name / "rows.jsonl", {"step": step, "divergence/k1": cost})
    for step in (0, 12):
        row = {"step": step, "accuracy": 0.5, "outcomes": "01" * 20, "problem_set": "p"}
        rows.append_row(tmp_path / "shrinks, same answers" / "evals.jsonl", row)
    folders = [tmp_path / name for name in histories]
    page, problems = open_page(save_page(build.report_data(folders), tmp_path))
    colours = {}
    for i, name in enumerate(histories):
        card = page.locator("#cards .card").nth(i)
        border = card.evaluate("card => getComputedStyle(card).borderTopColor")
        label = card.locator(".pill")
        assert label.evaluate("label => getComputedStyle(label).color") == border
        red, green, blue = map(int, re.findall(r"\d+", border)[:3])
        colours[name] = (label.inner_text(), red, green, blue)
    labels = [text for text, *_ in colours.values()]
    assert labels == ["better", "nothing shown", "1 alarm on", "sampled cost better"]
    _, red, green, blue = colours["shrinks"]
    assert green > max(red, blue)
    _, red, green, blue = colours["stays"]  # amber
    assert 2 * blue < 0.6 * red < green < red
    _, red, green, blue = colours["grows"]
    assert red > 2 * max(green, blue)
    assert problems == []
