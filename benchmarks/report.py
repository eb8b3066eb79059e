"""The report of a long run: its size, and how fast a browser opens it and answers the mouse.

    python -m benchmarks.report RUN [--steps 2000 --runs 2 --response 4000 --repeat 3]

The rows of a real run folder are repeated up to the steps asked for; of its saved batches the last
is joined with itself until its responses are that long. Needs playwright and a chromium for the
times; without them it prints the size alone. Milliseconds are of a wall clock, of the calmest of
--repeat loads: run it on a quiet machine.
"""

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.records import rows
from diagnostics.records.batch_files import load
from opd.report import build

HOVER = """() => { const spans = [...document.querySelectorAll("#text .t")], times = [];
  const every = Math.max(1, Math.floor(spans.length / 200));
  for (let k = 0; k < spans.length; k += every) { const start = performance.now();
    spans[k].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
    document.body.offsetHeight; times.push(performance.now() - start); }
  times.sort((a, b) => a - b);
  return [spans.length, ...[.5, .99].map((q) => times[Math.floor(times.length * q)])]; }"""
OPEN = """() => { const start = performance.now(); document.querySelector("#list .row").click();
  document.body.offsetHeight; return performance.now() - start; }"""
CHANGE = """([id, value]) => { const start = performance.now(), node = document.getElementById(id);
  node.value = value; node.dispatchEvent(new Event("change")); document.body.offsetHeight;
  return performance.now() - start; }"""


def lengthened(run: Path, out: Path, steps: int, response: int) -> Path:
    """A run folder with the rows of `run` again and again, and one batch of long responses."""
    found = rows.read(run / "rows.jsonl")
    out.mkdir(parents=True)
    for name in ("config.json", "code.txt", "evals.jsonl"):
        shutil.copy(run / name, out)
    (out / "final").symlink_to((run / "final").resolve())
    shutil.copytree(run / "batches", out / "batches")
    last = max((out / "batches").iterdir())
    batch = load(last)
    assert isinstance(batch, ScoredRollouts)
    longer(batch.rows(slice(0, 4)), response).save(
        out / "batches" / f"step_{steps - 1:06d}.safetensors"
    )
    long = [found[i % len(found)] | {"step": i} for i in range(steps)]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    return out


def longer(batch: ScoredRollouts, length: int) -> ScoredRollouts:
    """The responses joined with themselves up to a length."""
    times = -(-length // batch.tokens.shape[1])

    def tiled(part: Any) -> Any:
        wide = {
            name: torch.cat([x] * times, 1)[:, :length]
            for name, x in vars(part).items()
            if isinstance(x, torch.Tensor) and x.dim() > 1
        }
        inner = {
            name: tiled(x)
            for name, x in vars(part).items()
            if isinstance(x, Support | DistributionStats)
        }
        return replace(part, **wide, **inner)

    return tiled(batch)


def browsed(page: Path) -> dict[str, float]:
    """Milliseconds to load and draw, to hover and to change what is shown; MiB of heap."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as machine:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        opened = machine.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--enable-precise-memory-info"],
        )
        window = opened.new_page(viewport={"width": 1280, "height": 900})
        window.goto(page.as_uri())
        window.wait_for_selector(".chart canvas")
        found = {
            "load_ms": window.evaluate(
                'performance.getEntriesByType("navigation")[0].loadEventEnd'
            ),
            "heap_mib": window.evaluate("performance.memory.usedJSHeapSize") / 2**20,
        }
        _, found["hover_ms"], found["hover_worst_ms"] = window.evaluate(HOVER)
        window.evaluate(CHANGE, ["f-order", "long"])
        found["open_ms"] = window.evaluate(OPEN)
        found["long_tokens"], found["long_hover_ms"], found["long_hover_worst_ms"] = (
            window.evaluate(HOVER)
        )
        found["bands_ms"] = window.evaluate(CHANGE, ["bands", "on"])
        found["map_ms"] = window.evaluate(CHANGE, ["map", "divergence/teacher_entropy"])
        opened.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--response", type=int, default=4000)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        many = [
            lengthened(given.run, folder / f"run-{i}", given.steps, given.response)
            for i in range(given.runs)
        ]
        start = time.process_time()
        text = build.page(build.contents(many, 10 * given.response))
        seconds = time.process_time() - start
        page = folder / "page.html"
        page.write_text(text)
        print(
            f"{given.runs} runs of {given.steps} steps: {page.stat().st_size / 1e6:.1f} MB, "
            f"written in {seconds:.1f} s of processor time"
        )
        try:
            times = [browsed(page) for _ in range(given.repeat)]
            print({name: round(min(t[name] for t in times), 1) for name in times[0]})
        except ImportError:
            print("playwright is not installed; no times of a browser")


if __name__ == "__main__":
    main()
