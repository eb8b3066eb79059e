"""The HTML report: what it says of a record, what it embeds, and what a browser makes of it."""

import html.parser
import json
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics import rows
from diagnostics.alarms import replay
from diagnostics.batch import Scored, load
from opd import record, report, specimens
from opd.train import train
from opd.watching import HOST, make_server
from tests.test_train import settings

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=document.title='owned'>",
    "\u202egnp.exe\u202c",
    "a\u2028b\u2029c",
    "\x00\x1b[31m",
    "{{data}} {{scripts}}",
)


class Scripts(html.parser.HTMLParser):
    """The text of every script of a page, by its type."""

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


def scripts(page: str) -> list[tuple[str, str]]:
    parser = Scripts()
    parser.feed(page)
    return parser.found


@pytest.fixture(scope="module")
def run(tiny_pair, tmp_path_factory) -> Path:
    """A short real run with a batch of every step."""
    folder = tmp_path_factory.mktemp("report") / "run"
    return train(settings(tiny_pair, folder, steps=3, batch_every=1, eval_every=1))


def test_the_page_stands_alone_and_holds_its_data_unharmed(run: Path) -> None:
    data = report.contents([run])
    page = report.page(data)
    found = scripts(page)
    assert [kind for kind, _ in found] == ["application/json", "", ""]
    assert json.loads(found[0][1]) == json.loads(json.dumps(data))
    policy = page.split('http-equiv="Content-Security-Policy" content="')[1].split('"')[0]
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy
    for _, text in found[1:]:
        assert f"'sha256-{report.digest(text)}'" in policy
    assert "src=" not in page.split("<script")[0]


def test_hostile_text_cannot_leave_its_place() -> None:
    data = {"words": [*HOSTILE, "\ud800"], "runs": []}
    page = report.page(data)
    found = scripts(page)
    assert len(found) == 3
    assert json.loads(found[0][1]) == data
    assert not set("<>&\u2028\u2029") & set(found[0][1])
    page.encode()  # a lone surrogate must not stop the file from being written
    with pytest.raises(ValueError, match="JSON compliant"):
        report.embedded({"x": float("nan")})
    for text in HOSTILE:
        assert specimens.visible(text).isprintable()
    assert specimens.visible("é漢 a") == "é漢 a"
    assert specimens.visible("\u202e") == "\\u202e"


def test_curves_alarms_and_accuracy_are_those_of_the_record(run: Path) -> None:
    made = record.recorded(record.read_run(run))
    written = rows.read(run / "rows.jsonl")
    steps, values, errors = made["tasks"][0]["curves"]["drift/k1"]
    assert steps == [0, 1, 2]
    for row, value, error in zip(written, values, errors, strict=True):
        assert value == pytest.approx(row["drift/k1"], rel=1e-4)
        assert error == pytest.approx(row["drift/k1_se"], rel=1e-4)
    assert made["done"] == 3
    assert [x["accuracy"] for x in made["evals"]] == [
        x["accuracy"] for x in rows.read(run / "evals.jsonl")
    ]
    bad = [{"step": s, "loss": None, "collapse/repeated_share": 0.9} for s in range(9)]
    told = record.part("", bad)["alarms"]
    assert [(a["rule"], a["step"]) for a in told] == [(a.rule.name, a.step) for a in replay(bad)]
    assert {a["rule"] for a in told} == {"not_finite", "repetition"}
    assert all(a["on"] for a in told)


def test_tasks_that_take_turns_have_curves_of_their_own(run: Path) -> None:
    found = record.read_run(run)
    turns = [row | {"task": "ab"[i % 2]} for i, row in enumerate(found.rows)]
    made = record.recorded(replace(found, rows=turns))
    assert [part["task"] for part in made["tasks"]] == ["a", "b"]
    assert [part["curves"]["loss"][0] for part in made["tasks"]] == [[0, 2], [1]]


def test_long_curves_keep_their_ends_and_extremes() -> None:
    points = [(i, float((i * 7919) % 2003), None) for i in range(20_000)]
    points[12_345] = (12_345, 1e6, None)
    points[777] = (777, None, None)
    kept = record.thinned(points)
    assert len(kept) <= record.POINTS + 2
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert (12_345, 1e6, None) in kept
    assert min(p[1] for p in kept if p[1] is not None) == 0
    assert kept == sorted(kept, key=lambda p: p[0])
    assert record.thinned(points[:100]) == points[:100]


