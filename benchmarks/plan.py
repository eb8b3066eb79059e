"""Compare what `opd plan` predicts with training runs on this CPU.

    python -m benchmarks.plan            # the table of errors in docs/scale.md
    python -m benchmarks.plan --sizes    # the tables of memory and time there, of 7B to 72B

Each configuration trains a random pair in a process of its own. Memory is the peak of the process
in the first two steps beyond its use before the models were loaded. Time is the CPU time of the
process in a step, the median of those after the first ones, which also check scores; the last one,
which saves the model, does not count. Predictions are made before, from the configurations alone.
The average number of busy processes (load) during each run is shown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from benchmarks.random_pair import save_pair, training_config
from opd.config.settings import Config, with_settings


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pair and settings."""

    name: str
    vocabulary: int = 32768
    width: int = 256
    layers: int = 4
    rows: int = 8
    response: int = 64
    settings: dict[str, Any] = field(default_factory=dict)


WARMUP, TIMED = 3, 3
"""Steps that are not timed, since they rescore responses, and steps that are."""
PHASES = {"rollout": "rollout", "scoring": "score", "update": "update"}
"""Begins of the names of predicted activities, and a step's phase by its own clock."""
CASES = (
    Case(name="teacher_topk, V 32k"),
    Case(
        name="full_reverse_kl, V 32k",
        settings={"objective": "full_reverse_kl"},
    ),
    Case(
        name="teacher_topk, V 8k, long responses",
        vocabulary=8192,
        rows=4,
        response=384,
    ),
    Case(
        name="the same, checkpointing",
        vocabulary=8192,
        rows=4,
        response=384,
        settings={"gradient_checkpointing": True},
    ),
    Case(
        name="full_reverse_kl, V 64k, micro-batches",
        vocabulary=65536,
        settings={"objective": "full_reverse_kl", "max_tokens_per_microbatch": 512},
    ),
    Case(
        name="teacher_topk, V 32k, LoRA",
        settings={"lora_rank": 16},
    ),
    Case(
        name="teacher_topk, V 32k, bfloat16 with masters",
        settings={"dtype": "bfloat16"},
    ),
)


