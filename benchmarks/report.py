"""The report of a long run: its size, and how fast a browser opens it and answers the mouse.

    python -m benchmarks.report RUN [--steps 2000 --runs 2]

The rows of a real run folder are repeated up to the steps asked for, and its batches kept. Needs
playwright and a chromium for the times; without them prints the size alone.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

from diagnostics import rows
from opd import report


def lengthened(run: Path, out: Path, steps: int) -> Path:
    """A run folder with the rows of `run` again and again."""
    found = rows.read(run / "rows.jsonl")
    out.mkdir(parents=True)
    for name in ("config.json", "code.txt", "evals.jsonl"):
        shutil.copy(run / name, out)
    shutil.copytree(run / "batches", out / "batches")
    long = [found[i % len(found)] | {"step": i} for i in range(steps)]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    return out


def browsed(page: Path) -> dict[str, float]:
    """Milliseconds to load and draw, median milliseconds of a hover, MiB of heap."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as machine:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        opened = machine.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        window = opened.new_page()
        start = time.perf_counter()
        window.goto(page.as_uri())
        window.wait_for_selector(".chart canvas")
        loaded = time.perf_counter() - start
        hover = window.evaluate(
            """() => { const spans = [...document.querySelectorAll("#text .t")], times = [];
            for (const span of spans.slice(0, 100)) { const start = performance.now();
              span.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
              times.push(performance.now() - start); }
            return times.sort((a, b) => a - b)[Math.floor(times.length / 2)]; }"""
        )
        heap = window.evaluate("performance.memory.usedJSHeapSize") / 2**20
        opened.close()
    return {"load_ms": 1e3 * loaded, "hover_ms": hover, "heap_mib": heap}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        many = [lengthened(given.run, folder / f"run-{i}", given.steps) for i in range(given.runs)]
        start = time.perf_counter()
        text = report.page(report.contents(many))
        seconds = time.perf_counter() - start
        page = folder / "page.html"
        page.write_text(text)
        print(
            f"{given.runs} runs of {given.steps} steps: {page.stat().st_size / 2**20:.1f} MiB, "
            f"written in {seconds:.1f} s"
        )
        try:
            print({name: round(value, 1) for name, value in browsed(page).items()})
        except ImportError:
            print("playwright is not installed; no times of a browser")


if __name__ == "__main__":
    main()