def test_maps_and_anatomy_are_the_columns_by_position(run: Path) -> None:
    written = rows.read(run / "rows.jsonl")
    made = record.part("", written)
    shown = {m["name"]: m for m in made["maps"]}
    cost = shown["drift/k1"]
    for i, row in enumerate(written):
        for j, (low, high) in enumerate(cost["bins"]):
            value = row[f"drift/k1@{low}-{high}"]
            assert cost["values"][i][j] == (None if value is None else pytest.approx(value, 1e-4))
    last = made["anatomy"]["rows"][-1]
    for k, name in enumerate(record.ANATOMY):
        for j, (low, high) in enumerate(last["bins"]):
            value = written[-1][f"{name}@{low}-{high}"]
            if value is not None:
                assert last["parts"][k][j] == pytest.approx(value, rel=1e-4, abs=1e-9)


def test_specimens_are_the_batchs_numbers(run: Path) -> None:
    made = specimens.specimens(run, tokens=10_000)
    batch = load(run / "batches" / "step_000001.safetensors")
    assert isinstance(batch, Scored)
    mine = [roll for roll in made["rollouts"] if roll["step"] == 1]
    assert [roll["row"] for roll in mine] == list(range(len(batch)))
    for roll in mine:
        i = roll["row"]
        ids = batch.tokens[i][batch.mask[i]]
        assert roll["ids"] == ids.tolist()
        assert [x / 100 for x in roll["s"]] == pytest.approx(
            batch.student_logp[i][batch.mask[i]].tolist(), abs=0.0051
        )
        assert [x / 100 for x in roll["t"]] == pytest.approx(
            batch.teacher_logp[i][batch.mask[i]].tolist(), abs=0.0051
        )
        inside = batch.support.contains(batch.tokens)[i][batch.mask[i]]  # type: ignore[union-attr]
        assert roll["in"] == "".join("1" if x else "0" for x in inside)
        best = batch.support.teacher_logp[i][batch.mask[i]]  # type: ignore[union-attr]
        assert [x[0] / 100 for x in roll["topT"]] == pytest.approx(
            best.amax(-1).tolist(), abs=0.0051
        )
        assert roll["rank"] == batch.prefix.teacher_rank[i][batch.mask[i]].tolist()  # type: ignore[union-attr]
    assert all(str(i) in made["texts"] for roll in mine for i in roll["ids"])


def test_blame_is_a_plain_count(run: Path) -> None:
    made = specimens.specimens(run, tokens=10_000)
    batch = load(run / "batches" / "step_000002.safetensors")
    assert isinstance(batch, Scored)
    r, whole = batch.log_ratio, float(batch.log_ratio.abs()[batch.mask].sum())
    for row in made["blame"]:
        mine = batch.mask & (batch.tokens == row["id"])
        assert row["count"] == int(mine.sum())
        assert row["signal"] == pytest.approx(float(r.abs()[mine].sum()) / whole, abs=1e-5)
        assert row["cost"] == pytest.approx(float(r[mine].mean()), abs=1e-3)
    shares = [row["signal"] for row in made["blame"]]
    assert shares == sorted(shares, reverse=True)
    found = batch.mask & (batch.student_logp.exp() > 0.9) & (batch.teacher_logp.exp() < 1e-4)
    assert made["sheet"]["share"] == pytest.approx(float(found.sum() / batch.mask.sum()), abs=1e-5)


def test_few_tokens_show_the_worst_responses(run: Path) -> None:
    batch = load(run / "batches" / "step_000000.safetensors")
    assert isinstance(batch, Scored)
    mean = batch.log_ratio.abs().sum(1) / batch.mask.sum(1)
    worst = int(mean.argmax())
    budget = 3 * int(batch.mask.sum(1)[worst])  # three batches share it
    made = specimens.specimens(run, budget)
    assert worst in [roll["row"] for roll in made["rollouts"] if roll["step"] == 0]
    for step in range(3):
        assert sum(len(r["ids"]) for r in made["rollouts"] if r["step"] == step) <= budget // 3