PLACES = (("7b", 8, "none"), ("7b", 8, "full"), ("14b", 8, "full"), ("72b", 64, "full"))
"""Size of a model, number of GPUs and sharding, for the tables of sizes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of cases; default: all")
    parser.add_argument("--sizes", action="store_true", help="plan 7B to 72B, measure nothing")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure(CASES[args.case], args.folder)))
        return
    if args.sizes:
        print(size_tables())
        return
    heads = ["configuration", "predicted MiB", "measured MiB", "error"]
    for name in ("step", *PHASES):
        heads += [f"{name}: predicted s", "measured s", "error"]
    print(f"| {' | '.join([*heads, 'load'])} |")
    print("|---" * (len(heads) + 1) + "|", flush=True)
    for number in args.cases if args.cases is not None else range(len(CASES)):
        with tempfile.TemporaryDirectory() as folder:
            save_case(Path(folder), CASES[number])
            predicted = predict(CASES[number], Path(folder))
            measured = run_process(number, folder)
        cells = [CASES[number].name]
        for name in ("bytes", "step", *PHASES):
            unit = 2**20 if name == "bytes" else 1.0
            error = predicted[name] / measured[name] - 1
            cells += [
                f"{predicted[name] / unit:.3g}",
                f"{measured[name] / unit:.3g}",
                f"{error:+.0%}",
            ]
        print(f"| {' | '.join(cells)} | {os.getloadavg()[0]:.0f} |", flush=True)


def size_tables() -> str:
    """Return Markdown tables of memory and time of a step of 128 responses on H100 GPUs."""
    from opd.analysis.plan.known_machines import GPUS
    from opd.analysis.plan.plan import make_plan
    from opd.config.recipes import paper_math

    plans = {}
    for size, gpus, sharding in PLACES:
        config = with_settings(
            paper_math(),
            student=f"qwen2.5-{size}",
            teacher=f"qwen2.5-{size}",
            engine="hf",
            prompts_per_step=128,
            group_size=1,
            generation_batch_size=8,
            sharding=sharding,
        )
        head = f"{size.upper()}, {gpus} GPUs, {'sharded' if sharding == 'full' else 'whole'}"
        plans[head] = make_plan(config, GPUS["H100"], gpus, prompt_tokens=200, mean_response=6000)
    first = next(iter(plans.values()))
    lines = ["| GB on each GPU (80) | " + " | ".join(plans) + " |", "|---|" + "---|" * len(plans)]
    by_phase = [{phase.name: phase.bytes for phase in plan.phases} for plan in plans.values()]
    for name in max(by_phase, key=len):
        cells = [f"{sizes[name] / 1e9:.3g}" if name in sizes else "-" for sizes in by_phase]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    peaks = [f"**{plan.peak_bytes / 1e9:.3g}**" for plan in plans.values()]
    lines.append(f"| peak with the reserve | {' | '.join(peaks)} |")
    lines += [
        "",
        "| seconds of a step | " + " | ".join(plans) + " |",
        "|---|" + "---|" * len(plans),
    ]
    for number, part in enumerate(first.activities):
        cells = [f"{plan.activities[number].seconds:.3g}" for plan in plans.values()]
        lines.append(f"| {part.name} | {' | '.join(cells)} |")
    sums = [f"**{plan.step_seconds:.3g}**" for plan in plans.values()]
    lines.append(f"| sum | {' | '.join(sums)} |")
    return "\n".join(lines)


def save_case(folder: Path, case: Case) -> None:
    """Save the pair of a case."""
    save_pair(
        folder,
        vocabulary=case.vocabulary,
        width=case.width,
        layers=case.layers,
        rows=case.rows,
        response=case.response,
        kv_heads=case.width // 64,
        has_answers=False,
    )


def case_config(case: Case, folder: Path) -> Config:
    """Return the settings of a case."""
    settings = {"answer_column": "", "support_k": 32, "max_prompt": 30, **case.settings}
    steps = WARMUP + TIMED + 1
    return training_config(
        folder, folder / "run", rows=case.rows, response=case.response, steps=steps, **settings
    )


def predict(case: Case, folder: Path) -> dict[str, float]:
    """Return the predicted bytes, and the seconds of a step and of its phases."""
    from opd.analysis.plan.known_machines import find_machine
    from opd.analysis.plan.plan import make_plan

    plan = make_plan(case_config(case, folder), find_machine("cpu"))
    phases = {
        name: sum(part.seconds for part in plan.activities if part.name.startswith(name))
        for name in PHASES
    }
    return {"bytes": plan.peak_bytes, "step": plan.step_seconds, **phases}


def run_process(number: int, folder: str) -> dict[str, float]:
    """Measure a case in a new process with one thread."""
    line = [sys.executable, "-m", "benchmarks.plan", "--case", str(number), "--folder", folder]
    quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        line, capture_output=True, text=True, env=os.environ | quiet, check=False
    )
    if process.returncode:
        raise RuntimeError(f"case {number} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.strip().splitlines()[-1])


def resident_bytes(name: str) -> int:
    """Return VmRSS, the resident memory of this process, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def measure(case: Case, folder: Path) -> dict[str, float]:
    """Train; return the peak memory of two steps, and the CPU seconds of later ones."""
    from opd.training import shared_pass
    from opd.training import train as trainer

    warm_up()
    before = resident_bytes("VmRSS")
    run_step = trainer.run_step
    peaks: list[int] = []
    steps: list[dict[str, float]] = []

    def measured_step(state: Any, number: int, log: Any) -> Any:
        if number == 0:
            Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
        elif number == 2:
            peaks.append(resident_bytes("VmHWM"))
        start = time.process_time()
        row = run_step(state, number, log)
        phases = {name: row[f"seconds/{phase}"] for name, phase in PHASES.items()}
        steps.append({"step": time.process_time() - start, **phases})
        return row

    clock = SimpleNamespace(perf_counter=time.process_time)
    with (
        patch.object(trainer, "time", clock),
        patch.object(shared_pass, "time", clock),
        patch.object(trainer, "run_step", measured_step),
        patch.object(trainer, "evaluate_and_record", lambda *_: None),
    ):
        trainer.train(case_config(case, folder))
    timed = steps[WARMUP : WARMUP + TIMED]
    return {
        "bytes": peaks[0] - before,
        **{name: median(step[name] for step in timed) for name in timed[0]},
    }


def warm_up() -> None:
    """Load the code of models, so that it is not taken for memory of the run."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    network = Qwen2ForCausalLM(config)
    ids = torch.zeros(2, 4, dtype=torch.long)
    network(ids).logits.log_softmax(-1).sum().backward()
    torch.optim.AdamW(network.parameters()).step()
    network.generate(ids, max_new_tokens=2)


if __name__ == "__main__":
    main()
