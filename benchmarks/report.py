"""Measure the report of a long run: its size, and how fast a browser loads it and responds.

    python -m benchmarks.report RUN [--steps 2000 --runs 2 --response 4000 --repeat 3]

The rows of a real run folder are repeated up to the requested number of steps; of its saved
batches, the last is concatenated with itself up to the requested response length. The times need
playwright and chromium; without them only the size is printed. Milliseconds are wall-clock times,
the least of --repeat loads: run it on an idle machine.
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
from diagnostics.records.batch_files import load_batch
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


def extend_run(run: Path, out: Path, steps: int, response: int) -> Path:
    """Write a run folder with repeated rows and one batch of long responses."""
    run_rows = rows.read_rows(run / "rows.jsonl")
    out.mkdir(parents=True)
    for name in ("config.json", "code.txt", "evals.jsonl"):
        shutil.copy(run / name, out)
    (out / "final").symlink_to((run / "final").resolve())
    shutil.copytree(run / "batches", out / "batches")
    last = max((out / "batches").iterdir())
    batch = load_batch(last)
    assert isinstance(batch, ScoredRollouts)
    extend_responses(batch.rows(slice(0, 4)), response).save(
        out / "batches" / f"step_{steps - 1:06d}.safetensors"
    )
    long = [run_rows[i % len(run_rows)] | {"step": i} for i in range(steps)]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    return out


def extend_responses(batch: ScoredRollouts, length: int) -> ScoredRollouts:
    """Concatenate the responses with themselves up to a length."""
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


def measure_browser(page: Path) -> dict[str, float]:
    """Return milliseconds to load, to hover and to change settings, and MiB of heap."""
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
        measurements = {
            "load_ms": window.evaluate(
                'performance.getEntriesByType("navigation")[0].loadEventEnd'
            ),
            "heap_mib": window.evaluate("performance.memory.usedJSHeapSize") / 2**20,
        }
        _, measurements["hover_ms"], measurements["hover_worst_ms"] = window.evaluate(HOVER)
        window.evaluate(CHANGE, ["f-order", "long"])
        measurements["open_ms"] = window.evaluate(OPEN)
        (
            measurements["long_tokens"],
            measurements["long_hover_ms"],
            measurements["long_hover_worst_ms"],
        ) = window.evaluate(HOVER)
        measurements["bands_ms"] = window.evaluate(CHANGE, ["bands", "on"])
        measurements["map_ms"] = window.evaluate(CHANGE, ["map", "divergence/teacher_entropy"])
        opened.close()
    return measurements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--response", type=int, default=4000)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run_folders = [
            extend_run(args.run, folder / f"run-{i}", args.steps, args.response)
            for i in range(args.runs)
        ]
        start = time.process_time()
        text = build.render_page(build.report_data(run_folders, 10 * args.response))
        seconds = time.process_time() - start
        page = folder / "page.html"
        page.write_text(text)
        print(
            f"{args.runs} runs of {args.steps} steps: {page.stat().st_size / 1e6:.1f} MB, "
            f"written in {seconds:.1f} s of processor time"
        )
        try:
            times = [measure_browser(page) for _ in range(args.repeat)]
            print({name: round(min(t[name] for t in times), 1) for name in times[0]})
        except ImportError:
            print("playwright is not installed; skipping the browser measurements")


if __name__ == "__main__":
    main()