def test_runs_without_batches_or_rows_are_shown_all_the_same(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "config.json", bare)
    data = report.contents([bare, run])
    assert [(one["done"], len(one["rollouts"]) > 0) for one in data["runs"]] == [
        (0, False),
        (3, True),
    ]
    report.page(data)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        report.contents([tmp_path])
    assert report.labels([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    assert report.labels([tmp_path / "a" / "x", tmp_path / "a" / "y"]) == ["x", "y"]


@pytest.fixture
def server(run: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "live"
    shutil.copytree(run, folder)
    made = make_server([folder], 1000, port=0)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://{HOST}:{made.server_address[1]}", folder
    made.shutdown()
    made.server_close()


def get(address: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
        return answer.read().decode()


def test_the_server_tells_what_is_new_and_only_to_this_machine(server: tuple[str, Path]) -> None:
    address, folder = server
    assert address.startswith("http://127.0.0.1:")
    before, data = get(address + "/version"), json.loads(get(address + "/data"))
    assert data["runs"][0]["done"] == 3
    assert get(address + "/version") == before
    row = rows.read(folder / "rows.jsonl")[-1]
    rows.append(folder / "rows.jsonl", row | {"step": 3})
    assert get(address + "/version") != before
    assert json.loads(get(address + "/data"))["runs"][0]["done"] == 4
    assert "connect-src 'self'" in get(address + "/")
    for path, headers in (("/../config.json", {}), ("/data", {"Host": "evil.example"})):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(address + path, **headers)


# --- a real browser -------------------------------------------------------------------------------


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as machine:
        opened = machine.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        yield opened
        opened.close()


def opened(browser: Any, address: str, **how: Any) -> tuple[Any, list[str]]:
    """A page, and what it complained of or asked the network for."""
    page, wrong = browser.new_context(**how).new_page(), []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    own = "file:" if address.startswith("file:") else address
    page.on("request", lambda r: None if r.url.startswith(own) else wrong.append(r.url))
    page.goto(address)
    page.wait_for_selector(".chart canvas")
    return page, wrong


def test_a_browser_shows_curves_tokens_and_filters(run: Path, tmp_path: Path, browser) -> None:
    data = report.contents([run])
    first = data["runs"][0]
    hostile = dict(enumerate(HOSTILE))
    for i, key in enumerate(list(first["texts"])[: len(hostile)]):
        first["texts"][key] = specimens.visible(hostile[i])
    first["name"] = HOSTILE[0]
    first["rollouts"][1]["reward"] = 1.0
    file = tmp_path / "page.html"
    file.write_text(report.page(data))
    page, wrong = opened(browser, file.as_uri())
    assert "owned" not in page.title()
    assert page.locator("#cards h3").first.inner_text() == HOSTILE[0]
    assert page.locator(".chart canvas").count() >= 6
    roll = first["rollouts"][0]
    assert page.locator("#text .t").count() == len(roll["ids"])
    page.locator("#text .t").nth(2).hover()
    assert (
        f"{-(roll['s'][2] - roll['t'][2]) / 100:.3g} nats" in page.locator("#detail").inner_text()
    )
    page.locator("#text").focus()
    page.keyboard.press("w")
    worst = max(range(len(roll["ids"])), key=lambda k: abs(roll["s"][k] - roll["t"][k]))
    assert page.locator("#text .t.on").get_attribute("data-k") == str(worst)
    page.keyboard.press("ArrowLeft")
    assert page.locator("#text .t.on").get_attribute("data-k") == str(max(0, worst - 1))
    page.locator("#f-outcome").select_option("right")
    assert page.locator("#list .row").count() == 1
    page.locator("#f-outcome").select_option("")
    page.locator("#f-step").select_option("2")
    assert page.locator("#list .row").count() == sum(r["step"] == 2 for r in first["rollouts"])
    page.keyboard.press("Tab")
    page.locator("#column").fill("drift/abs_ratio")
    page.locator("#picker button").click()
    assert page.get_by_text("drift/abs_ratio").count() >= 1
    back = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(back)
    page.locator("#theme").click()
    assert page.evaluate(back) != light
    assert wrong == []


def test_a_phone_needs_no_sideways_scrolling(run: Path, tmp_path: Path, browser) -> None:
    file = tmp_path / "page.html"
    file.write_text(report.page(report.contents([run, run.parent / "run"])))
    page, wrong = opened(browser, file.as_uri(), viewport={"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert wrong == []


def test_a_served_page_follows_the_run(server: tuple[str, Path], browser) -> None:
    address, folder = server
    page, wrong = opened(browser, address + "/")
    page.locator("#list .row").nth(1).click()
    page.locator("#text .t").nth(1).hover()
    page.wait_for_timeout(500)
    rows.append(folder / "rows.jsonl", rows.read(folder / "rows.jsonl")[-1] | {"step": 3})
    page.get_by_text("step 4 of 3").wait_for(timeout=15_000)
    assert page.locator("#list .row[aria-selected=true]").count() == 1
    assert page.locator("#list .row").nth(1).get_attribute("aria-selected") == "true"
    assert page.locator("#text .t.on").get_attribute("data-k") == "1"
    assert wrong == []


def test_a_token_is_coloured_by_its_sign(run: Path, tmp_path: Path, browser) -> None:
    data = report.contents([run])
    file = tmp_path / "page.html"
    file.write_text(report.page(data))
    page, _ = opened(browser, file.as_uri())
    roll = data["runs"][0]["rollouts"][0]
    colours = page.locator("#text .t").evaluate_all(
        "all => all.map(t => t.style.getPropertyValue('--c'))"
    )
    costs = torch.tensor(roll["s"]) - torch.tensor(roll["t"])
    assert colours == ["var(--down)" if cost > 0 else "var(--up)" for cost in costs.tolist()]
    out = page.locator("#text .t").evaluate_all("all => all.map(t => t.classList.contains('out'))")
    assert out == [x == "0" for x in roll["in"]]
